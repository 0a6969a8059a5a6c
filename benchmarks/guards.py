"""What all guards cost per step: the same engine, with and without them, in alternating blocks.

    python -m benchmarks.guards [--width tiny|playground|real|full] [--pairs N]          # one rank
    torchrun --nproc-per-node=2 -m benchmarks.guards ...               # with the gather

"With" is train.py's own step and loop calls: screened losses, the gather of losses and votes
read by the host, phases under a watchdog, the batch in hand remembered, skips judged, stragglers
compared every 10 steps. "Without" accumulates the losses on the device and reduces them every 10
steps. Prints medians, and the median of the paired ratios with a 95 % bootstrap interval. On a CPU
most of a large model's step is fresh memory, and most of its noise: see benchmarks/reliability.md
for the three variables that keep it.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from common.ranks import resolve_world, sum_over_ranks
from data.schema import Metadata, sample_fault
from model import AVFullDiT, AVFullDiTConfig
from model.flow import FlowConfig
from model.objective import Batch, Objective
from model.towers.audio_blocks import AudioDiTConfig
from model.towers.video_dit import VideoDiTConfig
from playground.backbones.towers import AUDIO, VIDEO
from training import engine as ds
from training.distributed import shutdown, start
from training.ds_config import complete_ds_config
from training.guards.bad_numbers import GuardConfig
from training.guards.supervisor import Agreed, StepAgreement, Supervisor
from training.guards.watchdog import WatchdogConfig

LOG_EVERY = 10
REAL = ("real", "full")
TINY_VIDEO = VideoDiTConfig(num_attention_heads=4, attention_head_dim=16, text_dim=32, ffn_dim=128,
                            num_layers=4)
TINY_AUDIO = AudioDiTConfig(in_channels=6, num_layers=1, num_single_layers=2, attention_head_dim=16,
                            num_attention_heads=2, joint_attention_dim=32,
                            pooled_projection_dim=32, audio_seq_len=40, axes_dims_rope=(4, 4, 8))
RATES = {"fps": 24.0, "video_temporal_stride": 4, "sample_rate": 16000, "audio_hop": 512}


class Without:
    """A loop's calls with nothing behind them."""

    def __init__(self) -> None:
        self.guard = self.straggler = self.supervisor = self
        self.sums: list[torch.Tensor] = []

    def begin(self, *unused: Any) -> None:
        pass

    def forward(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def section(self, name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def screen(self, loss: torch.Tensor, last: bool) -> torch.Tensor:
        return loss

    def tell(self, sums: torch.Tensor) -> None:
        self.sums.append(sums)

    def agree(self, losses: Any, applied: bool) -> Agreed:
        if len(self.sums) == LOG_EVERY:
            sum_over_ranks(torch.stack(self.sums).sum(dim=0)).tolist()
            self.sums = []
        return Agreed([], applied, None)


class Sums:
    """The losses of a step in place of train.py's watch, the same with and without guards."""

    def losses(self, t: torch.Tensor, *columns: torch.Tensor) -> None:
        self.columns = torch.stack([column.detach().double().sum() for column in columns])

    def before_update(self, wanted: bool) -> None:
        pass

    def take_sums(self) -> torch.Tensor:
        return self.columns


def build(width: str, layers: int, world: Any) -> tuple[Any, Batch]:
    """An engine and one rank's batch, random.

    tiny: the tests' towers, one sample. playground: the shipped towers and micro-batch, as in
    `make quickstart`. real: Wan's width with one block, one sample; its FFN is a fifth of Wan's:
    what fits into 6 GB with AdamW, so that the overhead is not flattered by a longer step.
    full: Wan's width and FFN, `layers` of its 30 blocks, one sample.
    """
    torch.manual_seed(0)
    if width == "tiny":
        config = AVFullDiTConfig(task="t2av", video=TINY_VIDEO, audio=TINY_AUDIO,
                                 num_joint_blocks=2, **RATES)
        latents, sound, rows, text = (48, 3, 4, 4), (12, 6), 16, (32, 32)
    elif width == "playground":
        config = AVFullDiTConfig(task="t2av", video=VIDEO, audio=AUDIO, num_joint_blocks=4, **RATES)
        latents, sound, rows, text = (VIDEO.in_channels, 13, 4, 6), (64, 16), 64, (96, 64)
    else:
        narrow = {"num_layers": 1, "ffn_dim": 3072} if width == "real" else {"num_layers": layers}
        video = dataclasses.replace(VideoDiTConfig(), **narrow)
        config = AVFullDiTConfig(task="t2v", video=video, audio=None, num_joint_blocks=1, **RATES)
        latents, sound, rows, text = (48, 2, 8, 8), (12, 6), 64, (4096, 4096)
    size = 4 if width == "playground" else 1
    engine_config = {"train_micro_batch_size_per_gpu": size, "bf16": {"enabled": width in REAL},
                     "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000,
                                           "allgather_bucket_size": 50_000_000}}
    completed = complete_ds_config(engine_config, size * world.world_size, 1.0, world.world_size)
    model = ds.build_sharded(lambda: AVFullDiT(config), completed)
    engine, _ = ds.build_engine(model, set(), ds.OptimizerConfig(), completed)
    return engine, Batch(
        torch.randn(size, *latents), torch.randn(size, *sound), torch.rand(size, *sound),
        torch.ones(size, dtype=torch.bool), torch.ones(size),
        torch.randn(size, rows, text[0]).bfloat16(), torch.randn(size, 64, text[1]).bfloat16(),
        torch.ones(size, 64, dtype=torch.bool), torch.full((size,), 2.0),
        [f"sample {world.rank}-{index}" for index in range(size)],
    )


def one_step(
    engine: Any, batch: Batch, objective: Objective, agreement: Any, step: int
) -> tuple[float, float]:
    """Seconds of wall time, and of CPU time: on a busy machine the second tells more."""
    began, worked = time.perf_counter(), time.process_time()
    with agreement.supervisor.section("data"):
        epoch = step
    train.train_step(engine, step, batch, epoch, objective, {}, agreement, Sums())
    if step % LOG_EVERY == 0 and isinstance(agreement, StepAgreement):
        agreement.straggler.compare(LOG_EVERY)
    return time.perf_counter() - began, time.process_time() - worked


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    generator, values = np.random.default_rng(0), np.array(ratios)
    medians = np.median(generator.choice(values, (4000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def time_sample_check() -> float:
    """Seconds of data.schema.sample_fault for a real sample: 49 frames of 192 x 320."""
    shapes = {"video_latents": (48, 13, 12, 20), "audio_mean": (44, 64), "audio_std": (44, 64)}
    metadata = Metadata(
        fps=24.0, frames=49, height=192, width=320, sample_rate=44100, audio_hop=2048,
        video_temporal_stride=4, video_spatial_stride=16, latents_mean=[], latents_std=[],
        video_latent_shape=list(shapes["video_latents"]), audio_latent_shape=[44, 64],
        video_text_length=512, video_text_width=4096, audio_text_length=64, audio_text_width=1024)
    sample: dict[str, Any] = {key: np.zeros(shape, np.float16) for key, shape in shapes.items()}
    sample |= {"video_text": np.zeros((100, 4096), np.uint16),
               "audio_text": np.zeros((64, 1024), np.uint16)}
    began = time.perf_counter()
    for _ in range(100):
        assert sample_fault(sample, metadata) is None
    return (time.perf_counter() - began) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", choices=("tiny", "playground", *REAL), default="tiny")
    parser.add_argument("--layers", type=int, default=4, help="with --width full")
    parser.add_argument("--pairs", type=int, default=40, help="of blocks, one with, one without")
    parser.add_argument("--block", type=int, default=10, help="steps")
    arguments = parser.parse_args()
    world = resolve_world(os.environ)
    start(world, 10)
    engine, batch = build(arguments.width, arguments.layers, world)
    objective = Objective("t2v" if arguments.width in REAL else "t2av", 0,
                          FlowConfig(caption_dropout=0.0))
    with tempfile.TemporaryDirectory() as folder, Supervisor(
            {"run_dir": folder}, WatchdogConfig(), world) as supervisor:
        Path(folder, "config").mkdir(exist_ok=True)
        agreement = StepAgreement(
            supervisor, GuardConfig(max_skips=10**9), 0, None, engine.device)
        modes: dict[str, Any] = {"with": agreement, "without": Without()}
        step = 0
        means: dict[str, list[list[float]]] = {name: [] for name in modes}
        for pair in range(-1, arguments.pairs):  # the first pair warms up
            for name in sorted(modes, reverse=pair % 2 == 0):
                times = []
                for _ in range(arguments.block):
                    step += 1
                    times.append(one_step(engine, batch, objective, modes[name], step))
                if pair >= 0:
                    columns = zip(*times, strict=True)
                    means[name].append([statistics.median(column) for column in columns])
    if world.is_main:
        count = ds.count_parameters(engine.module.parameters())
        print(f"{arguments.width}: {count:,} parameters, {world.world_size} ranks, "
              f"{arguments.pairs} pairs of blocks of {arguments.block} steps")
        for column, kind in enumerate(("wall", "CPU")):
            both = [[block[column] for block in means[name]] for name in ("with", "without")]
            middle, low, high = interval([a / b for a, b in zip(*both, strict=True)])
            print(f"  {kind:4s} {1000 * statistics.median(both[0]):9.2f} ms a step with, "
                  f"{1000 * statistics.median(both[1]):9.2f} without; overhead "
                  f"{100 * (middle - 1):+.2f} % [{100 * (low - 1):+.2f}, "
                  f"{100 * (high - 1):+.2f}]", flush=True)
        print(f"  sample_fault {1000 * time_sample_check():.2f} ms a sample (loader's worker)")
    shutdown()


if __name__ == "__main__":
    main()
