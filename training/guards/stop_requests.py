"""Reasons to stop or to save outside the plan: a signal, a file in the run directory, the clock.

Slurm sends SIGUSR1 ahead of a time limit and SIGTERM before it preempts, to any or all ranks, and
more than once. A handler here only counts; what any one rank knows travels with the step's own
gather as a vote (`Requests.votes`), so that all ranks stop after the same step: the one in hand, or
the next if this one's losses were known. A new reason is one more vote: `votes`, `stop_reason` and
StepAgreement.agree name them in one order, and Supervisor.finish says which are requeued. `votes`
runs at every step, so it must not wait. Called by train.py, before the loader's workers are.
"""

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
STOP_FILE = "file STOP"
SAFETY_SECONDS = 60.0  # beyond the measured times: exit, a slow file system
UNMEASURED_SAVE_SECONDS = 120.0
FILE_POLL_SECONDS = 1.0  # a shared file system is not asked at every step


class Requests:
    """What this rank has been asked for.

    Args:
        run_dir: where rank 0 looks for the files STOP and SAVE; None on the other ranks.
        environ: SLURM_JOB_END_TIME, seconds since 1970, is when Slurm ends the job.
    """

    def __init__(self, run_dir: Path | None, environ: Mapping[str, str]) -> None:
        self.run_dir = run_dir
        self.received = 0
        end = environ.get("SLURM_JOB_END_TIME", "")
        self.end_time = float(end) if end.isdigit() else None
        self.longest: dict[str, float] = {"checkpoint": UNMEASURED_SAVE_SECONDS}
        self.looked = -FILE_POLL_SECONDS
        self.previous: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in STOP_SIGNALS
        }

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def close(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def took(self, what: str, seconds: float) -> None:
        """Tell how long a checkpoint, validation or step took; the time budget keeps room."""
        guessed = self.longest.get(what) == UNMEASURED_SAVE_SECONDS
        self.longest[what] = seconds if guessed else max(seconds, self.longest.get(what, 0.0))

    def time_is_up(self) -> bool:
        """Whether two more steps, a validation and two saves no longer fit before the job's end.

        Two steps: asked in the middle of one, and if it says no, next in the middle of another.
        """
        return self.end_time is not None and time.time() + self.reserve() >= self.end_time

    def reserve(self) -> float:
        """Seconds to keep before the end."""
        again = self.longest["checkpoint"] + self.longest.get("step", 0.0)
        return SAFETY_SECONDS + sum(self.longest.values()) + again

    def votes(self) -> list[float]:
        """[signal, time, STOP file, SAVE file], each 0 or 1, to be summed over the ranks."""
        stop = save = False
        if self.run_dir is not None and time.monotonic() - self.looked >= FILE_POLL_SECONDS:
            self.looked = time.monotonic()
            stop, save = (self.run_dir / "STOP").exists(), (self.run_dir / "SAVE").exists()
        return [float(bool(flag)) for flag in (self.received, self.time_is_up(), stop, save)]

    def clear(self, name: str) -> None:
        """Remove a request file that has been served, so that it is served once."""
        if self.run_dir is not None:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.run_dir / name)


def stop_reason(votes: Sequence[float]) -> str | None:
    """Why all ranks stop now, from the summed votes; None to go on."""
    reasons = ("signal", "time limit", STOP_FILE)
    return next((why for why, count in zip(reasons, votes, strict=False) if count), None)
