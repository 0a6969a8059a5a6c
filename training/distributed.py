"""Join the process group with this rank's device, and leave it without waiting.

Called by train.py, cluster.preflight and the tests' workers.
"""

import atexit
import multiprocessing
import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from common.ranks import World, WorldError, export_world
from training.build_lock import remove_dead_locks


def on_gpu() -> bool:
    """Whether DeepSpeed computes on a GPU: DS_ACCELERATOR=cpu keeps a run off one that is there."""
    from deepspeed.accelerator import get_accelerator  # slow, and says things: not to tools.status

    return get_accelerator().device_name() == "cuda"


def start(world: World, timeout_minutes: float) -> None:
    """Join the process group and take this rank's device.

    Must run before any model is built: `deepspeed.zero.Init` outside a process group does not
    shard anything, without an error.
    """
    import deepspeed

    export_world(world, os.environ)
    if world.local_rank == 0:
        remove_dead_locks(os.environ, several_nodes=world.world_size > world.local_world_size)
    cuda = on_gpu()
    if cuda and world.local_world_size > torch.cuda.device_count():
        raise WorldError(
            f"{world.local_world_size} ranks on a node but {torch.cuda.device_count()} GPUs seen "
            "by this one: one rank per GPU; lower --ntasks-per-node or NPROC, or use "
            "--gpus-per-node instead of --gpus-per-task"
        )
    if cuda:
        torch.cuda.set_device(world.local_rank)
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=timeout_minutes),
    )


def shutdown() -> None:
    """Leave the process group; end what would keep this process.

    The loader's workers ignore SIGTERM (data.loading.workers), and Python waits for them when it
    exits: without this a rank that crashed stayed for minutes.
    """
    for child in multiprocessing.active_children():
        child.kill()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End the process without the interpreter's own teardown, which gloo's threads can abort.

    DeepSpeed keeps references to groups that were destroyed, so their threads live on and may free
    a tensor while Python goes down: SIGABRT after a run that was done (pytorch/pytorch#179291).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
