"""Ranks from whichever launcher set them, checked, and exported for the libraries.

srun, torchrun, the `deepspeed` launcher and a bare `python train.py` name ranks differently, and
two of them do not set LOCAL_WORLD_SIZE, without which mosaicml-streaming takes every rank for the
leader of its own node. `resolve_world` is a pure function of the environment; `export_world`
writes its answer back under torch's names so that DeepSpeed and streaming see one truth.
"""

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from common.errors import ExpectedError


class WorldError(ExpectedError, ValueError):
    """The launcher's environment variables contradict each other or are incomplete."""


@dataclass(frozen=True)
class World:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    source: str  # which launcher the numbers come from

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def resolve_world(environ: Mapping[str, str]) -> World:
    """Ranks from torchrun, the deepspeed launcher, srun, or one process alone.

    Raises:
        WorldError: naming the variable, its value, the rule and the fix.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        world = _from_torch_names(environ)
    elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        # Only srun sets SLURM_STEP_*; the batch script itself is not a task of the job step.
        world = _from_srun(environ)
    else:
        world = World(0, 1, 0, 1, "alone")
    _check(world)
    return world


def _from_torch_names(environ: Mapping[str, str]) -> World:
    rank, world_size = _int(environ, "RANK"), _int(environ, "WORLD_SIZE")
    local_rank = _int(environ, "LOCAL_RANK")
    source = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "RANK, WORLD_SIZE, LOCAL_RANK"
    for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # the deepspeed launcher sets LOCAL_SIZE only
        if key in environ:
            source = "deepspeed launcher" if key == "LOCAL_SIZE" else source
            return World(rank, world_size, local_rank, _int(environ, key), source)
    if world_size == 1:
        return World(rank, world_size, local_rank, 1, source)
    raise WorldError(
        f"LOCAL_WORLD_SIZE is not set but WORLD_SIZE={world_size}: streaming needs the number of "
        "ranks per node; export LOCAL_WORLD_SIZE, or start with launch/local.sh or srun"
    )


def _from_srun(environ: Mapping[str, str]) -> World:
    rank, world_size = _int(environ, "SLURM_PROCID"), _int(environ, "SLURM_STEP_NUM_TASKS")
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size))
    if not re.fullmatch(r"\d+(\(x\d+\))?", tasks):  # "2(x3),1" is an uneven step
        raise WorldError(
            f"SLURM_STEP_TASKS_PER_NODE={tasks}: every node must run the same number of tasks; "
            "start with --ntasks-per-node"
        )
    local_world_size = int(tasks.split("(")[0])
    return World(rank, world_size, _int(environ, "SLURM_LOCALID"), local_world_size, "srun")


def _int(environ: Mapping[str, str], key: str) -> int:
    value = environ.get(key, "")
    if not value.isdigit():
        raise WorldError(
            f"{key}={value!r} is not a rank or a count: set RANK, WORLD_SIZE and LOCAL_RANK "
            "together, or none of them to run alone"
        )
    return int(value)


def _check(world: World) -> None:
    rules = {
        f"rank {world.rank} must be below world size {world.world_size}":
            world.rank < world.world_size,
        f"local rank {world.local_rank} must be below local world size {world.local_world_size}":
            world.local_rank < world.local_world_size,
        f"local world size {world.local_world_size} must divide world size {world.world_size}":
            world.local_world_size > 0 and world.world_size % world.local_world_size == 0,
        f"rank {world.rank} modulo local world size {world.local_world_size} must be local rank "
        f"{world.local_rank}": world.rank % max(world.local_world_size, 1) == world.local_rank,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise WorldError(
            f"inconsistent ranks from {world.source}: {broken[0]}; unset stale RANK, WORLD_SIZE, "
            "LOCAL_RANK, LOCAL_WORLD_SIZE variables or use one launcher only"
        )


def export_world(world: World, environ: dict[str, str] | os._Environ[str]) -> None:
    """Write the ranks under torch's names and a rendezvous address where none is given.

    Raises:
        WorldError: when several nodes were started without MASTER_ADDR.
    """
    if "MASTER_ADDR" not in environ:
        if world.world_size > world.local_world_size:
            raise WorldError(
                f"MASTER_ADDR is not set but {world.world_size // world.local_world_size} nodes "
                "run: export it (launch/train.sbatch does), the first node's host name"
            )
        environ["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in environ:
        job = environ.get("SLURM_JOB_ID")
        environ["MASTER_PORT"] = str(20000 + int(job) % 20000) if job else _free_port(world)
    environ["RANK"], environ["WORLD_SIZE"] = str(world.rank), str(world.world_size)
    environ["LOCAL_RANK"] = str(world.local_rank)
    environ["LOCAL_WORLD_SIZE"] = str(world.local_world_size)


def _free_port(world: World) -> str:
    if world.world_size > 1:
        raise WorldError(
            f"MASTER_PORT is not set but {world.world_size} ranks run: export one port for all"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """All-reduced sum, in place, of a small float64 tensor on any device."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def start_sum_over_ranks(values: torch.Tensor, world: World) -> Callable[[], torch.Tensor]:
    """The sum over ranks of values (n,), few; the caller goes on, the call returned waits.

    Gathered and summed in the order of ranks: for so little a third of an all-reduce's cost.
    """
    if world.world_size == 1:
        return lambda: values
    rows = values.new_empty(world.world_size * len(values))
    work = dist.all_gather_into_tensor(rows, values, async_op=True)
    if values.is_cuda:  # orders the stream: two NCCL communicators must not run side by side
        work.wait()

    def finish() -> torch.Tensor:
        work.wait()
        return rows.view(world.world_size, -1).sum(dim=0)

    return finish


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's value on every rank, so that all ranks take the same decision."""
    if world.world_size == 1:
        return value
    box = [value if world.is_main else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's value on every rank, in the order of ranks."""
    if world.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * world.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def barrier(world: World) -> None:
    if world.world_size > 1:
        dist.barrier()
