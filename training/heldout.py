"""Held-out loss that two runs can be compared by: fixed samples, fixed t, fixed noise.

Every sample meets the same t and noise at every step, in t2av and t2v, with raw and averaged
weights; batches are the same on any number of ranks, so the numbers are too. Each sample's losses
go into a file, because a difference of two runs is far less noisy per sample than in the mean:

    RUN/validation/step00000500.jsonl   {"id", "weights": "raw" | "ema", "t", "video", "audio"}
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

from training.attempt import Attempt
from training.distributed import World, gather_objects, sum_over_ranks
from training.run_dir import write_text

Losses = tuple[Tensor, Tensor, Tensor]  # video and audio loss, and whether it has sound, (B,) each


class Row(NamedTuple):
    """One held-out sample."""

    id: str
    video: list[float]  # per t
    audio: list[float] | None  # None: a t2v run, or a clip without sound


@torch.no_grad()
def measure(
    engine: deepspeed.DeepSpeedEngine, shares: Iterable[tuple[Any, Tensor]],
    losses_at: Callable[[Any, float], Losses], t: tuple[float, ...], sound: bool, world: World,
    on_batch: Callable[[], None],
) -> list[Row]:
    """Every sample's losses, sorted by id, the same list on every rank.

    Args:
        shares: this rank's (batch, which of its samples are real), as many on every rank.
        sound: whether audio losses mean anything.
        on_batch: called before each batch, for whoever watches the time.

    Raises:
        AttemptError: on every rank, when a forward failed on any.
    """
    mine: list[Row] = []
    attempt = Attempt(world, engine.zero_optimization_stage() == 3)
    engine.eval()
    try:
        for batch, real in shares:
            on_batch()
            with attempt.part():
                videos, audios, heard = zip(*(losses_at(batch, value) for value in t), strict=True)
                video, audio = (torch.stack(parts, dim=1).tolist() for parts in (videos, audios))
                mine += [
                    Row(batch.sample_ids[i], video[i], audio[i] if sound and has else None)
                    for i, has in enumerate(heard[0].tolist()) if real[i]
                ]
    finally:
        engine.train()
    attempt.settle()
    return sorted(row for part in gather_objects(mine, world) for row in part)


def summarise(rows: list[Row], t: tuple[float, ...], suffix: str = "") -> dict[str, float]:
    """Scalars of one set of weights; the standard error is over samples, of their means over t."""
    values: dict[str, float] = {}
    for modality in ("video", "audio"):
        losses = [getattr(row, modality) for row in rows if getattr(row, modality) is not None]
        if not losses:
            continue
        means = [math.fsum(sample) / len(t) for sample in losses]
        count, mean = len(means), math.fsum(means) / len(means)
        spread = math.fsum((x - mean) ** 2 for x in means)
        values[f"validation/loss_{modality}{suffix}"] = mean
        values[f"validation/stderr_{modality}{suffix}"] = math.sqrt(
            spread / max(count - 1, 1) / count)
        for value, column in zip(t, zip(*losses, strict=True), strict=True):
            name = f"validation_t/{modality}{suffix}/{value:.2f}"
            values[name] = math.fsum(column) / count
    return values


def write_rows(run_dir: Path, step: int, rows: dict[str, list[Row]], t: tuple[float, ...]) -> None:
    """The step's file: ``rows`` by weights, "raw" and "ema"."""
    folder = run_dir / "validation"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"id": row.id, "weights": weights, "t": t, "video": row.video,
                         "audio": row.audio})
             for weights, part in rows.items() for row in part]
    write_text(folder / f"step{step:08d}.jsonl", "\n".join(lines) + "\n")


def read_rows(run_dir: Path, step: int, weights: str = "raw") -> dict[str, dict[str, Any]]:
    """Sample id -> its line of a step's file."""
    text = (run_dir / "validation" / f"step{step:08d}.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["id"]: line for line in lines if line["weights"] == weights}


@torch.no_grad()
def look_inside(
    engine: deepspeed.DeepSpeedEngine, gauges: Any, shares: Iterable[tuple[Any, Tensor]],
    forward: Callable[[Any], Any], world: World,
) -> dict[str, float]:
    """Means over held-out samples of every gauge (model.gauges.Gauges); a collective."""
    attempt = Attempt(world, engine.zero_optimization_stage() == 3)
    engine.eval()
    try:
        for batch, real in shares:
            with attempt.part(), gauges.on(real):
                forward(batch)
    finally:
        engine.train()
    attempt.settle()
    names = sorted(gauges.sums)
    sums = torch.stack([gauges.sums[name] for name in names]).to(engine.device)
    return {name: total / count for name, (total, count) in
            zip(names, sum_over_ranks(sums).tolist(), strict=True) if count}
