"""A prepared data set of random latents in the real schema, for tests that train.

What `data.prepare` writes, without clips and encoders: the columns, dataset.json and text states
go through data.schema, the shards through streaming's own writer.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from streaming import MDSWriter

from data.schema import HASH, TEXT_FILE, Metadata, columns, pack, save_metadata
from tests.support.models.tiny import HOP, SAMPLE_RATE, VIDEO_VAE, WIDTH

FRAMES, FPS, SIZE = 9, 24.0, 64
LATENT = (48, 3, 4, 4)  # (C, F, h, w)
SOUND = (12, 6)  # (L, C): ceil(9 / 24 * 16000 / 512) = 12
TEXT_LENGTH = 16


def write_shards(
    root: Path, train: int, validation: int, silent: int = 0, seed: int = 0, prefix: str = "",
    **values: Any,
) -> Path:
    """Random samples with distinct captions; the same files for the same arguments.

    Every ``silent``-th sample (0: none) is without sound; ids begin with ``prefix``; ``values``
    replace fields of Metadata.
    """
    generator = torch.Generator().manual_seed(seed)
    metadata = dataclasses.replace(Metadata(
        fps=FPS, frames=FRAMES, height=SIZE, width=SIZE, sample_rate=SAMPLE_RATE, audio_hop=HOP,
        video_temporal_stride=4, video_spatial_stride=16,
        latents_mean=VIDEO_VAE["latents_mean"], latents_std=VIDEO_VAE["latents_std"],
        video_latent_shape=list(LATENT), audio_latent_shape=list(SOUND),
        video_text_length=TEXT_LENGTH, video_text_width=WIDTH,
        audio_text_length=64, audio_text_width=WIDTH,
        counts={"train": train, "validation": validation},
    ), **values)
    for split, count in metadata.counts.items():
        with MDSWriter(out=str(root / split), columns=columns(metadata), compression="zstd",
                       hashes=[HASH], size_limit=1 << 16) as writer:
            for index in range(count):
                heard = not silent or (index + 1) % silent != 0
                writer.write(_sample(f"{prefix}{split}{index:03d}", metadata, heard, generator))
    save_metadata(root, metadata)
    mask = torch.arange(64) < 1
    save_file({
        "video_empty": torch.randn(1, WIDTH, generator=generator).bfloat16(),
        "video_negative": torch.randn(5, WIDTH, generator=generator).bfloat16(),
        "audio_empty": torch.randn(64, WIDTH, generator=generator).bfloat16(),
        "audio_negative": torch.randn(64, WIDTH, generator=generator).bfloat16(),
        "audio_empty_mask": mask, "audio_negative_mask": mask.clone(),
    }, root / TEXT_FILE)
    return root


def _sample(name: str, metadata: Metadata, heard: bool, generator: torch.Generator) -> dict:
    length = int(torch.randint(3, TEXT_LENGTH, (1,), generator=generator))
    mean = torch.tensor(VIDEO_VAE["latents_mean"])[:, None, None, None]
    video = mean + torch.randn(metadata.video_latent_shape, generator=generator)
    sound = metadata.audio_latent_shape
    audio = torch.randn(sound, generator=generator), torch.rand(sound, generator=generator)
    return pack(
        {"id": name},
        video,
        audio if heard else None,
        torch.randn(length, WIDTH, generator=generator),
        (torch.randn(64, WIDTH, generator=generator), torch.arange(64) < length),
        sound,
    )
