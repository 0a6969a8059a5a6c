"""Make every rank react to one rank's data error in the same step.

A rank that raised alone would leave the others in the next collective until it times out. So the
ranks exchange three numbers before each batch is used, over gloo: on the host, no device waits.
Called by data.loading.loader, whose calls are the same on every rank.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist

from data.schema import DataError


@functools.cache
def _group() -> Any:
    return dist.new_group(backend="gloo")


class PeerError(RuntimeError):
    """Another rank crashed while it read; the data are not at fault."""


def agree(
    problem: str | None, events: list[Any], count: int = 0, crash: bool = False
) -> tuple[list[Any], int]:
    """Collective: (events of all ranks in rank order, sum of `count`); a problem stops them all.

    Every rank raises the same DataError if any has a problem; PeerError if that is a `crash`,
    which a job is requeued for.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if problem is not None:
            raise PeerError(problem) if crash else DataError(problem)
        return events, count
    numbers = torch.tensor([int(problem is not None), len(events), count])
    dist.all_reduce(numbers, group=_group())
    problems, told, total = numbers.tolist()
    if not problems and not told:
        return [], total
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (problem, crash, events), group=_group())
    for rank, (theirs, crashed, _) in enumerate(found):
        if theirs is not None:
            kind = PeerError if crashed else DataError
            raise kind(f"rank {rank}: {theirs}")
    return [event for *_, theirs in found for event in theirs], total
