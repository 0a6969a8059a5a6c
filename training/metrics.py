"""What a run says: one console line per log step, TensorBoard scalars, and `metrics.jsonl`.

The jsonl is the record of truth: a training and a held-out object per step at most, never one
twice, also after a resume.
TensorBoard is drawn from the same numbers. Only rank 0 writes.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from training.run_dir import keep_lines_before, write_json


class MetricWriter:
    """Scalars of one run.

    Args:
        run_dir: the run directory; None on the ranks that do not write.
        first_step: first step of this process; older records beyond it are dropped, because a
            resumed run does those steps again.
    """

    def __init__(self, run_dir: Path | None, first_step: int) -> None:
        self.run_dir = run_dir
        if run_dir is None:
            return
        self.path = run_dir / "metrics.jsonl"
        keep_lines_before(self.path, first_step)
        self.tensorboard = SummaryWriter(str(run_dir / "tb"), purge_step=first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One record of tag -> value at a step."""
        if self.run_dir is None:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tag, value in values.items():
            self.tensorboard.add_scalar(tag, value, step)

    def step(
        self, step: int, max_steps: int, values: dict[str, float], seconds: float, clock: "Clock",
        ranks: str = "",
    ) -> None:
        """One training step: its scalars, and its line on the console."""
        self.scalars(step, values | {"time/step_seconds": seconds})
        losses = "  ".join(f"{tag.removeprefix('train/loss_')} {value:.4f}"
                           for tag, value in values.items() if tag.startswith("train/loss_"))
        self.say(
            f"step {step}/{max_steps}  loss {values['train/loss']:.4f}  {losses}  "
            f"grad {values.get('train/grad_norm', math.nan):.3f}  lr {values['train/lr']:.2e}  "
            f"{seconds:.2f} s/step  eta {clock.eta(max_steps - step)}  {ranks}".rstrip()
        )

    def held_out(self, step: int, max_steps: int, values: dict[str, float]) -> None:
        """Held-out losses: a record of their own, and a line."""
        self.scalars(step, values)
        losses = "  ".join(f"{tag.split('/')[1][5:]} {value:.4f}" for tag, value in values.items())
        self.say(f"step {step}/{max_steps}  held-out  {losses}")

    def validated(self, step: int) -> bool:
        """Whether a step's held-out losses are on record; rank 0 alone knows."""
        if self.run_dir is None or not self.path.exists():
            return False
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return any(json.loads(line)["step"] == step for line in lines if '"validation/' in line)

    def say(self, message: str) -> None:
        """A line for people; flushed, because jobs write to files."""
        if self.run_dir is not None:
            print(message, file=sys.stdout, flush=True)

    def record(self, resolved: Mapping[str, dict]) -> None:
        """What was resolved and run, as RUN/config/NAME.json and as TensorBoard text."""
        if self.run_dir is None:
            return
        (self.run_dir / "config").mkdir(exist_ok=True)
        for name, values in resolved.items():
            write_json(self.run_dir / "config" / f"{name}.json", values)
            text = json.dumps(values, indent=1, ensure_ascii=False)
            self.tensorboard.add_text(f"config/{name}", f"```\n{text}\n```")

    def close(self) -> None:
        if self.run_dir is not None:
            self.tensorboard.close()


class Clock:
    """Step time and time left, from a moving average that forgets the slow first steps."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.average: float | None = None

    def tick(self, steps: int = 1) -> float:
        """Seconds per step since the last tick."""
        now = time.perf_counter()
        seconds = (now - self.last) / steps
        self.last = now
        self.average = seconds if self.average is None else 0.9 * self.average + 0.1 * seconds
        return seconds

    def restart(self) -> None:
        """Count anew, after work that is not a training step."""
        self.last = time.perf_counter()

    def eta(self, steps_left: int) -> str:
        return format_seconds((self.average or 0.0) * steps_left)


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def peak_memory_gib(device: torch.device) -> float:
    """Peak device memory since start, in GiB; on a CPU 0."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
