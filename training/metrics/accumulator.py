"""What is measured between two records: losses by t, work done, time, norms, memory.

A step's sums ride on the one gather that every step has anyway; norms are read at the steps
that are logged. Nothing here draws a random number or touches a gradient. Called by train.py.
"""

import math
import resource
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

from training.metrics.norms import PartNorms
from training.metrics.writer import NO_STEP

T_BINS = 8
SUMS = ("video", "audio", "samples", "heard")  # columns of the sums by t
WORK = ("flops", "video_tokens", "audio_tokens", "text_tokens")


class Scale(NamedTuple):
    """What the sums of a period are measured against."""

    global_batch_size: int
    loss_weights: tuple[float, ...]  # of video, and of audio in t2av
    clipping: float  # 0: none
    world_size: int
    peak_tflops: float | None  # of one device


class StepAccumulator:
    """The measurements of one run.

    Args:
        work_of: a forward's keyword arguments -> what it and its backward amount to (WORK).
        state: `state()` of the checkpoint that the run goes on from.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, part_norms: PartNorms, scale: Scale,
        work_of: Callable[[Mapping[str, Any]], Sequence[int]], state: dict[str, Any] | None,
    ) -> None:
        self.engine, self.part_norms = engine, part_norms
        self.scale, self.work_of = scale, work_of
        self.work = torch.zeros(len(WORK), dtype=torch.float64)
        self.bins = torch.zeros(T_BINS, len(SUMS), dtype=torch.float64, device=engine.device)
        self.norms: dict[str, float] = {}
        # Over all ranks, since the last record of losses and of health.
        self.period, self.by_t = (torch.zeros(T_BINS, len(SUMS), dtype=torch.float64)
                                  for _ in range(2))
        self.done = torch.zeros(len(WORK), dtype=torch.float64)
        self.counted = self.skipped = 0
        self.here = 0  # steps since the last record that this process did
        if state:
            self.period, self.by_t = (torch.tensor(state[key], dtype=torch.float64)
                                      for key in ("period", "by_t"))
            self.done = torch.tensor(state["done"], dtype=torch.float64)
            self.counted, self.skipped = state["counted"], state["skipped"]
        engine.module.register_forward_pre_hook(self._count, with_kwargs=True)

    def state(self) -> dict[str, Any]:
        """For the checkpoint: a record that a kill has split is whole again after the resume."""
        return {"period": self.period.tolist(), "by_t": self.by_t.tolist(),
                "done": self.done.tolist(), "counted": self.counted, "skipped": self.skipped}

    def _count(self, module: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.work += torch.tensor(self.work_of(inputs), dtype=torch.float64)

    def losses(self, t: Tensor, video: Tensor, audio: Tensor, has_audio: Tensor) -> None:
        """One micro-batch: t, losses and has_audio, (B,) each."""
        place = (t * T_BINS).long().clamp(0, T_BINS - 1).to(video.device)
        columns = torch.stack([
            column.detach().double() for column in (video, audio, torch.ones_like(video), has_audio)
        ], dim=1)  # (B, 4)
        self.bins.index_add_(0, place, columns)

    def before_update(self, wanted: bool) -> None:
        """Between the step's last backward and its update; a collective if ``wanted``."""
        self.norms = self.part_norms.gradient_norms() if wanted else {}

    def take_sums(self) -> Tensor:
        """This rank's sums of the step (n,), to be summed over the ranks."""
        sums = torch.cat([self.bins.flatten(), self.work.to(self.bins.device)])
        self.bins, self.work = torch.zeros_like(self.bins), torch.zeros_like(self.work)
        return sums

    def add(self, sums: Sequence[float], applied: bool) -> None:
        """The step as all ranks know it."""
        self.here += 1
        if not applied:
            self.skipped += 1
            return
        values = torch.tensor(sums, dtype=torch.float64)
        table = values[: self.period.numel()].view_as(self.period)
        self.period, self.by_t = self.period + table, self.by_t + table
        self.done += values[self.period.numel() :]
        self.counted += 1

    def record(
        self, step: int, epoch: int, seconds: float, spent: defaultdict[str, float]
    ) -> dict[str, float]:
        """What is logged of the period that ends with this update; starts the next one.

        Args:
            seconds: per step. spent: seconds per phase of the loop since the last record.
        """
        scale = self.scale
        values = self._losses() | self._norms()
        values |= {
            "train/skipped": float(self.skipped),
            "train/lr": max(group["lr"] for group in self.engine.optimizer.param_groups),
            "train/samples_seen": float(step * scale.global_batch_size),
            "train/epoch": float(epoch),
            "time/step_seconds": seconds,
            "time/compute_seconds": max(0.0, seconds - spent["data"] / max(self.here, 1)),
            "throughput/samples_per_second": scale.global_batch_size / seconds,
        }
        for phase in NO_STEP:
            values[f"time/{phase}_seconds"] = spent[phase]
        flops, *tokens = (self.done / (seconds * self.counted)).tolist()
        for name, rate in zip(WORK[1:], tokens, strict=True):
            values[f"throughput/{name}_per_second"] = rate
        values["throughput/tflops"] = flops / 1e12 / scale.world_size
        if scale.peak_tflops:
            values["throughput/mfu"] = values["throughput/tflops"] / scale.peak_tflops
        self.period, self.done = torch.zeros_like(self.period), torch.zeros_like(self.done)
        self.counted = self.skipped = self.here = 0
        spent.clear()
        return values | memory(self.engine.device)

    def _losses(self) -> dict[str, float]:
        video, audio, samples, heard = self.period.sum(dim=0).tolist()
        means = {"video": video / samples} | ({"audio": audio / heard} if heard else {})
        values, total = {}, 0.0
        for (name, mean), weight in zip(means.items(), self.scale.loss_weights, strict=False):
            values[f"train/loss_{name}"] = mean
            values[f"train/loss_{name}_weighted"] = weight * mean
            total += weight * mean
        return {"train/loss": total} | values

    def _norms(self) -> dict[str, float]:
        total = sum(norm**2 for norm in self.norms.values()) ** 0.5
        values = {f"train/grad_norm_{part}": norm for part, norm in self.norms.items()}
        clipped = 0 < self.scale.clipping < total < math.inf  # not finite: skipped
        return values | {"train/grad_norm": total, "train/clipped": float(clipped)}

    def health_record(self) -> dict[str, float]:
        """Update ratios and training losses by t since the last one; a collective."""
        values = {f"health/update_ratio_{part}": ratio
                  for part, ratio in self.part_norms.update_ratios().items()}
        for index, (video, audio, samples, heard) in enumerate(self.by_t.tolist()):
            name = f"{(index + 0.5) / T_BINS:.2f}"
            if samples:
                values[f"health/loss_video_t/{name}"] = video / samples
            if heard and len(self.scale.loss_weights) > 1:
                values[f"health/loss_audio_t/{name}"] = audio / heard
        self.by_t = torch.zeros_like(self.by_t)
        return values


def memory(device: torch.device) -> dict[str, float]:
    """Peaks since the start of the process, in GiB."""
    values = {"memory/peak_gib": 0.0, "memory/reserved_gib": 0.0}
    if device.type == "cuda":
        values = {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
                  "memory/reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30}
    pages = int(open("/proc/self/statm", encoding="ascii").read().split()[1])
    return values | {"memory/host_rss_gib": pages * resource.getpagesize() / 2**30}
