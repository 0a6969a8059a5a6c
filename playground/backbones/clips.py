"""Playground clips in the form the backbones train on, cached once as plain arrays.

frames.npy (N,72,64,96,3) uint8 and audio.npy (N,48000,2) float16 at 16 kHz; captions come from
`playground.world.clip.describe` again, since a clip is a pure function of (seed, index). Training
uses TRAIN_SEED only; every measured number uses HELD_OUT_SEED.
"""

from multiprocessing import Pool
from pathlib import Path

import numpy as np

from playground.world.clip import Clip, make_clip

TRAIN_SEED, HELD_OUT_SEED = 1, 2
FPS, SAMPLE_RATE, HOP = 24, 16_000, 512
CLIP_FRAMES, HEIGHT, WIDTH = 72, 64, 96
WINDOW_FRAMES = 49  # what prepare cuts: 49 frames, 2.0417 s, from the middle of the clip
WINDOW_LATENTS = 64  # ceil(49 / 24 * 16000 / 512)
FIRST_FRAME = (CLIP_FRAMES - WINDOW_FRAMES) // 2  # 11: whole frame next to the centre window


def halve_frames(frames: np.ndarray) -> np.ndarray:
    """(T,128,192,3) uint8 -> (T,64,96,3) uint8 by the mean of 2 x 2 pixels."""
    t, h, w, c = frames.shape
    blocks = frames.reshape(t, h // 2, 2, w // 2, 2, c).astype(np.uint16).sum(axis=(2, 4))
    return ((blocks + 2) // 4).astype(np.uint8)


def third_rate(audio: np.ndarray) -> np.ndarray:
    """(N,2) at 48 kHz -> (N/3,2) at 16 kHz, band-limited by cutting the spectrum at 8 kHz."""
    count = audio.shape[0] // 3
    spectrum = np.fft.rfft(audio, axis=0)[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count, axis=0) / 3).astype(np.float32)


def small_clip(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """Frames (72,64,96,3) uint8 and sound (48000,2) float32 of one clip, as the VAEs see it."""
    return halve_frames(clip.frames), third_rate(clip.audio)


def _make(key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return small_clip(make_clip(*key))


def build_cache(folder: Path, seed: int, count: int, processes: int) -> None:
    """Write frames.npy and audio.npy of clips 0..count-1 of `seed` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, CLIP_FRAMES, HEIGHT, WIDTH, 3)
    frames = np.lib.format.open_memmap(folder / "frames.npy", "w+", np.uint8, shape)
    audio = np.lib.format.open_memmap(folder / "audio.npy", "w+", np.float16, (count, 48_000, 2))
    with Pool(processes) as pool:
        made = pool.imap(_make, [(seed, index) for index in range(count)], chunksize=8)
        for index, (clip_frames, clip_audio) in enumerate(made):
            frames[index], audio[index] = clip_frames, clip_audio
    frames.flush()
    audio.flush()


def open_cache(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Frames and audio arrays of a folder that `build_cache` wrote (memory-mapped)."""
    names = [folder / "frames.npy", folder / "audio.npy"]
    if not all(name.is_file() for name in names):
        raise FileNotFoundError(
            f"no clip cache in {folder}; write it with `python -m playground.backbones clips`"
        )
    return np.load(names[0], mmap_mode="r"), np.load(names[1], mmap_mode="r")
