"""Latents and text states of the training clips, made once by the trained encoders.

Kept as one torch file, in the form the towers train on: normalised video latents, audio mean and
std, umT5 states zero-padded to VIDEO_TEXT_LENGTH rows, all 64 T5 rows with their mask.
"""

from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.playground import describe
from model.encoders import AudioTextEncoder, AudioVAE, VideoTextEncoder, VideoVAE
from tools.backbones import common
from tools.backbones.audio_vae import window_of
from tools.backbones.clips import FIRST_FRAME, TRAIN_SEED, WINDOW_FRAMES, open_cache
from tools.backbones.video_vae import to_tensor

VIDEO_TEXT_LENGTH = 64  # rows the tiny video tower attends to (512 in the released one)


class Latents(NamedTuple):
    """N clips as the towers see them; row i of every tensor is clip i."""

    video: torch.Tensor  # (N,16,13,4,6) normalised
    audio_mean: torch.Tensor  # (N,64,16)
    audio_std: torch.Tensor  # (N,64,16)
    video_text: torch.Tensor  # (N,64,96)
    audio_text: torch.Tensor  # (N,64,64)
    audio_text_mask: torch.Tensor  # (N,64) bool


class Texts(NamedTuple):
    video: torch.Tensor  # (N,64,96) zero-padded
    audio: torch.Tensor  # (N,64,64) all rows
    audio_mask: torch.Tensor  # (N,64) bool


def encode_clip(
    video_vae: VideoVAE, audio_vae: AudioVAE, frames: np.ndarray, audio: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre window of one clip -> normalised video latents, audio mean, audio std (batch 1)."""
    window = to_tensor(frames[FIRST_FRAME:FIRST_FRAME + WINDOW_FRAMES])
    video = video_vae.normalize(video_vae.encode(window))
    return video, *audio_vae.encode(window_of(audio))


def encode_captions(video_captions: list[str], audio_captions: list[str]) -> Texts:
    """Text states of both encoders, padded as the towers expect them."""
    encoder = VideoTextEncoder.from_folder(common.WAN, "cpu", max_length=VIDEO_TEXT_LENGTH)
    rows = encoder.encode(video_captions)
    video = torch.zeros(len(rows), VIDEO_TEXT_LENGTH, rows[0].shape[-1])
    for index, row in enumerate(rows):
        video[index, :len(row)] = row
    audio, mask = AudioTextEncoder.from_folder(common.TANGOFLUX, "cpu").encode(audio_captions)
    return Texts(video, audio, mask)


def _encode_video(job: tuple[Path, int, int]) -> torch.Tensor:
    torch.set_num_threads(1)
    cache, start, stop = job
    frames, _ = open_cache(cache)
    vae = VideoVAE.from_folder(common.WAN, "cpu")
    windows = frames[start:stop, FIRST_FRAME:FIRST_FRAME + WINDOW_FRAMES]
    return torch.cat([vae.normalize(vae.encode(to_tensor(window))) for window in windows])


def _encode_audio(job: tuple[Path, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.set_num_threads(1)
    cache, start, stop = job
    _, audio = open_cache(cache)
    vae = AudioVAE.from_folder(common.TANGOFLUX, "cpu")
    parts = [vae.encode(window_of(sound)) for sound in audio[start:stop]]
    return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])


def build(cache: Path, kind: str, processes: int) -> None:
    """Encode all clips of the cache, `kind` "video" or "audio", into cache/<kind>_latents.pt."""
    count = len(open_cache(cache)[0])
    jobs = [(cache, start, min(start + 64, count)) for start in range(0, count, 64)]
    with Pool(processes) as pool:
        if kind == "video":
            torch.save(torch.cat(pool.map(_encode_video, jobs, chunksize=1)), cache / f"{kind}.pt")
            return
        parts = pool.map(_encode_audio, jobs, chunksize=1)
    mean, std = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    torch.save((mean, std), cache / f"{kind}.pt")


def open_latents(cache: Path, kind: str) -> Latents:
    """Latents of one kind with the captions of all clips; the other kind stays empty."""
    path = cache / f"{kind}.pt"
    if not path.is_file():
        command = f"python -m tools.backbones {kind}_latents"
        raise FileNotFoundError(f"no {path}; write it with `{command}`")
    stored = torch.load(path, weights_only=True)
    count = len(stored) if kind == "video" else len(stored[0])
    facts = [describe(TRAIN_SEED, index) for index in range(count)]
    texts = encode_captions([f.video_caption for f in facts], [f.audio_caption for f in facts])
    nothing = torch.zeros(count, 0)
    video = stored if kind == "video" else nothing
    mean, std = (nothing, nothing) if kind == "video" else stored
    return Latents(video, mean, std, texts.video, texts.audio, texts.audio_mask)
