"""Checkpoints on two real ranks under ZeRO-3, with faults; run by test_checkpoint.py.

    torchrun --nproc-per-node=2 tests/checkpoint_worker.py FOLDER

Each check prints its name when it held; an assertion ends the process.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn

from training import checkpoint, engine
from training.distributed import barrier, resolve_world, shutdown, start
from training.run_dir import lock_run


def build(world_size: int):
    config = engine.complete_ds_config(
        {"train_micro_batch_size_per_gpu": 1,
         "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        world_size, 1.0, world_size,
    )
    torch.manual_seed(0)
    model = engine.build_sharded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), config)
    return engine.build_engine(model, set(), engine.OptimizerConfig(lr=0.1), config)[0]


def train(deepspeed_engine) -> float:
    loss = deepspeed_engine(torch.ones(1, 8)).square().mean()
    deepspeed_engine.backward(loss)
    deepspeed_engine.step()
    return loss.item()


def refused(message: str, action) -> None:
    try:
        action()
    except checkpoint.CheckpointError as error:
        assert message in str(error), str(error)
        return
    raise AssertionError(f"not refused: {message}")


def main() -> None:
    world = resolve_world(os.environ)
    start(world, 2)
    run_dir = Path(sys.argv[1]) / "run"

    def say(name: str) -> None:
        barrier(world)
        if world.is_main:
            print(name, flush=True)

    def resume(target):
        tag = checkpoint.find_checkpoint(run_dir, world)
        return tag and checkpoint.load_checkpoint(target, tag, world)

    lock = lock_run(run_dir, world)
    refused("is being written by", lambda: lock_run(run_dir, world))
    say("second writer refused")

    ours = build(world.world_size)
    assert resume(ours) is None
    say("fresh start")
    for step in (1, 2, 3):
        train(ours)
        checkpoint.save_checkpoint(ours, run_dir, step, {"step": step}, 2, world)
    assert [tag.name for tag in checkpoint.complete_tags(run_dir)] == ["step00000002",
                                                                       "step00000003"]
    say("keeps the last two")

    expected = [train(ours) for _ in range(3)]
    other = build(world.world_size)
    assert resume(other) == {"step": 3}
    assert [train(other) for _ in range(3)] == expected
    say("resume continues bit for bit")

    save = torch.save

    def full_disk(state, file, *args, **kwargs):
        if world.rank == 1:
            raise OSError(28, "No space left on device")
        return save(state, file, *args, **kwargs)

    torch.save = full_disk
    refused("rank 1: ", lambda: checkpoint.save_checkpoint(ours, run_dir, 4, {}, 2, world))
    torch.save = save
    assert [tag.name for tag in checkpoint.complete_tags(run_dir)][-1] == "step00000003"
    assert not (run_dir / "checkpoints" / "step00000004").exists()
    say("full disk on one rank: refused on all, the one before is intact")

    shard = sorted((run_dir / "checkpoints" / "step00000003").glob("*optim_states.pt"))[0]
    barrier(world)
    if world.is_main:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    barrier(world)
    refused("differs from its sha256", lambda: resume(other))
    say("flipped bit refused")

    barrier(world)
    if world.is_main:
        shard.write_bytes(shard.read_bytes()[:-1])
    barrier(world)
    assert resume(other) == {"step": 2}
    say("truncated checkpoint passed over")

    barrier(world)
    if world.is_main:
        for tag in checkpoint.complete_tags(run_dir):
            next(tag.glob("*optim_states.pt")).unlink()
    barrier(world)
    refused("none is complete", lambda: resume(other))
    say("no complete checkpoint: refused, not trained from scratch")

    barrier(world)
    if world.is_main:
        for manifest in run_dir.glob(f"checkpoints/*/{checkpoint.MANIFEST}"):
            manifest.unlink()
    barrier(world)
    assert resume(other) is None
    say("killed in the first save: a fresh start")
    if lock:
        lock.close()
    shutdown()


if __name__ == "__main__":
    main()
