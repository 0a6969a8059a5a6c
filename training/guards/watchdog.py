"""A thread per rank that ends a run which no longer moves, with the stacks of all ranks.

A worker stuck in I/O, a dead peer, a lock taken by a fork: nothing raises, and Slurm pays until
the time limit. Each phase of the loop has a budget; a rank that overruns it writes its stacks to
the failure folder and raises the alarm there, the watchdogs of the other ranks follow, and the
process exits with 76, also where the disk of the run directory is full or hangs: that is what many
a hang is, and nothing that touches it may keep the process. Called by train.py.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from common.settings import STRICT
from training.guards.failure_report import Failure

EXIT_CODE = 76
POLL_SECONDS = 2.0
END_SECONDS = 8.0  # for the stacks of all ranks, whatever becomes of the disk they go to


@dataclass(frozen=True, config=STRICT)
class WatchdogConfig:
    """Seconds that one turn of a section may take on a rank; .inf for no limit."""

    start: Annotated[float, Field(
        gt=0, description="Build, weights or checkpoint, self-check.")] = 7200.0
    data: Annotated[float, Field(gt=0, description="One batch.")] = 900.0
    compute: Annotated[float, Field(gt=0, description="One step; the first one compiles.")] = 900.0
    checkpoint: Annotated[float, Field(gt=0, description="One checkpoint.")] = 3600.0
    validation: Annotated[float, Field(gt=0, description="One validation batch.")] = 900.0
    sampling: Annotated[float, Field(
        gt=0, description="One clip, or the decoding of a rank's share.")] = 1800.0


class Watchdog:
    """Budgets for the phases that `enter` names; leaves with the context."""

    def __init__(self, budgets: WatchdogConfig, failure: Failure) -> None:
        self.budgets, self.failure = budgets, failure
        self.now: tuple[str, int] = ("start", 0)  # replaced as a whole: needs no lock
        self.stopped = threading.Event()
        self.ending = threading.Lock()
        # Two, because reading an alarm from a disk that hangs never returns.
        self.threads = [threading.Thread(target=part, name=part.__name__, daemon=True)
                        for part in (self._watch, self._listen)]

    def enter(self, phase: str) -> None:
        """A new turn of a phase begins now."""
        self.now = (phase, self.now[1] + 1)

    def __enter__(self) -> "Watchdog":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        if any(raised) and self.ending.locked():
            # The first rank to end broke the call that this one hung in: its own alarm stands.
            traceback.print_exception(raised[1])  # it may be an error of its own, too
            sys.stderr.flush()
            time.sleep(END_SECONDS + 1)
        self.stopped.set()

    def _watch(self) -> None:
        seen, spent, before = self.now, 0.0, time.monotonic()
        while not self.stopped.wait(POLL_SECONDS):
            now, turn = time.monotonic(), self.now
            if turn != seen:
                seen, spent = turn, 0.0
            # A suspended job (SIGSTOP, a laptop's lid) wakes up late; that was no hang.
            spent += min(now - before, 2 * POLL_SECONDS)
            before = now
            budget = getattr(self.budgets, seen[0])
            if spent > budget:
                self._end(EXIT_CODE, f"phase '{seen[0]}' took more than watchdog.{seen[0]}="
                                     f"{budget:g} seconds")

    def _listen(self) -> None:
        while not self.stopped.wait(POLL_SECONDS):
            alarm = self.failure.read_alarm()
            if alarm:
                self._end(alarm[0], f"follows {alarm[1]}")

    def _end(self, code: int, reason: str) -> None:
        if not self.ending.acquire(blocking=False):
            return
        bound = threading.Timer(END_SECONDS, os._exit, (code,))
        bound.daemon = True
        bound.start()
        where = f"stacks of all ranks, last batch, memory and configuration are in " \
                f"{self.failure.folder}"
        try:
            self.failure.write(reason, code, self.now[0])
        except OSError as error:
            where = f"nothing could be written of it: {error}"
        if self.stopped.is_set():  # it moved after all while the stacks were written
            bound.cancel()
            return
        print(f"error: rank {self.failure.world.rank}: {reason}; {where}", file=sys.stderr,
              flush=True)
        with contextlib.suppress(OSError):
            self.failure.wait_for_others()
        os._exit(code)
