"""Bytes per parameter and seconds of a checkpoint, beside DeepSpeed's own.

    torchrun --nproc-per-node=2 benchmarks/checkpoint_cost.py FOLDER [--millions 100] [--stage 3]

Prints one line per measurement: median, smallest and largest of --repeat saves and resumes. The
disk's own speed is measured with one plain synced write of as many bytes.
"""

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from common.ranks import World, barrier, resolve_world
from training.checkpoint.contents import read_contents
from training.checkpoint.retention import Retention, find_checkpoint
from training.checkpoint.save_load import load_checkpoint, save_checkpoint
from training.distributed import shutdown, start
from training.ds_config import complete_ds_config
from training.ema import EMA
from training.engine import OptimizerConfig, build_engine, build_sharded

WIDTH = 1024


def measure(name: str, world: World, repeat: int, action: Callable[[], object]) -> None:
    seconds = []
    for _ in range(repeat):
        barrier(world)
        began = time.perf_counter()
        action()
        barrier(world)
        seconds.append(time.perf_counter() - began)
    if world.is_main:
        print(f"{name}: {statistics.median(seconds):.2f} s "
              f"({min(seconds):.2f} to {max(seconds):.2f})", flush=True)


def write_plainly(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        for _ in range(size >> 24):
            file.write(bytes(1 << 24))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--millions", type=int, default=100, help="parameters")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    world = resolve_world(os.environ)
    start(world, 10)
    config = complete_ds_config(
        {"train_micro_batch_size_per_gpu": 1,
         "zero_optimization": {"stage": arguments.stage}}, world.world_size, 1.0, world.world_size)
    layers = round(arguments.millions * 1e6 / WIDTH**2)
    model = build_sharded(
        lambda: nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)]),
        config,
    )
    engine, _ = build_engine(model, set(), OptimizerConfig(), config)
    engine.backward(engine(torch.ones(1, WIDTH)).square().mean())
    engine.step()
    ema, count, run_dir = EMA(engine, 0.9), layers * WIDTH**2, arguments.folder / "run"

    def save() -> Path:
        return save_checkpoint(engine, run_dir, 1, {}, Retention(), world, ema)

    def resume() -> None:
        found = find_checkpoint(run_dir, world)
        assert found
        load_checkpoint(engine, found, world, ema)

    tag = save()
    if world.is_main:
        size = sum(size for size, _ in read_contents(tag).files.values())
        print(f"{count:,} parameters, ZeRO-{arguments.stage}, {world.world_size} ranks: "
              f"{size / count:.3f} bytes per parameter with EMA, manifest "
              f"{(tag / 'manifest.json').stat().st_size:,} bytes")
    share = 16 * count // world.world_size
    plain = arguments.folder / f"plain{world.rank}"
    measure("as many bytes, written and synced", world, arguments.repeat,
            lambda: write_plainly(plain, share))
    measure("save with EMA", world, arguments.repeat, save)
    measure("resume: every hash checked, then loaded", world, arguments.repeat, resume)
    ds_folder = str(arguments.folder / "deepspeed")
    measure("DeepSpeed's save (no EMA, no hash, not synced)", world, arguments.repeat,
            lambda: engine.save_checkpoint(ds_folder, tag="x"))
    for _ in range(arguments.repeat):
        measure("ema.update()", world, 1, ema.update)
    barrier(world)
    if world.is_main:
        shutil.rmtree(arguments.folder)
    shutdown()


if __name__ == "__main__":
    main()
