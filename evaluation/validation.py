"""Validation loss that two runs can be compared by: fixed samples, fixed t, fixed noise.

Every sample has the same t and noise at every step, in t2av and t2v, with raw and averaged
weights; batches are the same on any number of ranks, so the numbers are too. Each sample's losses
go into a file, because a difference of two runs is far less noisy per sample than in the mean:

    RUN/validation/step00000500.jsonl   {"id", "weights": "raw" | "ema", "t", "video", "audio"}
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.files import read_lines, write_lines
from common.ranks import World, gather_objects, sum_over_ranks
from training.guards.optional import Attempt

Losses = tuple[Tensor, Tensor, Tensor]  # video and audio loss, and whether it has sound, (B,) each


class Row(NamedTuple):
    """One validation sample."""

    id: str
    video: list[float]  # per t
    audio: list[float] | None  # None: a t2v run, or a clip without sound


@torch.no_grad()
def measure(
    engine: Any, shares: Iterable[tuple[Any, Tensor]],
    losses_at: Callable[[Any, float], Losses], t: tuple[float, ...], sound: bool, world: World,
    on_batch: Callable[[], None],
) -> list[Row]:
    """Every sample's losses, sorted by id, the same list on every rank.

    Args:
        shares: this rank's (batch, which of its samples are real), as many on every rank.
        sound: whether audio losses mean anything.
        on_batch: called before each batch, for the watchdog.

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
    # Two streams may hold one id, with and without sound: None has no order among losses.
    return sorted((row for part in gather_objects(mine, world) for row in part),
                  key=lambda row: (row.id, row.video, row.audio or []))


def summarise(rows: list[Row], t: tuple[float, ...], suffix: str = "") -> dict[str, float]:
    """Scalars of one set of weights; the standard error is over samples, of their means over t."""
    values: dict[str, float] = {}
    for modality in ("video", "audio"):
        losses = [getattr(row, modality) for row in rows if getattr(row, modality) is not None]
        if not losses:
            continue
        means = [math.fsum(sample) / len(t) for sample in losses]
        values[f"validation/loss_{modality}{suffix}"] = math.fsum(means) / len(means)
        values[f"validation/stderr_{modality}{suffix}"] = standard_error(means)
        for value, column in zip(t, zip(*losses, strict=True), strict=True):
            name = f"validation_t/{modality}{suffix}/{value:.2f}"
            values[name] = math.fsum(column) / len(column)
    return values


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for a single one."""
    count, mean = len(values), math.fsum(values) / len(values)
    spread = math.fsum((x - mean) ** 2 for x in values)
    return math.sqrt(spread / max(count - 1, 1) / count)


def write_rows(run_dir: Path, step: int, rows: dict[str, list[Row]], t: tuple[float, ...]) -> None:
    """The step's file: ``rows`` by weights, "raw" and "ema"."""
    folder = run_dir / "validation"
    folder.mkdir(exist_ok=True)
    write_lines(folder / f"step{step:08d}.jsonl", [
        {"id": row.id, "weights": weights, "t": t, "video": row.video, "audio": row.audio}
        for weights, part in rows.items() for row in part])


def read_step(run_dir: Path, step: int, weights: str = "raw") -> list[dict[str, Any]]:
    """Every line of a step's file."""
    lines = read_lines(run_dir / "validation" / f"step{step:08d}.jsonl", whole=True)
    return [line for line in lines if line["weights"] == weights]


def read_rows(run_dir: Path, step: int, weights: str = "raw") -> dict[str, dict[str, Any]]:
    """Sample id -> its line of a step's file; without `repeated_ids`, whose lines look alike."""
    repeated = repeated_ids(run_dir, step)
    return {line["id"]: line for line in read_step(run_dir, step, weights)
            if line["id"] not in repeated}


def repeated_ids(run_dir: Path, step: int) -> set[str]:
    """Ids of more than one sample: two streams have it, or a substitute stood in for a bad one."""
    counts = Counter(line["id"] for line in read_step(run_dir, step))
    return {name for name, count in counts.items() if count > 1}


def spread_by_t(run_dir: Path, step: int, modality: str) -> dict[str, float]:
    """t, spelled as in validation_t/{modality}/{t} -> standard error over the step's samples.

    Empty without losses, or without the file, which a full disk may not have taken.
    """
    try:
        lines = [line for line in read_step(run_dir, step) if line[modality]]
    except FileNotFoundError:
        return {}
    columns = zip(*(line[modality] for line in lines), strict=True)
    return {f"{t:.2f}": standard_error(column)
            for t, column in zip(lines[0]["t"] if lines else (), columns, strict=True)}


@torch.no_grad()
def look_inside(
    engine: Any, gauges: Any, shares: Iterable[tuple[Any, Tensor]],
    forward: Callable[[Any], Any], world: World,
) -> dict[str, float]:
    """Means over validation samples of every gauge (evaluation.gauges.Gauges); a collective."""
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
