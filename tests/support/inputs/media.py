"""Media files with exact content for the decoder's tests: FFV1 pictures and PCM sound in Matroska.

Lossless, any time stamps, any channel layout; pictures carry their index in every pixel.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

MILLISECONDS = Fraction(1, 1000)  # Matroska's own clock


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """(count, H, W, 3) uint8: frame i is 3 * i everywhere."""
    values = (3 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, height, width, 3)).copy()


def number(frame: np.ndarray) -> int:
    """The index that `numbered` wrote into a frame."""
    return round(float(frame.mean()) / 3)


def write_media(
    path: Path,
    frames: np.ndarray,
    times: np.ndarray,
    audio: np.ndarray | None = None,
    rate: int = 48000,
    audio_start: float = 0.0,
    layout: str = "stereo",
    options: dict[str, str] | None = None,
    pixel_aspect: Fraction | None = None,
) -> Path:
    """frames (T, H, W, 3) shown at `times` (seconds), audio (N, channels) from `audio_start`.

    `pixel_aspect` is the width of a pixel over its height, where it is not square; it is written
    into H.264's own header, because PyAV's Matroska does not carry it.
    """
    with av.open(str(path), "w", format="matroska", options=options or {}) as container:
        mean_rate = Fraction((len(times) - 1) / (times[-1] - times[0])).limit_denominator(1001)
        pixels = "bgr0" if pixel_aspect is None else "yuv420p"
        video = container.add_stream("libx264" if pixel_aspect else "ffv1", rate=mean_rate)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = pixels
        video.codec_context.time_base = MILLISECONDS
        if pixel_aspect is not None:
            video.codec_context.sample_aspect_ratio = pixel_aspect
        sound = None
        if audio is not None:
            sound = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        for image, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = round(time * 1000), MILLISECONDS
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound is not None:
            _mux_sound(container, sound, audio, rate, audio_start, layout)
    return path


def _mux_sound(container, stream, audio, rate, start, layout) -> None:
    samples = np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)
    for begin in range(0, len(samples), 1024):
        block = np.ascontiguousarray(samples[begin : begin + 1024].reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(block, "s16", layout)
        frame.sample_rate = rate
        frame.pts, frame.time_base = begin + round(start * rate), Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def noise(seconds: float, rate: int = 48000, channels: int = 2, level: float = 0.1) -> np.ndarray:
    """(N, channels) white noise, loud enough not to be silent."""
    generator = np.random.default_rng(0)
    return level * generator.standard_normal((round(seconds * rate), channels))


def rotate_mp4(path: Path, degrees: int) -> None:
    """Write a display matrix into an mp4's video track: shown `degrees` counter-clockwise."""
    cos, sin = round(np.cos(np.radians(degrees))), round(np.sin(np.radians(degrees)))
    # The file stores the clockwise matrix, 16.16 fixed point.
    matrix = np.array([cos, -sin, 0, sin, cos, 0, 0, 0, 1 << 14], dtype=">i4")
    matrix[[0, 1, 3, 4]] <<= 16
    matrix[8] = 1 << 30
    data = bytearray(path.read_bytes())
    begin = data.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8  # version 0: times, id, layer, volume
    data[begin : begin + 36] = matrix.tobytes()
    path.write_bytes(data)
