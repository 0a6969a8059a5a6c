"""What a run says beside its steps: a budget at the start, a summary at the end, a log per rank.

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

from training.distributed import World
from training.metrics import format_seconds, read_records

RECENT = 50  # records from which the time of a step is taken


class Tee(io.TextIOBase):
    """A stream whose text goes into a file too; the file's troubles are its own."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # a full disk, a file closed at exit
            self.file.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.file.flush()
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


@contextmanager
def rank_log(run_dir: Path, world: World) -> Iterator[None]:
    """What this rank prints, and what ends it, also into RUN/logs/rankNNNNN.log."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank{world.rank:05d}.log", "a", buffering=1, encoding="utf-8") as file:
        file.write(f"--- start {time.strftime('%Y-%m-%dT%H:%M:%S%z')}, pid {os.getpid()}, rank "
                   f"{world.rank} of {world.world_size}\n")
        kept = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (Tee(stream, file) for stream in kept)  # type: ignore[assignment]
        try:
            yield
        except BaseException:
            traceback.print_exc(file=file)
            raise
        finally:
            sys.stdout, sys.stderr = kept


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
    recent = [record["time/step_seconds"] for record in read_records(run_dir)
              if "time/step_seconds" in record][-RECENT:]
    to_go = max(0, max_steps - step)  # a run may be resumed with fewer steps than it has done
    words = f"budget: {to_go} steps to go"
    if recent:
        left = statistics.median(recent) * to_go
        need = f"{left / 3600:.1f} h" if left >= 3600 else f"{left / 60:.0f} min"
        words += f" at {statistics.median(recent):.2f} s, {need}"
        end = environ.get("SLURM_JOB_END_TIME", "")
        if end.isdigit():
            allowed = max(float(end) - time.time(), 1.0)
            words += f" of the {allowed / 3600:.1f} h that this job has left"
            if left > allowed:
                words += f", about {math.ceil(left / allowed) - 1} requeues"
    saved = sorted((run_dir / "checkpoints").glob("step*"))
    size = sum(file.stat().st_size for file in saved[-1].iterdir()) if saved else (
        parameters * 4 * (4 if averaged else 3))
    fit = int(shutil.disk_usage(run_dir).free / max(size, 1))
    wanted = max(0, keep + 1 - len(saved))
    words += f"; a checkpoint takes {size / 1e9:.2f} GB, {fit} more fit the disk"
    return words + ("" if fit >= wanted else f", {wanted} are wanted: make room")


def summary(run_dir: Path, ended: str, seconds: float) -> str:
    """What was trained, its best and last losses, and where everything is."""
    records = read_records(run_dir)
    lines = [f"{ended} after {format_seconds(seconds)}; run directory {run_dir}"]
    for tag in dict.fromkeys(tag for record in records for tag in record
                             if tag.startswith("validation/loss_")):
        found = {record["step"]: record[tag] for record in records if tag in record}
        best = min(found, key=lambda step: found[step])
        lines.append(f"  held-out {tag.removeprefix('validation/loss_'):10s} first "
                     f"{found[min(found)]:.4f}  last {found[max(found)]:.4f}  "
                     f"best {found[best]:.4f} at step {best}")
    places: dict[str, Any] = {
        "curves": run_dir / "tb", "numbers": run_dir / "metrics.jsonl",
        "checkpoints": run_dir / "checkpoints", "samples": run_dir / "samples" / "index.html",
        "logs": run_dir / "logs",
    }
    lines += [f"  {name:11s} {place}" for name, place in places.items() if place.exists()]
    return "\n".join([*lines, f"  to share      python -m tools.report {run_dir}"])
