"""Run optional work: a failure on any rank is reported on all of them and does not stop training.

Validation losses, gauges and samples (evaluation.evaluator) are worked out by every rank for itself
and then gathered. A rank that fails goes on to that gather, so that the others do not wait for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from common.ranks import World, gather_objects


class AttemptError(RuntimeError):
    """Work that failed on some rank; raised on every one, in one line."""


class Attempt:
    """One piece of such work on this rank.

    Args:
        gathers: whether it holds collectives, as a forward of ZeRO-3 does. Then the others are in
            one when this rank fails, and the failure is raised where it is.
    """

    def __init__(self, world: World, gathers: bool) -> None:
        self.world, self.gathers, self.failed = world, gathers and world.world_size > 1, ""

    @contextmanager
    def part(self) -> Iterator[None]:
        """A part of the work; what fails is kept for `settle`."""
        try:
            yield
        except Exception as error:  # whatever it is, training can do without the work
            if self.gathers:
                raise
            self.failed = self.failed or f"{type(error).__name__}: {error}"

    def settle(self) -> None:
        """Collective, after the work.

        Raises:
            AttemptError: on every rank, if any failed.
        """
        told = [f"rank {rank}: {words}" for rank, words in
                enumerate(gather_objects(self.failed, self.world)) if words]
        if told:
            raise AttemptError("; ".join(told))
