"""What a job keeps on a node for its lifetime: names in shared memory, a cache folder.

mosaicml-streaming 0.13 numbers its shared memory from 0 and takes the first free number without a
lock: two jobs that look at the same moment take the same (FileExistsError), and a killed job's
names stay. Here every job counts from a random number of its own. A lock file in shared memory,
which the kernel frees with its process, says that the job lives; the next start removes
everything of a job whose lock is free, and nothing else. Python's resource tracker is kept out of
it: it frees at a rank's end what other ranks still read (python/cpython#82300), and complains of
what is gone. Called by data.loading.shards.
"""

import atexit
import contextlib
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from streaming.base.shared import prefix as streaming_prefix
from streaming.base.world import World

from data.schema import DataError

SHARED_MEMORY = Path("/dev/shm")
DIGITS = 3  # a job may open 10**DIGITS data sets
OURS = re.compile(rf"/?1\d{{14}}\d{{{DIGITS}}}_\w+")  # names of shared memory with such a number
_opened = itertools.count()  # by this process; ranks open the same ones in the same order


def _of_others(tracked: Callable[[str, str], None]) -> Callable[[str, str], None]:
    def track(name: str, kind: str) -> None:
        if kind != "shared_memory" or not OURS.fullmatch(name):
            tracked(name, kind)

    return track


@functools.cache  # once in a process
def leave_to_the_job() -> None:
    """Keep this process's resource tracker out of the job's shared memory.

    To be called before any of it is created, or attached to by a worker.
    """
    resource_tracker.register = _of_others(resource_tracker.register)  # type: ignore[assignment]
    resource_tracker.unregister = _of_others(resource_tracker.unregister)  # type: ignore[assignment]


@functools.cache
def job_number() -> int:
    """This job's own random number, the same on every rank; claims it on this node once."""
    world = World.detect()
    if world.num_ranks > 1 and not dist.is_initialized():
        raise DataError(
            f"WORLD_SIZE={world.num_ranks} but no process group: join it before loading data"
        )
    box = [1 << 47 | int.from_bytes(os.urandom(5), "big") if world.rank == 0 else None]
    if world.num_ranks > 1:
        dist.broadcast_object_list(box, src=0)
    number = box[0]
    assert number is not None
    if world.is_local_leader:
        remove_leftovers()
        _claim(number)
    if world.num_ranks > 1:
        dist.barrier()
    return number


def job_folder() -> Path:
    """This job's own folder for cached shards, in TMPDIR; removed at its end."""
    return _folder(job_number())


@contextlib.contextmanager
def own_shared_memory() -> Iterator[None]:
    """Within it streaming takes its names from this job's own numbers, a fresh one each time.

    With the job's first, streaming would look at every number before its own and keep them open.
    """
    leave_to_the_job()
    first, original = job_number() * 10**DIGITS + next(_opened), streaming_prefix._each_prefix_int
    streaming_prefix._each_prefix_int = lambda: itertools.count(first)
    try:
        yield
    finally:
        streaming_prefix._each_prefix_int = original


def lock_cache(folder: Path) -> IO[str]:
    """Keep a cache folder that the user named for this job alone; DataError if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise DataError(
            f"data.cache_dir={folder}: another run on this node uses it; give each its own"
        ) from error
    for part in folder.rglob("*.part*"):  # what a killed run had begun to fetch
        part.unlink(missing_ok=True)
    return lock


def remove_leftovers() -> None:
    """Free what this user's killed jobs left on this node; a live job holds its lock."""
    for path in SHARED_MEMORY.glob("*_avfulldit"):
        with contextlib.suppress(FileNotFoundError, PermissionError, BlockingIOError):
            if path.stat().st_uid == os.getuid():
                with open(path, encoding="utf-8") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(path, json.load(lock))


def _folder(number: int) -> Path:
    return Path(tempfile.gettempdir()) / f"avfulldit-{number}"


def _claim(number: int) -> None:
    temporary, cache = tempfile.gettempdir(), str(_folder(number))
    record = {"number": number, "temporary": temporary, "cache": cache}
    path = SHARED_MEMORY / f"{number}_avfulldit"
    new = path.with_suffix(".new")
    lock = open(new, "w", encoding="utf-8")
    fcntl.flock(lock, fcntl.LOCK_EX)
    json.dump(record, lock)
    lock.flush()
    new.rename(path)  # nobody sees it before it is locked
    # Runs after streaming's own handlers, which are registered later.
    atexit.register(_end, lock, path, record, os.getpid())


def _end(lock: IO[str], path: Path, record: dict[str, Any], pid: int) -> None:
    if os.getpid() == pid:
        _remove(path, record)
    lock.close()


def _remove(path: Path, record: dict[str, Any]) -> None:
    names = f"{record['number']}{'[0-9]' * DIGITS}_*"
    for folder in (SHARED_MEMORY, Path(record["temporary"])):
        for leftover in folder.glob(names):
            leftover.unlink(missing_ok=True)
    shutil.rmtree(record["cache"], ignore_errors=True)
    path.unlink(missing_ok=True)
