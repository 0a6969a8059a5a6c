"""Ranks of a data-loading job, in a module of its own: a new process imports only this."""

import itertools
import multiprocessing
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.loading.agreement import PeerError
from data.loading.loader import ValidationSet, build_loader
from data.loading.shards import ShardDataset
from data.loading.sources import DataConfig
from data.schema import DataError


@dataclass(frozen=True)
class Job:
    """What every rank does: read `steps` batches from `first` on, then a share of validation."""

    config: DataConfig
    world: int
    steps: int
    batch: int = 4
    first: int = 0
    seed: int = 3
    damage: tuple[str, str] | None = None  # (kind, file), once the loader is built
    run_dir: Path | None = None


def spoil(kind: str, path: str | Path) -> None:
    """bad: one bit flipped; truncated: half of it; missing: gone; crash: a bug in this process."""
    if kind == "crash":
        ShardDataset.get_item = None  # type: ignore[assignment, method-assign]
        return
    path = Path(path)
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x40
        path.write_bytes(data)


def read_job(job: Job, rank: int) -> dict[str, Any]:
    """What one rank read: `batches` of (epoch, ids, shape, audio weights), `error`, `held`; or what
    ended it though nothing is wrong with the data: `crash`.
    """
    found: dict[str, Any] = {"batches": [], "error": None, "held": [], "crash": None}
    run_dir = job.run_dir if rank == 0 else None
    try:
        loader = build_loader(
            job.config, job.batch, rank, job.world, job.seed, job.first, run_dir
        )
        if job.damage and rank == 0:
            spoil(*job.damage)
        if job.world > 1:
            dist.barrier()
        for epoch, batch in itertools.islice(loader, job.steps):
            shape = tuple(batch.video_latents.shape[1:])
            weights = dict(zip(batch.sample_ids, batch.audio_weight.tolist(), strict=True))
            found["batches"].append((epoch, batch.sample_ids, shape, weights))
        validation_set = ValidationSet(job.config, run_dir)
        for batch, real in validation_set.shares(None, 2, rank, job.world, job.steps):
            found["held"].append((batch.sample_ids, real.tolist(), batch.video_latents.shape[1:]))
    except DataError as error:
        found["error"] = str(error)
    except (PeerError, TypeError) as error:
        found["crash"] = str(error)
    return found


def run_rank(rank: int, results: Any, job: Job, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.world),
        "LOCAL_WORLD_SIZE": str(job.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo")
    results.put((rank, read_job(job, rank)))
    dist.barrier()
    dist.destroy_process_group()


def run_job(job: Job) -> list[dict[str, Any]]:
    """What each rank read; several ranks are processes with a gloo group, as in training."""
    if job.world == 1:
        return [read_job(job, 0)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.workers.ranks"])
    results = context.Queue()
    ranks = [context.Process(target=run_rank, args=(rank, results, job, port))
             for rank in range(job.world)]
    for process in ranks:
        process.start()
    read = dict(results.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * job.world
    return [read[rank] for rank in range(job.world)]


def global_batches(ranks: list[dict[str, Any]]) -> list[tuple[int, tuple[str, ...]]]:
    """(epoch, ids of the global batch) per step, from the slices of all ranks."""
    steps = zip(*(rank["batches"] for rank in ranks), strict=True)
    return [(parts[0][0], tuple(name for part in parts for name in part[1])) for parts in steps]
