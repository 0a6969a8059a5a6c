"""What guards a run, behind the few calls that the loop makes: see the module of each part.

One small gather per step carries the losses, the guard's loss and the votes to stop or save;
so every rank knows the same at the same step. It travels during the backward pass. Called by
train.py.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.events import append_event, job_name
from common.ranks import World, broadcast_object, start_sum_over_ranks
from common.settings import ConfigError
from training.checkpoint.run_lock import lock_run
from training.guards.bad_numbers import Drawn, Guard, GuardConfig
from training.guards.failure_report import Failure, Last
from training.guards.stop_requests import STOP_FILE, Requests, stop_reason
from training.guards.straggler import Straggler
from training.guards.watchdog import Watchdog, WatchdogConfig
from training.metrics.console import rank_log


class Agreed(NamedTuple):
    """One step as all ranks know it."""

    sums: list[float]  # over all ranks; zero where the update was skipped
    applied: bool  # whether the weights moved
    said: str | None  # a skip or a spike, in words


class Supervisor:
    """A run's guards; a context, left with the folder of failures written if something raised."""

    def __init__(
        self, config: Mapping[str, Any], budgets: WatchdogConfig, world: World,
    ) -> None:
        self.run_dir, self.world = Path(config["run_dir"]), world
        self.requests = Requests(self.run_dir if world.is_main else None, os.environ)
        self.failure = Failure(self.run_dir, config, world)
        self.watchdog = Watchdog(budgets, self.failure)
        # Seconds per section, until they are logged.
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.last_good: Path | None = None
        self.stop: str | None = None  # why, once all ranks have agreed to stop
        self.save = False  # whether all ranks agreed to save now

    def __enter__(self) -> "Supervisor":
        self.watchdog.__enter__()
        self.status("running")
        return self

    def __exit__(self, *raised: Any) -> None:
        self.watchdog.__exit__(*raised)
        if raised[1] is not None:
            with suppress(OSError):  # what was raised matters more
                self.status("failed", reason=f"{raised[0].__name__}: {raised[1]}")
        self.failure.__exit__(*raised)
        self.requests.close()

    def status(self, state: str, **values: Any) -> None:
        if self.world.is_main:
            append_event(self.run_dir, "state", state=state, job=job_name(os.environ),
                         pid=os.getpid(), checkpoint=self.last_good, **values)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """A part of the loop under its own budget; its time is kept for the time budget."""
        self.watchdog.enter(name)
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.spent[name] += seconds
        if name != "data":
            self.requests.took(name, seconds)
        self.watchdog.enter("compute")

    def refuse_too_little_time(self) -> None:
        """Before a start's first step: a job that would stop right after it, again and again.

        Raises:
            ConfigError: on every rank.
        """
        requests = self.requests
        if broadcast_object(requests.time_is_up(), self.world):
            left = (requests.end_time or 0.0) - time.time()
            raise ConfigError(
                f"the job ends in {left:.0f} s, and {requests.reserve():.0f} s before its end it "
                "would save and stop: no time is left to train; submit with a longer --time"
            )

    def finish(self, step: int, max_steps: int, validate_only: bool = False) -> str:
        """Write the run's final state; returns how it ended, in words."""
        if validate_only:  # nothing was trained: a batch script must not go on from here
            self.status("done" if step >= max_steps else "stopped", step=step,
                        reason="validate_only")
            return f"validated: step {step}"
        self.requests.clear("STOP")  # or it would stop the next start, which has more steps
        if self.stop is None:
            self.status("done", step=step)
            return f"done: step {step}"
        state = "stopped" if self.stop == STOP_FILE else "preempted"
        self.status(state, step=step, reason=self.stop)
        return f"{state} ({self.stop}): step {step}, the same command goes on from here,"

    def saved(self, tag: Path) -> None:
        self.last_good, self.save = tag, False
        self.requests.clear("SAVE")


@contextmanager
def supervised(
    config: Mapping[str, Any], budgets: WatchdogConfig, world: World
) -> Iterator[Supervisor]:
    """One start of a run: alone in its directory, what it prints kept, its guards around it.

    Raises:
        CheckpointError: another process writes the run directory.
    """
    run_dir = Path(config["run_dir"])
    lock = lock_run(run_dir, world)
    with rank_log(run_dir, world), Supervisor(config, budgets, world) as supervisor:
        yield supervisor
    if lock:
        lock.close()


class StepAgreement:
    """What the ranks of a run exchange at every step, and what follows from it.

    Args:
        supervisor: takes the votes and carries out what was agreed.
        state: `guard.state()` of the checkpoint that the run goes on from.
    """

    def __init__(
        self, supervisor: Supervisor, config: GuardConfig, state: dict[str, Any] | None,
        device: torch.device,
    ) -> None:
        self.supervisor, self.world = supervisor, supervisor.world
        self.guard = Guard(config, supervisor.run_dir, self.world, state)
        self.straggler = Straggler(self.world, device)
        self.began = time.monotonic()
        self.told: Callable[[], torch.Tensor] | None = None  # waits for the step's gather

    def begin(self, step: int, epoch: int, batch: Any, t: torch.Tensor) -> None:
        """Remember the batch in hand; nothing is computed."""
        self.began = time.monotonic()
        self.supervisor.failure.last = Last(step, epoch, batch, t)

    def tell(self, sums: torch.Tensor) -> None:
        """Collective: send the others this rank's sums (n,) of the step and its votes.

        Before the step's last backward pass, which hides the exchange.
        """
        votes = torch.tensor(self.supervisor.requests.votes(), dtype=torch.float64)
        local = torch.cat([sums, self.guard.local_loss()[None], votes.to(sums.device)])
        self.told = start_sum_over_ranks(local, self.world)

    def agree(self, losses: torch.Tensor, applied: bool) -> Agreed:
        """After the step: the sums of all ranks; whether to stop or save goes to the supervisor.

        Args:
            losses: (B, modalities) of this rank's samples. applied: whether the weights moved.

        Raises:
            BadNumbersError: on every rank.
        """
        supervisor, last, told = self.supervisor, self.supervisor.failure.last, self.told
        assert last is not None and last.t is not None and told is not None, "begin and tell first"
        *sums, loss, by_signal, by_time, stop_file, save_file = told().tolist()
        supervisor.stop = stop_reason([by_signal, by_time, stop_file])
        supervisor.save = bool(save_file)
        drawn = Drawn(last.step, last.epoch, last.batch.sample_ids, last.t, losses)
        said = self.guard.judge(loss / self.world.world_size, applied, drawn, supervisor.last_good)
        supervisor.requests.took("step", time.monotonic() - self.began)
        return Agreed(sums if applied else [0.0] * len(sums), applied, said)
