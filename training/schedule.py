"""What is due at which step, and at which learning rate: functions of the step and the settings.

Step n is the state after n updates; update n leads to it. A start goes on from step `first`, so
its first update, and the first record that it writes, is `first` + 1.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

BUDGET_AGAIN = 20  # steps after a start: from there on the times of steps are known


@dataclass(frozen=True)
class Schedule:
    """The steps of one start. Its keys are those of RunConfig, where they are documented.

    Args:
        first: the step that this start goes on from; 0: from the pretrained backbones.
        validated, sampled: whether an earlier start has validated or sampled at `first`.
    """

    max_steps: int
    warmup_steps: int
    decay_steps: int
    log_every: int
    health_every: int
    validate_every: int | None
    sample_every: int | None
    save_every: int
    validate_only: bool
    first: int = 0
    validated: bool = False
    sampled: bool = False

    @classmethod
    def of(cls, config: Any, first: int, validated: bool, sampled: bool) -> "Schedule":
        """Of a RunConfig."""
        own: dict[str, Any] = {"first": first, "validated": validated, "sampled": sampled}
        keys = [field.name for field in dataclasses.fields(cls) if field.name not in own]
        return cls(**{key: getattr(config, key) for key in keys}, **own)

    def rate_factor(self, step: int) -> float:
        """Learning-rate factor of update step + 1: up, constant, down."""
        left = (self.max_steps - step) / max(self.decay_steps, 1)
        return min(1.0, (step + 1) / max(self.warmup_steps, 1), left)

    def done(self, step: int) -> bool:
        return step >= self.max_steps or self.validate_only

    def trains(self) -> bool:
        """Whether any step is left to this start."""
        return not self.done(self.first)

    def validation(self, step: int, stopping: bool) -> bool:
        """A run that was asked to stop leaves its validation to the next start."""
        if self.validate_only:
            return True
        return not stopping and self._now_or_last(step, self.validate_every) and (
            step > self.first or not self.validated)

    def recorded(self, step: int) -> bool:
        """Whether a validation at this step is on record, and only printed again."""
        return step == self.first and self.validated

    def samples(self, step: int, stopping: bool) -> bool:
        if self.validate_only or stopping:
            return False
        return self._now_or_last(step, self.sample_every) and (
            step > self.first or not self.sampled)

    def checkpoint(self, step: int, wanted: bool) -> bool:
        """``wanted``: by a person, or because this start ends here."""
        return step > self.first and (wanted or step % self.save_every == 0)

    def record(self, step: int) -> bool:
        return self._now_or_last(step, self.log_every)

    def health(self, step: int) -> bool:
        return step % self.health_every == 0

    def budget(self, step: int) -> bool:
        """Once, with the first record that is late enough."""
        late = step - self.first - BUDGET_AGAIN
        return self.record(step) and 0 <= late < self.log_every

    def _now_or_last(self, step: int, every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == self.max_steps)
