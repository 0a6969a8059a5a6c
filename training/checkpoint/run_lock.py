"""One writer at a time in a run directory. Called by train.py."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from common.ranks import World, broadcast_object
from training.checkpoint.run_dir import CheckpointError


def lock_run(run_dir: Path, world: World) -> IO[str] | None:
    """Refuse a second writer in one run directory; the lock goes with the process.

    Returns the open file, to be kept until the end. Raises CheckpointError on every rank,
    also for a folder that cannot be written.
    """
    held, fault = None, ""
    if world.is_main:
        try:
            held, owner = _lock(run_dir)
            if owner:
                fault = f"is being written by {owner}: stop it or choose another run_dir"
        except OSError as error:
            fault = f"cannot be written ({error}): choose a folder of your own"
    fault = broadcast_object(fault, world)
    if fault:
        raise CheckpointError(f"run_dir={run_dir} {fault}")
    return held


def _lock(run_dir: Path) -> tuple[IO[str], str]:
    """The lock file, and who holds it, "" if this process does now."""
    run_dir.mkdir(parents=True, exist_ok=True)
    held = open(run_dir / "lock", "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.truncate(0)
        held.write(f"{socket.gethostname()} pid {os.getpid()}\n")
        held.flush()
        return held, ""
    except BlockingIOError:
        held.seek(0)
        return held, held.read().strip() or "another process"
