"""data/clips/contact_sheet.py: the picture of a clip says what was seen and heard, and when."""

import numpy as np
import pytest
from PIL import Image

from data.clips.contact_sheet import draw_contact_sheet, spectrogram, write_contact_sheet

RATE = 16000


def test_spectrogram_shows_a_tone_at_its_frequency_and_time():
    time = np.arange(2 * RATE) / RATE
    tone = (np.sin(2 * np.pi * 2000 * time) * (time > 1))[:, None]
    picture = spectrogram(tone, 400, 100).sum(axis=2)
    row, column = np.unravel_index(picture[:, 250:].argmax(), picture[:, 250:].shape)
    assert abs((100 - row) / 100 - 2000 / (RATE / 2)) < 0.03
    assert picture[row, 300] > 3 * picture[row, 100]  # silent in the first second


def test_silence_is_dark():
    assert len(np.unique(spectrogram(np.zeros((RATE, 2)), 64, 32).reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("audio", [None, np.zeros((RATE, 2), np.float32)])
def test_contact_sheet(tmp_path, audio):
    frames = np.zeros((24, 32, 48, 3), np.uint8)
    frames[12:] = (255, 0, 0)
    drawn = draw_contact_sheet(frames, 24, audio, RATE, "a red flash " * 40)
    write_contact_sheet(tmp_path / "sheet.png", drawn)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    red = (sheet == (255, 0, 0)).all(axis=2)
    assert red[:, : sheet.shape[1] // 2 - 2].sum() == 0  # the second half's frames, on the right
    assert red.any()
    if audio is not None:  # silence: a dark band under everything
        assert sheet[-60:].mean() < 20
    else:
        assert sheet[-10:].mean() > 200


def test_sheets_are_stacked(tmp_path):
    sheets = [Image.new("RGB", size, "red") for size in ((8, 3), (5, 4))]
    write_contact_sheet(tmp_path / "page.png", *sheets)
    page = np.asarray(Image.open(tmp_path / "page.png"))
    assert page.shape == (7, 8, 3)
    assert (page[:3] == (255, 0, 0)).all() and (page[3:, 5:] == 255).all()
