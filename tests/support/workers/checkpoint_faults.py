"""Faults of saving and resuming on two real ranks; run by test_checkpoint.py.

    torchrun --nproc-per-node=2 tests/support/workers/checkpoint_faults.py FOLDER

Each check prints its name when it held; an assertion ends the process.
"""

import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from common.ranks import World, barrier, resolve_world
from tests.support.workers.checkpoint_worker import (
    DECAY,
    build,
    resume,
    same,
    save,
    say,
    state,
    train,
)
from training.checkpoint import contents, retention, save_load
from training.checkpoint import slices as storage
from training.checkpoint.run_dir import CheckpointError
from training.checkpoint.run_lock import lock_run
from training.distributed import leave, shutdown, start
from training.ema import EMA


def refused(message: str, action: Callable) -> None:
    try:
        action()
    except CheckpointError as error:
        assert message in str(error), str(error)
        return
    raise AssertionError(f"not refused: {message}")


def on_main(world: World, action: Callable) -> None:
    barrier(world)
    if world.is_main:
        action()
    barrier(world)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def names_of(run_dir: Path) -> list[int]:
    return [int(tag.name[4:]) for tag in retention.complete_tags(run_dir)]


def faults(folder: Path, world: World) -> None:
    run_dir = folder / "run"
    root = run_dir / "checkpoints"
    lock = lock_run(run_dir, world)
    refused("is being written by", lambda: lock_run(run_dir, world))
    say("second writer refused", world)

    ours = build("stage3", world)
    ema = EMA(ours, DECAY)
    assert resume(ours, run_dir, world) is None
    say("fresh start", world)
    for step in range(1, 8):
        train(ours, step, world, ema)
        save(ours, run_dir, step, world, ema, last=2, every=3)
        if step == 1:
            on_main(world, lambda: (root / retention.tag_of(1) / retention.PROTECTED).touch())
            on_main(world, lambda: (root / "step00000000").mkdir())  # a killed save's
    assert names_of(run_dir) == [1, 3, 6, 7]
    assert not (root / "step00000000").exists()
    assert (root / "latest").read_text() == "step00000007\n"
    say("keeps the last two, every third and the protected one", world)

    def failing_on(rank: int, error: OSError) -> Callable:
        def write(path, slices):
            if world.rank == rank and "exp_avg" in path.name:
                raise error
            return storage.write_slices(path, slices)
        return write

    expected = state(ours, ema)
    for rank, error in ((1, OSError(28, "No space left on device")), (0, OSError(5, "I/O error"))):
        save_load.write_slices = failing_on(rank, error)
        refused(f"rank {rank}: ", lambda: save(ours, run_dir, 8, world, ema))
        save_load.write_slices = storage.write_slices
        assert names_of(run_dir) == [1, 3, 6, 7] and not (root / retention.tag_of(8)).exists()
    say("full disk on one rank: refused on all, the ones before are intact", world)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:  # a real write that ends in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    refused("rank 1: [Errno 27] File too large", lambda: save(ours, run_dir, 8, world, ema))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_of(run_dir) == [1, 3, 6, 7] and not (root / retention.tag_of(8)).exists()
    say("a file that grows no further: refused on all", world)

    read_only(folder, run_dir, ours, world)
    assert names_of(run_dir) == [1, 3, 6, 7]
    say("read-only folder: refused on all", world)
    slow_rank(folder / "slow", ours, ema, world)
    say("slow rank: nothing counts before its part is there", world)

    statvfs = os.statvfs

    def nearly_full(path):
        disk = list(statvfs(path))
        disk[4] = 3  # f_bavail
        return os.statvfs_result(disk)

    os.statvfs = nearly_full
    refused("it needs 0.000 GB and 6 files", lambda: save(ours, run_dir, 8, world))
    os.statvfs = statvfs
    assert not (root / retention.tag_of(8)).exists() and same(state(ours, ema), expected)
    say("too little space: refused with the numbers before anything is written", world)

    newest = root / retention.tag_of(7)
    for victim in ("weight-00000.safetensors", "ema-00001.safetensors",
                   "exp_avg_sq-00000.safetensors", contents.MANIFEST):
        kept = (newest / victim).read_bytes()
        on_main(world, lambda victim=victim: flip(newest / victim))
        found = retention.find_checkpoint(run_dir, world)
        assert found and found.tag.name == retention.tag_of(6) and victim in found.damaged[newest]
        on_main(world, lambda victim=victim, kept=kept: (newest / victim).write_bytes(kept))
    say("flipped bit: the one before is taken, which is told", world)

    hashed = retention.file_sha256

    def erring(path):
        if path.parent == newest:
            raise OSError(5, "Input/output error")
        return hashed(path)

    retention.file_sha256 = erring if world.rank == 1 else hashed
    assert resume(build("stage3", world, seed=3), run_dir, world) == 6
    retention.file_sha256 = hashed
    barrier(world)
    [aside] = root.glob(f"{newest.name}.unread-*")
    assert not newest.exists()
    barrier(world)
    on_main(world, lambda: aside.rename(newest))
    assert resume(build("stage3", world, seed=3), run_dir, world) == 7
    say("one that a rank could not read is passed over, and stays under another name", world)

    other = build("stage3", world, seed=3)
    on_main(world, lambda: flip(newest / "exp_avg-00001.safetensors"))
    assert resume(other, run_dir, world) == 6
    train(other, 7, world)
    save(other, run_dir, 8, world)
    assert names_of(run_dir) == [1, 6, 8] and not newest.exists()
    say("a damaged one is not counted among the last two", world)

    for tag in retention.complete_tags(run_dir):
        on_main(world, lambda tag=tag: next(tag.glob("weight*")).unlink())
    refused("none can be resumed", lambda: resume(other, run_dir, world))
    say("no complete checkpoint: refused, not trained from scratch", world)

    def unfinish() -> None:
        for path in run_dir.glob(f"checkpoints/*/{contents.MANIFEST}"):
            path.unlink()

    on_main(world, unfinish)
    assert resume(other, run_dir, world) is None
    say("killed in the first save: a fresh start", world)
    if lock:
        lock.close()


def read_only(folder: Path, run_dir: Path, made, world: World) -> None:
    root = run_dir / "checkpoints"
    on_main(world, lambda: (folder.chmod(0o755), root.chmod(0o555)))
    here, user = os.getcwd(), os.geteuid()
    os.chdir(folder)  # what lies above is not for everybody
    if user == 0:  # who may write anywhere
        os.seteuid(65534)
    try:
        refused("Permission denied", lambda: save(made, run_dir.relative_to(folder), 8, world))
    finally:
        os.seteuid(user)
        os.chdir(here)
    on_main(world, lambda: root.chmod(0o755))


def slow_rank(run_dir: Path, made, ema: EMA, world: World) -> None:
    save(made, run_dir, 1, world, ema)
    latest = run_dir / "checkpoints" / "latest"

    def write(path, slices):
        if world.rank == 1 and path.name.startswith("ema"):  # the last one of four
            time.sleep(2)
            assert len(list(path.parent.glob("*-00000.safetensors"))) == 4, "rank 0 is done"
            assert names_of(run_dir) == [1] and latest.read_text() == "step00000001\n"
        return storage.write_slices(path, slices)

    save_load.write_slices = write
    save(made, run_dir, 2, world, ema)
    save_load.write_slices = storage.write_slices
    assert names_of(run_dir) == [1, 2] and latest.read_text() == "step00000002\n"


def main() -> None:
    warnings.filterwarnings("ignore")
    world = resolve_world(os.environ)
    start(world, 2)
    faults(Path(sys.argv[1]), world)
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
