"""Console output between steps: a budget at the start, a summary at the end, a log per rank.

Called by train.py.
"""

import contextlib
import io
import math
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from common.durations import as_clock, in_words
from common.ranks import World
from training.checkpoint.run_dir import tags_in
from training.metrics.writer import NO_STEP, read_records

RECENT = 50  # records from which the time of a step is taken


class Tee(io.TextIOBase):
    """A stream whose text goes into a file too. What neither takes is lost: no word ends a run."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        for one in (self.file, self.stream):
            with contextlib.suppress(OSError, ValueError):  # a full disk, a file closed at exit
                if one is self.stream or not text.startswith("\r"):  # a bar that repaints itself
                    one.write(text)
        return len(text)

    def flush(self) -> None:
        for one in (self.file, self.stream):
            with contextlib.suppress(OSError, ValueError):
                one.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


@contextmanager
def rank_log(run_dir: Path, world: World) -> Iterator[None]:
    """What this rank prints, and what ends it, also into RUN/logs/rankNNNNN.log."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / f"rank{world.rank:05d}.log", "a", buffering=1, encoding="utf-8")
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Tee(stream, file) for stream in kept)  # type: ignore[assignment]
    try:
        with contextlib.suppress(OSError):
            file.write(f"--- start {time.strftime('%Y-%m-%dT%H:%M:%S%z')}, pid {os.getpid()}, "
                       f"rank {world.rank} of {world.world_size}\n")
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what was raised matters more
            traceback.print_exc(file=file)
        raise
    finally:
        sys.stdout, sys.stderr = kept
        with contextlib.suppress(OSError):  # it tries once more to write what a full disk refused
            file.close()


def budget(
    run_dir: Path, step: int, max_steps: int, keep: int, parameters: int, averaged: bool,
    environ: Mapping[str, str],
) -> str:
    """One line: hours to the end against the job's limit, checkpoints against the disk.

    Args:
        keep: checkpoints that stay; one more is there while the next is written.
        parameters, averaged: for the size of a checkpoint before there is one: fp32 weights, two
            moments and, if averaged, the average.
    """
    timed = [record for record in _records(run_dir) if "time/step_seconds" in record][-RECENT:]
    to_go = max(0, max_steps - step)  # a run may be resumed with fewer steps than it has done
    words = f"budget: {to_go} steps to go"
    end = environ.get("SLURM_JOB_END_TIME", "")
    allowed = max(float(end) - time.time(), 1.0) if end.isdigit() else None
    if timed:
        # The first one holds a start's slow first step.
        each = statistics.median(record["time/step_seconds"] for record in timed[1:] or timed)
        beside = _seconds_beside(timed)
        left = (each + beside) * to_go
        more = f" and {beside:.2f} s for saves, validation and samples" if beside else ""
        words += f" at {each:.2f} s{more}, {in_words(left)}"
        if allowed is not None:
            words += f" of the {in_words(allowed)} that this job has left"
            if left > allowed:
                words += f", about {math.ceil(left / allowed) - 1} requeues"
    elif allowed is not None:
        words += f"; this job has {in_words(allowed)} left"
    try:
        saved = tags_in(run_dir)
        size = sum(file.stat().st_size for file in saved[-1].iterdir()) if saved else (
            parameters * 4 * (4 if averaged else 3))
        fit = int(shutil.disk_usage(run_dir).free / max(size, 1))
    except OSError as error:  # a save says more; this is a line to read
        return words + f"; what fits the disk is not known: {error}"
    wanted = max(0, keep + 1 - len(saved))
    words += f"; a checkpoint takes {size / 1e9:.2f} GB, {fit} more fit the disk"
    return words + ("" if fit >= wanted else f", {wanted} are wanted: make room")


def _records(run_dir: Path) -> list[dict[str, Any]]:
    """A run's records; a file that cannot be read leaves words out and ends nothing."""
    try:
        return read_records(run_dir)
    except (OSError, ValueError) as error:
        print(f"warning: {run_dir}/metrics.jsonl cannot be read: {error}", file=sys.stderr,
              flush=True)
        return []


def _seconds_beside(timed: list[dict[str, Any]]) -> float:
    """Per step, of the work between steps; the first record may hold a start's own."""
    steps = timed[-1]["step"] - timed[0]["step"]
    spent = sum(record.get(f"time/{phase}_seconds", 0.0) for record in timed[1:]
                for phase in NO_STEP)
    return spent / steps if steps > 0 else 0.0


def summary(
    run_dir: Path, ended: str, seconds: float, trained: str, spent: Mapping[str, float],
) -> str:
    """What was trained, its best and last losses, and where everything is.

    Args:
        trained: the task and the model's size, in words.
        spent: seconds per phase since the last record, which no record holds.
    """
    records = _records(run_dir)
    lines = [f"{ended} after {as_clock(seconds)}; run directory {run_dir}", f"  {trained}"]
    last = next((record for record in reversed(records) if "train/loss" in record), None)
    if last:
        parts = "  ".join(f"{tag.removeprefix('train/loss_')} {last[tag]:.4f}"
                          for tag in ("train/loss_video", "train/loss_audio") if tag in last)
        lines.append(f"  training loss at step {last['step']}: {last['train/loss']:.4f}  {parts}"
                     + (f"  after {last['train/samples_seen']:.0f} samples"
                        if "train/samples_seen" in last else ""))
    if any(spent.get(phase) for phase in NO_STEP):
        lines.append("  after the last record: " + ", ".join(
            f"{phase} {spent[phase]:.1f} s" for phase in NO_STEP if spent.get(phase)))
    for tag in dict.fromkeys(tag for record in records for tag in record
                             if tag.startswith("validation/loss_")):
        found = {record["step"]: record[tag] for record in records if tag in record}
        best = min(found, key=lambda step: found[step])
        lines.append(f"  validation {tag.removeprefix('validation/loss_'):10s} first "
                     f"{found[min(found)]:.4f}  last {found[max(found)]:.4f}  "
                     f"best {found[best]:.4f} at step {best}")
    places: dict[str, Any] = {
        "curves": run_dir / "tb", "numbers": run_dir / "metrics.jsonl",
        "validation": run_dir / "validation", "checkpoints": run_dir / "checkpoints",
        "samples": run_dir / "samples" / "index.html", "logs": run_dir / "logs",
    }
    lines += [f"  {name:11s} {place}" for name, place in places.items() if os.path.exists(place)]
    return "\n".join([*lines, f"  to share      python -m tools.report {run_dir}"])
