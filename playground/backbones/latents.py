"""Latents and text states of the training clips, made once by the trained encoders.

Kept as one torch file, in the form the towers train on: normalised video latents, audio mean and
std, umT5 states zero-padded to VIDEO_TEXT_LENGTH rows, all 64 T5 rows with their mask.
"""

from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model.encoders import AudioTextEncoder, AudioVAE, VideoTextEncoder, VideoVAE
from playground.backbones import recipe
from playground.backbones.audio_vae import window_of
from playground.backbones.clips import FIRST_FRAME, TRAIN_SEED, WINDOW_FRAMES, small_clip
from playground.backbones.video_vae import encode, to_tensor, whole_sequence
from playground.world.clip import describe, make_clip

VIDEO_TEXT_LENGTH = 64  # rows the tiny video tower attends to (512 in the released one)
TEXTS = 512  # captions encoded at once


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
    count = len(video_captions)
    encoder = VideoTextEncoder.from_folder(recipe.WAN, "cpu", max_length=VIDEO_TEXT_LENGTH)
    other = AudioTextEncoder.from_folder(recipe.TANGOFLUX, "cpu")
    video = torch.zeros(count, VIDEO_TEXT_LENGTH, encoder.width)
    audio, mask = [], []
    for start in range(0, count, TEXTS):
        for index, row in enumerate(encoder.encode(video_captions[start:start + TEXTS]), start):
            video[index, :len(row)] = row
        states, true = other.encode(audio_captions[start:start + TEXTS])
        audio.append(states)
        mask.append(true)
    return Texts(video, torch.cat(audio), torch.cat(mask))


@torch.no_grad()
def _encode_video(indices: range) -> torch.Tensor:
    torch.set_num_threads(1)
    wrapped = VideoVAE.from_folder(recipe.WAN, "cpu")
    vae, parts = whole_sequence(wrapped.vae), []
    for index in indices:
        frames, _ = small_clip(make_clip(TRAIN_SEED, index))
        window = to_tensor(frames[FIRST_FRAME:FIRST_FRAME + WINDOW_FRAMES])
        parts.append(wrapped.normalize(encode(vae, window).chunk(2, dim=1)[0]))  # the mean
    return torch.cat(parts)


def _encode_audio(indices: range) -> tuple[torch.Tensor, torch.Tensor]:
    torch.set_num_threads(1)
    vae = AudioVAE.from_folder(recipe.TANGOFLUX, "cpu")
    clips = (small_clip(make_clip(TRAIN_SEED, index)) for index in indices)
    parts = [vae.encode(window_of(sound)) for _, sound in clips]
    return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])


def build(cache: Path, kind: str, count: int, processes: int) -> None:
    """Draw and encode clips 0..count-1, `kind` "video" or "audio", into cache/<kind>.pt."""
    cache.mkdir(parents=True, exist_ok=True)
    jobs = [range(start, min(start + 64, count)) for start in range(0, count, 64)]
    with Pool(processes) as pool:
        work: Any = _encode_video if kind == "video" else _encode_audio
        parts = list(tqdm(pool.imap(work, jobs), total=len(jobs), desc=f"{kind}_latents",
                          mininterval=10))
    if kind == "video":
        torch.save(torch.cat(parts), cache / f"{kind}.pt")
        return
    mean, std = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    torch.save((mean, std), cache / f"{kind}.pt")


def open_latents(cache: Path, kind: str) -> Latents:
    """Latents of one kind with the captions of all clips; the other kind stays empty."""
    path = cache / f"{kind}.pt"
    if not path.is_file():
        command = f"python -m playground.backbones {kind}_latents"
        raise FileNotFoundError(f"no {path}; write it with `{command}`")
    stored = torch.load(path, weights_only=True)
    count = len(stored) if kind == "video" else len(stored[0])
    facts = [describe(TRAIN_SEED, index) for index in range(count)]
    texts = encode_captions([f.video_caption for f in facts], [f.audio_caption for f in facts])
    nothing = torch.zeros(count, 0)
    video = stored if kind == "video" else nothing
    mean, std = (nothing, nothing) if kind == "video" else stored
    return Latents(video, mean, std, texts.video, texts.audio, texts.audio_mask)
