"""What a run says: one console line per log step, TensorBoard, and `metrics.jsonl`.

The jsonl is the record of truth: one object per step and kind (training, health, validation) at
most, never one twice, also after a resume. TensorBoard is drawn from the same numbers. Only rank 0
writes. A disk that is full at a start ends it; one that fills up later costs a warning.
training.metrics.tags explains each tag.
"""

import math
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.durations import as_clock
from common.files import append_lines, keep_lines_before, mend_last_line, read_lines, write_json
from training.metrics.tensorboard import Events

NO_STEP = ("checkpoint", "validation", "sampling")  # phases between steps
VALIDATION_LOSSES = ("validation/loss_video", "validation/loss_audio")


class MetricWriter:
    """Scalars of one run.

    Args:
        run_dir: the run directory; None on the ranks that do not write.
        first_step: records of earlier starts from this step on are dropped, and what was measured
            and drawn there, because a resumed run does those steps again. None: it trains nothing,
            and all stay.
        max_steps: where the bar ends, which is shown on a terminal only.
    """

    def __init__(self, run_dir: Path | None, first_step: int | None, max_steps: int = 0) -> None:
        self.run_dir, self.max_steps = run_dir, max_steps
        self.bar: Any = None
        self.waiting: list[dict[str, Any]] = []  # records that a full disk did not take
        if run_dir is None:
            return
        self.path = run_dir / "metrics.jsonl"
        if first_step is None:
            mend_last_line(self.path)
        else:
            keep_lines_before(self.path, first_step)
            drop_steps_from(run_dir, first_step)
        self.events = Events(run_dir / "tb", first_step)
        self.fresh = first_step == 0
        if sys.stdout.isatty() and max_steps and first_step is not None:
            self.bar = tqdm(total=max_steps, initial=max(first_step - 1, 0), unit="step",
                            dynamic_ncols=True, file=sys.stdout)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One record of tag -> value at a step; a value that is not a number is left out."""
        if self.run_dir is None:
            return
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        self.waiting.append({"step": step, **finite})
        try:
            append_lines(self.path, self.waiting)
            self.waiting = []
        except OSError as error:
            if len(self.waiting) == 1:
                print(f"warning: {self.path} cannot be written ({error}); tried again at every "
                      "log step", file=sys.stderr, flush=True)
        self.events.scalars(step, finite)

    def step(
        self, step: int, values: dict[str, float], clock: "Clock", ranks: str = "",
    ) -> None:
        """One training step: its scalars, and its line on the console."""
        if self.run_dir is None:
            return
        self.scalars(step, values)
        losses = "  ".join(f"{part} {values[f'train/loss_{part}']:.4f}"
                           for part in ("video", "audio") if f"train/loss_{part}" in values)
        mfu = f"  mfu {values['throughput/mfu']:.1%}" if "throughput/mfu" in values else ""
        self.say(
            f"step {step}/{self.max_steps}  loss {values['train/loss']:.4f}  {losses}  "
            f"grad {values.get('train/grad_norm', math.nan):.3f}"
            f"{' clipped' if values.get('train/clipped') else ''}  lr {values['train/lr']:.2e}  "
            f"{values['time/step_seconds']:.2f} s/step{mfu}  "
            f"eta {clock.eta(self.max_steps - step)}  {ranks}".rstrip()
        )
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def validation(self, step: int, values: dict[str, float], recorded: bool = False) -> None:
        """Validation losses: a record of their own, unless they are ``recorded``, and a line."""
        if self.run_dir is None:
            return
        if not recorded:
            self.scalars(step, values)
        losses = "  ".join(
            f"{tag.removeprefix('validation/loss_')} {values[tag]:.4f} "
            f"+- {values[tag.replace('/loss', '/stderr')]:.4f}"
            for tag in values if tag.startswith("validation/loss_"))
        self.say(f"step {step}/{self.max_steps}  validation  {losses}")

    def validated(self, step: int) -> bool:
        """Whether a step's validation losses are on record; rank 0 alone knows."""
        if self.run_dir is None:
            return False
        return any(record["step"] == step for record in read_records(self.run_dir)
                   if VALIDATION_LOSSES[0] in record)

    def say(self, message: str) -> None:
        """A line for people; flushed, because jobs write to files."""
        if self.run_dir is None:
            return
        if self.bar is not None:
            self.bar.write(message, file=sys.stdout)
        else:
            print(message, file=sys.stdout, flush=True)

    def record(self, step: int, resolved: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """What was resolved and run, as RUN/config/NAME.json and as TensorBoard text.

        Args:
            step: the first one of this start, so that the text of every start stays readable.
            resolved: "run" holds the settings by which the HParams tab distinguishes runs.
            start: more to read, without a file here.
        """
        if self.run_dir is None:
            return
        (self.run_dir / "config").mkdir(exist_ok=True)
        for name, values in resolved.items():
            write_json(self.run_dir / "config" / f"{name}.json", values)
        for name, values in {**resolved, **start}.items():
            self.events.text(step, f"config/{name}", values)
        if self.fresh:
            absent = {
                "audio": resolved["run"]["task"] == "t2v",
                "attention": resolved["model"]["fusion"] == "cross",
                "mfu": start["environment"]["peak"]["bf16_tflops"] is None,
            }
            self.events.begin(resolved["run"], self._metrics(resolved["run"]),
                              [part for part, never in absent.items() if never])

    def _metrics(self, run: Mapping[str, Any]) -> list[str]:
        return list(VALIDATION_LOSSES if run["task"] == "t2av" else VALIDATION_LOSSES[:1])

    def close(self, step: int, run: Mapping[str, Any]) -> None:
        if self.run_dir is None:
            return
        if step >= self.max_steps:
            self.events.end(step, run, self._metrics(run))
        self.events.close()
        if self.bar is not None:
            self.bar.close()


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return read_lines(run_dir / "metrics.jsonl")


def drop_steps_from(run_dir: Path, first_step: int) -> None:
    """Delete validation rows and samples of `first_step` and later; warns of what is left.

    Only by the names that training gives: those of tools.sample and of copies stay.
    """
    for path in (*(run_dir / "validation").glob("step*"), *(run_dir / "samples").glob("step*")):
        name = re.fullmatch(r"step([0-9]+)(\.jsonl)?", path.name)
        if not name or int(name[1]) < first_step:
            continue
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            print(f"warning: {path} is of an abandoned step and cannot be deleted: {error}",
                  file=sys.stderr, flush=True)


class Clock:
    """Step time and time left, from a moving average that forgets the slow first steps."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.average: float | None = None
        self.away, self.steps = 0.0, 0  # seconds between the steps, once the first ones are done

    def tick(self, steps: int = 1, spent: Mapping[str, float] | None = None) -> float:
        """Seconds per step since the last tick, less what was ``spent`` on work that is none."""
        now = time.perf_counter()
        away = sum((spent or {}).get(phase, 0.0) for phase in NO_STEP)
        seconds = (now - self.last - away) / steps
        self.last = now
        if self.average is not None:  # a start's own validation and samples do not come again
            self.away, self.steps = self.away + away, self.steps + steps
        self.average = seconds if self.average is None else 0.9 * self.average + 0.1 * seconds
        return seconds

    def eta(self, steps_left: int) -> str:
        """Time to the end, with saves, validation and samples as often as so far."""
        beside = self.away / max(self.steps, 1)
        return as_clock(((self.average or 0.0) + beside) * steps_left)
