"""Write one clip as an ordinary mp4: H.264 yuv420p picture and AAC sound, in sync.

Every clip that this repository makes (the built-in world, samples) goes through `write_clip`, so
that it enters and leaves by the same door as anybody's clips. The AAC encoder delays the sound by
its priming samples; the mp4 muxer writes that delay as an edit list, and a reader that honours
timestamps gets the sound back at the right time (tests/data/clips/test_mux.py: within 1 ms).
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

AUDIO_FRAME = 1024  # samples in one AAC frame
AUDIO_BIT_RATE = 192_000
CRF = "16"  # visually lossless; a tiny world must not be learned from compression artefacts


def _check(frames: np.ndarray, audio: np.ndarray | None) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames is {frames.dtype} {frames.shape}; need uint8 (T, H, W, 3)")
    if frames.shape[0] == 0 or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames has shape {frames.shape}; yuv420p needs T >= 1 and even H, W")
    if audio is not None and (audio.ndim != 2 or audio.shape[1] != 2):
        raise ValueError(f"audio has shape {audio.shape}; need (N, 2), duplicate mono to stereo")


def _mux_video(container, stream, frames: np.ndarray, rate: Fraction) -> None:
    for index, image in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts = index
        frame.time_base = 1 / rate  # the muxer may change the stream's own
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _mux_audio(container, stream, audio: np.ndarray, sample_rate: int) -> None:
    planar = np.ascontiguousarray(np.clip(audio, -1.0, 1.0).T, dtype=np.float32)  # (2, N)
    for start in range(0, planar.shape[1], AUDIO_FRAME):
        block = np.ascontiguousarray(planar[:, start:start + AUDIO_FRAME])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
        frame.sample_rate = sample_rate
        frame.pts = start
        frame.time_base = Fraction(1, sample_rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_clip(
    path: str | Path,
    frames: np.ndarray,
    fps: float,
    audio: np.ndarray | None,
    sample_rate: int,
) -> None:
    """Write `frames` (T,H,W,3) uint8 at `fps`, and `audio` (N,2) float32 in [-1,1], to an mp4.

    `audio=None` writes a silent (picture only) file. Sample n of the sound belongs to n/sample_rate
    seconds, frame k to k/fps. Raises ValueError for any other shape or type.
    """
    _check(frames, audio)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=rate)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = 1 / rate
        video.codec_context.thread_count = 1  # bytes do not depend on the machine's cores
        video.options = {"crf": CRF, "preset": "fast"}
        if audio is None:
            _mux_video(container, video, frames, rate)
            return
        sound = container.add_stream("aac", rate=sample_rate, layout="stereo")
        sound.bit_rate = AUDIO_BIT_RATE
        _mux_video(container, video, frames, rate)
        _mux_audio(container, sound, audio, sample_rate)
