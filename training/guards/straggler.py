"""Which rank the others wait for: each rank's own share of a step, compared once per log period.

In synchronous training every rank's step takes as long as the slowest one's, so the step time
says nothing. What a rank spends alone does: waiting for its own loader, and its forward passes,
which hold no collective in stages 0 to 2 (in stage 3 they hold gathers, and only the data part
tells). Called by train.py.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from common.ranks import World, gather_objects

PARTS = ("data", "forward")


class Straggler:
    """Seconds per part of this rank; on a GPU measured by events, read once per period."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.world, self.device = world, device
        self.hosts = gather_objects(socket.gethostname(), world)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def waited(self, seconds: float) -> None:
        """Time this rank's own loader kept it waiting."""
        self.seconds["data"] += seconds

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward pass."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
            return
        began = time.perf_counter()
        yield
        self.seconds["forward"] += time.perf_counter() - began

    def compare(self, steps: int) -> tuple[dict[str, float], str]:
        """Collective, once per log period: scalars per step of rank 0, and the slowest in words."""
        if self.events:
            self.events[-1][1].synchronize()
            self.seconds["forward"] += sum(a.elapsed_time(b) for a, b in self.events) / 1000
        mine = torch.tensor([self.seconds[part] / steps for part in PARTS],
                            dtype=torch.float64, device=self.device)
        self.seconds, self.events = dict.fromkeys(PARTS, 0.0), []
        rows = [mine]
        if self.world.world_size > 1:
            rows = [torch.empty_like(mine) for _ in range(self.world.world_size)]
            dist.all_gather(rows, mine)
        table = torch.stack(rows).cpu()  # (ranks, parts)
        values: dict[str, float] = {}
        words = []
        for column, part in enumerate(PARTS):
            slowest = int(table[:, column].argmax())
            most = float(table[slowest, column])
            values[f"time/{part}_seconds"] = float(table[:, column].quantile(0.5))
            values[f"time/{part}_seconds_slowest"] = most
            values[f"time/{part}_slowest_rank"] = float(slowest)
            words.append(f"{part} {values[f'time/{part}_seconds']:.2f} s" + (
                f" (rank {slowest} {self.hosts[slowest]} {most:.2f})"
                if self.world.world_size > 1 else ""))
        return values, "  ".join(words)
