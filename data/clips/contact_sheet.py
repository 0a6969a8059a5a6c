"""One picture of a clip with sound: frames in a row, the spectrogram under them on the same clock.

Used by tools.sample and data.inspect. Plain numpy and Pillow: it works wherever the trainer does.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Anchor colours from dark to bright; the scale between them is linear in decibels.
_COLOURS = np.array(
    [[4, 4, 20], [60, 15, 110], [150, 40, 120], [230, 90, 80], [252, 190, 110], [252, 253, 200]],
    dtype=np.float64,
)
_FLOOR_DB = -80.0  # relative to the loudest bin
_MARGIN = 14


def spectrogram(audio: np.ndarray, width: int, height: int) -> np.ndarray:
    """Log-power spectrogram as pixels.

    Args:
        audio: (N, channels) float in [-1, 1]; the channels' power is added.
        width, height: pixels; time runs right, linear frequency from 0 to Nyquist runs up.

    Returns: (height, width, 3) uint8. Silence is uniformly dark.
    """
    window = max(64, 2 ** round(np.log2(max(len(audio) / 64, 64))))
    centres = np.linspace(0, len(audio), width).astype(int)
    padded = np.pad(audio.astype(np.float64), ((window // 2, window // 2), (0, 0)))
    frames = np.stack([padded[c : c + window] for c in centres])  # (width, window, channels)
    spectrum = np.fft.rfft(frames * np.hanning(window)[None, :, None], axis=1)
    power = (np.abs(spectrum) ** 2).sum(axis=2).T[::-1]  # (bins, width), high frequency first
    level = 10 * np.log10(np.maximum(power, 1e-20) / max(power.max(), 1e-6))
    bright = np.clip(1 - level / _FLOOR_DB, 0, 1) * (len(_COLOURS) - 1)
    index = np.minimum(bright.astype(int), len(_COLOURS) - 2)
    colour = _COLOURS[index] + (bright - index)[..., None] * np.diff(_COLOURS, axis=0)[index]
    image = Image.fromarray(colour.astype(np.uint8))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def write_contact_sheet(path: str | Path, *sheets: Image.Image) -> None:
    """Write sheets below each other as one PNG."""
    size = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    page = Image.new("RGB", size, "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    page.save(path)


def draw_contact_sheet(
    frames: np.ndarray, fps: float, audio: np.ndarray | None, sample_rate: int, title: str,
    columns: int = 8,
) -> Image.Image:
    """The sheet of one clip.

    Args:
        frames: (T, H, W, 3) uint8.
        audio: (N, channels) float, or None for a clip without sound.
        title: shown above, wrapped to the width.
    """
    # The middle of each column's share of the clip: a frame stands above its own sound.
    picks = ((np.arange(columns) + 0.5) / columns * len(frames)).astype(int)
    scale = max(1, round(160 / frames.shape[2]))
    height, width = frames.shape[1] * scale, frames.shape[2] * scale
    total = columns * width
    lines = _wrap(title, total // 6 - 2)
    top = _MARGIN * len(lines) + 6
    sound = 0 if audio is None else 120
    sheet = Image.new("RGB", (total, top + height + _MARGIN + sound), "white")
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        draw.text((4, 2 + row * _MARGIN), line, fill="black")
    for column, pick in enumerate(picks):
        tile = Image.fromarray(frames[pick]).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (column * width, top))
        draw.line([(column * width, top), (column * width, top + height)], fill="white", width=2)
        place = (column * width + width // 2 - 16, top + height)
        draw.text(place, f"{pick / fps:.2f} s", fill="black")
    if audio is not None:
        # The spectrogram spans the clip from the first column's left edge to the last one's right.
        picture = Image.fromarray(spectrogram(audio, total, sound))
        sheet.paste(picture, (0, top + height + _MARGIN))
        draw.text((4, top + height + _MARGIN), f"0-{sample_rate // 2} Hz", fill="white")
    return sheet


def _wrap(text: str, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line] if line else lines
