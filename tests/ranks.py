"""One rank of a data-loading job, in a module of its own: a new process imports only this."""

import itertools
import os
from typing import Any

import torch.distributed as dist

from data.dataset import HeldOut, build_loader
from data.sources import DataConfig


def read_rank(
    rank: int, results: Any, root: str, world: int, port: int, workers: int, steps: int, first: int
) -> None:
    """Put (rank, {"batches": [[epoch, ids], ...], "held": ids}) into the queue `results`."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo")
    config = DataConfig(root, num_workers=workers)
    loader = build_loader(config, 4, rank, world, 3, first)
    batches = [[epoch, batch.sample_ids] for epoch, batch in itertools.islice(loader, steps)]
    held = HeldOut(config).batch([rank]).sample_ids
    results.put((rank, {"batches": batches, "held": held}))
    dist.barrier()
    dist.destroy_process_group()
