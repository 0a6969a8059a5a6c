"""Numbers that must not reach the weights: non-finite losses and gradients, and sudden spikes.

DeepSpeed skips an update whose gradient norm is not finite, on all ranks (a NaN on one spreads
with the reduction), but counts nothing, names nothing and never stops. Here a loss that is not
finite always makes its gradient so, a spike can be made to, each skip is written to
RUN/events.jsonl with its sample ids, t and losses, and the run ends after too many in a row.
Called by train.py.
"""

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from common.errors import ExpectedError
from common.events import append_event, events_path
from common.ranks import World, gather_objects, sum_over_ranks
from common.settings import STRICT


class BadNumbersError(ExpectedError, RuntimeError):
    """Training cannot go on from here; raised by every rank after the same step."""

    exit_code = 77


@dataclass(frozen=True, config=STRICT)
class GuardConfig:
    """Reaction to bad numbers."""

    max_skips: Annotated[int, Field(
        ge=1, description="Updates skipped in a row before the run ends.")] = 10
    spike: Annotated[Literal["log", "skip", "stop"], Field(
        description="Reaction to a spike of the loss.")] = "log"
    spike_sigmas: Annotated[float, Field(
        ge=1, description="Standard deviations above the mean of the last losses that make a "
        "spike.")] = 6.0
    spike_window: Annotated[int, Field(
        ge=8, description="Last losses that are compared with; judged from half of it on.")] = 128


class Drawn(NamedTuple):
    """One rank's samples of a step, for the record of a skip."""

    step: int
    epoch: int
    sample_ids: list[str]
    t: torch.Tensor  # (B,)
    losses: torch.Tensor  # (B, modalities), on the device

    def lines(self, rank: int) -> list[dict[str, Any]]:
        rows = zip(self.sample_ids, self.t.tolist(), self.losses.tolist(), strict=True)
        return [{"rank": rank, "id": name, "t": t, "losses": [json_number(loss) for loss in losses]}
                for name, t, losses in rows]


def json_number(value: float) -> float | str:
    """The number, or its name ("nan", "inf"), for which JSON has no number."""
    return value if math.isfinite(value) else str(value)


class Guard:
    """Screens every micro-batch's loss, judges every step; the same verdict on every rank."""

    def __init__(
        self, config: GuardConfig, run_dir: Path, world: World,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.run_dir, self.world = config, run_dir, world
        state = state or {"losses": [], "in_a_row": 0}
        self.history = deque(state["losses"], maxlen=config.spike_window)
        self.in_a_row: int = state["in_a_row"]
        self.partial: list[torch.Tensor] = []  # this step's micro-batch losses
        self.spiked = False

    def state(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run judges as the undisturbed one."""
        return {"losses": list(self.history), "in_a_row": self.in_a_row}

    def screen(self, loss: torch.Tensor, last: bool) -> torch.Tensor:
        """The loss to go backward from: itself, or NaN where this update must not happen.

        ``last`` marks the step's last micro-batch, where a spike of the global loss is known.
        """
        bad = ~loss.detach().isfinite()  # an infinite square may have a finite gradient
        self.partial.append(loss.detach().double())
        if last and self.config.spike != "log":
            total = sum_over_ranks(self.local_loss()) / self.world.world_size
            self.spiked = self._is_spike(float(total))
            bad = bad | self.spiked
        return loss * torch.where(bad, math.nan, 1.0)

    def local_loss(self) -> torch.Tensor:
        """Mean over this rank's micro-batches of the step, a float64 scalar on the device."""
        return torch.stack(self.partial).mean()

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss) or len(self.history) < self.config.spike_window // 2:
            return False
        mean = statistics.fmean(self.history)
        # statistics.pstdev computes with fractions: five times slower, at every step.
        deviation = math.sqrt(statistics.fmean((past - mean) ** 2 for past in self.history))
        return loss > mean + self.config.spike_sigmas * deviation

    def judge(self, loss: float, applied: bool, drawn: Drawn, last_good: Path | None) -> str | None:
        """After a step: what to say about it, if anything.

        Args:
            loss: of the global batch. applied: whether the weights moved, the same on all ranks.

        Raises:
            BadNumbersError: on every rank, after too many skips or at a spike that stops.
        """
        spiked = self.spiked or self._is_spike(loss)
        if math.isfinite(loss):
            self.history.append(loss)
        self.partial, self.spiked = [], False
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if applied and not spiked:
            return None
        kind = "spike" if spiked else "loss not finite" if not math.isfinite(loss) else (
            "gradient not finite")
        worst = self._record(kind, loss, applied, drawn)
        said = (f"step {drawn.step}: {kind} (loss {loss:.4g}), update "
                f"{'kept' if applied else 'SKIPPED'}; {worst}; all samples in "
                f"{events_path(self.run_dir)}")
        ended = self.in_a_row >= self.config.max_skips or (
            spiked and self.config.spike == "stop")
        if ended:
            why = "a spike" if spiked and self.config.spike == "stop" else (
                f"guard.max_skips={self.config.max_skips} updates in a row were skipped, the last")
            raise BadNumbersError(
                f"{why} at {said}; last good checkpoint: {last_good or 'none'}; look at the "
                f"samples (python -m tools.replay {self.run_dir} {drawn.step}), then lower "
                "optimizer.lr or go on with another seed"
            )
        return said

    def _record(self, kind: str, loss: float, applied: bool, drawn: Drawn) -> str:
        """Every rank's samples into one event; the worst sample in words."""
        parts = gather_objects(drawn.lines(self.world.rank), self.world)
        samples = [line for part in parts for line in part]
        if self.world.is_main:
            append_event(self.run_dir, "skip", step=drawn.step, epoch=drawn.epoch, kind=kind,
                         loss=json_number(loss), applied=applied, in_a_row=self.in_a_row,
                         samples=samples)
        broken = [s for s in samples if any(isinstance(x, str) for x in s["losses"])]
        worst = max(broken or samples, key=lambda s: max(
            math.inf if isinstance(x, str) else x for x in s["losses"]))
        count = f"{len(broken)} samples not finite, first" if broken else "largest loss"
        return f"{count}: {worst['id']} (rank {worst['rank']}, t {worst['t']:.4f})"
