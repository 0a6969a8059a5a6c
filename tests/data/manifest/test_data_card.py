"""What the data card counts, and that it can be read."""

import json

import numpy as np
import pytest
from PIL import Image

from data.clips.cut import CutSpec
from data.clips.mux import write_clip
from data.manifest.data_card import build_card, write_card
from data.prepare import Encoders, prepare
from tests.support.models import tiny


def sample(index: int, **more) -> dict:
    return {"id": str(index), "source": "landscape", "split": "train", "class": "thunder",
            "subset": "Landscape", "source_fps": 30.0, "source_seconds": 10.0, "mean_dbfs": -20.5,
            "has_audio": True, "video_caption": "a b c d", "audio_caption": "x"} | more


REJECTS = [{"id": "r1", "reason": "silent", "detail": "-70 dBFS"},
           {"id": "r2", "reason": "silent", "detail": "-71 dBFS"},
           {"id": "r3", "reason": "portrait", "detail": "9x16"}]


def histogram(card: dict, name: str) -> dict[tuple[float, float], int]:
    found = card["histograms"][name]
    edges = zip(found["edges"], found["edges"][1:], strict=False)
    return {edge: n for edge, n in zip(edges, found["counts"], strict=True) if n}


def test_counts():
    samples = [sample(0), sample(1, split="validation", source_fps=15.0),
               sample(2, source_fps=23.976, mean_dbfs=-99.0),
               sample(3, **{"class": "rain"}, mean_dbfs=None, has_audio=False),
               sample(4, source="avsync15", source_seconds=1000.0, mean_dbfs=3.0)]
    card = build_card(samples, REJECTS, fps=24, frames=49)
    assert (card["kept"], card["rejected"]) == (5, 3)
    assert card["reasons"] == {"silent": 2, "portrait": 1}
    assert card["cut_hours"] == pytest.approx(5 * 49 / 24 / 3600)
    assert card["upsampled"] == 0.2  # 15 fps; 23.976 counts as 24
    assert card["without_sound"] == 1
    assert card["splits"] == {"avsync15": {"train": 1}, "landscape": {"train": 3, "validation": 1}}
    assert card["classes"]["rain"] == {"train": 1}
    # Values beyond the edges are in the outer bins: every clip is in one bar.
    assert histogram(card, "mean_dbfs") == {(-66, -63): 1, (-21, -18): 2, (-3, 0): 1}
    assert histogram(card, "source_fps") == {(14, 16): 1, (23.9, 24.1): 1, (29.9, 30.1): 3}
    assert sum(card["histograms"]["source_seconds"]["counts"]) == 5
    assert card["histograms"]["video_words"]["mean"] == 4
    assert card["paper"] == [
        {"set": "avsync15", "clips": 1, "paper_clips": 1499},
        {"set": "landscape", "clips": 4, "paper_clips": 778},
    ]


def test_the_papers_totals_stand_beside_ours():
    samples = [sample(index, source=source, split=split) for index, (source, split) in enumerate(
        [("avsync15", "train"), ("landscape", "validation"), ("greatest_hits", "train"),
         ("vggsound", "train"), ("vggsound", "test")])]
    rows = {row["set"]: row for row in build_card(samples, [])["paper"]}
    assert rows["ALT-Merge"] == {"set": "ALT-Merge", "clips": 3, "paper_clips": 3254, "train": 2,
                                 "paper_train": 2954, "validation": 1, "paper_validation": 300}
    assert rows["VGGSound"] == {"set": "VGGSound", "clips": 2, "paper_clips": 107_648, "train": 1,
                                "paper_train": 106_717, "validation": 0, "paper_validation": 731}


def test_written_card_can_be_read(tmp_path):
    generator = np.random.default_rng(0)
    samples = [sample(index, mean_dbfs=float(generator.normal(-30, 8)), **{"class": "a|b"})
               for index in range(100)]
    card = build_card(samples, REJECTS)
    write_card(tmp_path / "new", card)
    assert json.loads((tmp_path / "new/data_card.json").read_text()) == card
    text = (tmp_path / "new/data_card.md").read_text()
    for line in ("100 of 103 clips kept: 0.06 h in cuts of 2.042 s (49 frames at 24 fps)",
                 "| silent | 2 |", "| landscape | 100 / 778 |  |  |", "| a\\|b | 100 | 100 |",
                 "| video caption (words) | 4.0 | 4.0 | 4.0 | 4.0 |", "](data_card.png)"):
        assert line in text
    with Image.open(tmp_path / "new/data_card.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 900 and (pixels < 250).any(axis=2).mean() > 0.02  # bars, text


def test_card_of_a_prepared_folder_counts_what_the_importer_left_out(tmp_path):
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 255, (12, 64, 96, 3), np.uint8)
    sound = 0.1 * generator.standard_normal((8000, 2)).astype(np.float32)
    write_clip(tmp_path / "a.mp4", frames, 24, sound, 16000)
    line = {"path": "a.mp4", "video_caption": "v", "audio_caption": "a", "source": "avsync15"}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps(line | {"id": "a"}) + "\n" + json.dumps(line | {
        "id": "late", "t0": 9}))
    (tmp_path / "m.rejects.jsonl").write_text(json.dumps(REJECTS[0]))
    wan, tangoflux = tiny.write_wan(tmp_path / "wan"), tiny.write_tangoflux(tmp_path / "tango")
    encoders = Encoders.load(str(wan), str(tangoflux), "cpu", 40)
    spec = CutSpec(frames=9, height=32, width=64, sample_rate=tiny.SAMPLE_RATE, hop=tiny.HOP)
    prepare(manifest, tmp_path / "out", encoders, spec)
    card = json.loads((tmp_path / "out/data_card.json").read_text())
    assert card["reasons"] == {"silent": 1, "too_short": 1}
    assert (card["kept"], card["splits"]) == (1, {"avsync15": {"train": 1}})
    assert card["histograms"]["mean_dbfs"]["mean"] == pytest.approx(-20, abs=2)
    assert (tmp_path / "out/data_card.png").is_file()


@pytest.mark.parametrize("samples", [[], [{"id": "bare", "split": "train"}]])
def test_what_records_do_not_say_is_left_out(tmp_path, samples):
    card = build_card(samples, [])
    assert card["upsampled"] is None and card["histograms"]["mean_dbfs"]["mean"] is None
    write_card(tmp_path, card)
    text = (tmp_path / "data_card.md").read_text()
    assert "with repeated pictures: unknown" in text and "nan" not in text.lower()
    json.loads((tmp_path / "data_card.json").read_text(), parse_constant=pytest.fail)
