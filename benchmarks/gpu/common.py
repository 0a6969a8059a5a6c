"""Shapes, random batches and records shared by the benchmarks of this folder."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from model import AVFullDiT, AVFullDiTConfig
from model.objective import Batch
from model.towers.audio_blocks import AudioDiTConfig
from model.towers.video_dit import VideoDiTConfig

PEAK_TFLOPS = 989.5  # dense bf16, NVIDIA's data sheet for the SXM part
CAPTION_TOKENS, CAPTION_ROWS, CAPTION_LENGTH = 116, 128, 512  # a usual umT5 caption, as collated


class Clip(NamedTuple):
    """Latent sizes of one clip at 192 x 320."""

    seconds: float
    frames: int  # of the video latent
    audio: int  # latents


CLIPS = {"2s": Clip(49 / 24, 13, 44), "5s": Clip(121 / 24, 31, 109)}

# Real classes and head size, small widths; every kind of block also occurs outside a joint one.
SMALL = AVFullDiTConfig(
    video=VideoDiTConfig(num_attention_heads=4, text_dim=256, ffn_dim=1024, num_layers=4),
    audio=AudioDiTConfig(num_layers=1, num_single_layers=3, num_attention_heads=2,
                         joint_attention_dim=128, pooled_projection_dim=128),
    num_joint_blocks=2,
)


def without_audio(config: AVFullDiTConfig) -> AVFullDiTConfig:
    return dataclasses.replace(config, task="t2v", audio=None)


def random_batch(config: AVFullDiTConfig, clip: Clip, size: int, grid: int = 1) -> Batch:
    """Random latents and text states, on the CPU as a loader gives it.

    Args:
        grid: divides height and width, for runs on a CPU.
    """
    generator = torch.Generator().manual_seed(1)
    video = config.video
    sound = config.audio or AudioDiTConfig()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator)

    text = normal(CAPTION_ROWS, video.text_dim).bfloat16()
    text[:, CAPTION_TOKENS:] = 0
    mask = torch.zeros(size, 64, dtype=torch.bool)
    mask[:, :20] = True
    return Batch(
        video_latents=normal(video.in_channels, clip.frames, 12 // grid, 20 // grid),
        audio_mean=normal(clip.audio, sound.in_channels),
        audio_std=torch.full((size, clip.audio, sound.in_channels), 0.1),
        has_audio=torch.ones(size, dtype=torch.bool), audio_weight=torch.ones(size),
        video_text=text, audio_text=normal(64, sound.joint_attention_dim).bfloat16(),
        audio_text_mask=mask, duration=torch.full((size,), clip.seconds),
        sample_ids=[f"sample {index}" for index in range(size)], video_text_length=CAPTION_LENGTH,
    )


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Every weight random, new ones too: the same numbers for the same shapes and device."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 0.02
        if parameter.dim() >= 2:
            std = (3 * parameter[0].numel()) ** -0.5  # torch's own for a Linear
        parameter.normal_(0, std, generator=generator)
        if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
            parameter.add_(1)


def build(config: AVFullDiTConfig, device: torch.device, dtype: torch.dtype,
          attention: str = "auto") -> AVFullDiT:
    """A model with random weights, built where it will run."""
    with device:
        model = AVFullDiT(config, attention=attention)
    for parameter in model.parameters():  # one at a time: never two whole copies
        parameter.data = parameter.data.to(dtype)
    randomise(model)
    return model


def units(model: AVFullDiT) -> list[nn.Module]:
    """The blocks that AVFullDiT.forward calls: what is compiled, one by one."""
    blocks = [*model.video.blocks]
    if model.config.task == "t2av":
        blocks += [*model.audio.transformer_blocks, *model.audio.single_transformer_blocks,
                   *model.joint_blocks]
    return blocks


def set_compiled(model: AVFullDiT, compiled: bool, backend: str = "inductor") -> None:
    """Compile every block's forward, or put the eager one back."""
    for block in units(model):
        block.__dict__.pop("forward", None)
        if compiled:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False,
                                          backend=backend)


class Record:
    """A JSON file that is whole after every `put`, so that a later failure loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}

    def put(self, name: str, values: Any) -> None:
        self.values[name] = values
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.values, indent=1), encoding="utf-8")
        part.replace(self.path)

    def attempt(self, name: str, make: Callable[[], Any]) -> Any:
        """Record what ``make`` returns, or its error; None after an error."""
        try:
            values = make()
        except (RuntimeError, ValueError, ImportError, AssertionError) as error:
            self.put(name, {"error": f"{type(error).__name__}: {error}"[:2000]})
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            return None
        self.put(name, values)
        return values


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 3
          ) -> dict[str, float]:
    """Milliseconds of one call: median, least and most of ``repeats``."""
    for _ in range(warmup):
        call()
    synchronize(device)
    values = []
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        values = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    else:
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            values.append(1e3 * (time.perf_counter() - began))
    return spread(values)


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values),
            "n": len(values)}


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||, in float64."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference.to(value.device)).norm() / reference.norm())
