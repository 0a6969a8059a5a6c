"""Checkpoints on real ranks and engines; run by test_checkpoint.py.

    torchrun --nproc-per-node=N tests/support/workers/checkpoint_worker.py FOLDER \\
        PART[:ENGINE,...]...

PART: exact, offload, or the folder that `exact` left on N ranks, exactN. Each check prints
its name when it held; an assertion ends the process.
"""

import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from common.ranks import World, barrier, gather_objects, resolve_world
from training import engine
from training.checkpoint import contents, retention, save_load
from training.distributed import leave, shutdown, start
from training.ds_config import complete_ds_config
from training.ema import EMA
from training.zero_state import find_buffers, read_moments

GLOBAL_BATCH, DECAY = 4, 0.75
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
ENGINES: dict[str, dict] = {
    "stage0": {},
    "stage1": {"zero_optimization": {"stage": 1}},
    "stage2": {"zero_optimization": {"stage": 2}},
    "stage3": {"zero_optimization": ZERO3},
    # Several flat buffers per group, some parameters whole on every rank.
    "stage3_small": {"zero_optimization": ZERO3 | {
        "sub_group_size": 50, "stage3_param_persistence_threshold": 20}},
    "bf16_stage1": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True},
                    "data_types": {"grad_accum_dtype": "fp32"}},
    "bf16_stage2": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True},
                    "data_types": {"grad_accum_dtype": "fp32"}},
    "bf16_stage3": {"zero_optimization": ZERO3, "bf16": {"enabled": True},
                    "data_types": {"grad_accum_dtype": "fp32"}},
}
OFFLOADED = {
    f"offload{stage}": {"zero_optimization": ENGINES[f"stage{stage}"]["zero_optimization"]
                        | {"offload_optimizer": {"device": "cpu"}}} for stage in (2, 3)
}


class Model(nn.Module):
    """Sizes that no world size divides; four parameter groups (decayed or not, new or not)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 5)
        self.new = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.new(torch.tanh(self.second(torch.tanh(self.first(x)))))


NEW = {"new.weight", "new.bias"}
OPTIMIZER = engine.OptimizerConfig(lr=0.02, weight_decay=0.1, lr_new=3.0)


def build(name: str, world: World, seed: int = 0, accumulate: bool = True):
    micro = 1 if accumulate else GLOBAL_BATCH // world.world_size
    values = {"train_micro_batch_size_per_gpu": micro} | (ENGINES | OFFLOADED)[name]
    config = complete_ds_config(values, GLOBAL_BATCH, 1.0, world.world_size)
    torch.manual_seed(seed)
    model = engine.build_sharded(Model, config)
    return engine.build_engine(model, NEW, OPTIMIZER, config)[0]


def train(made, step: int, world: World, ema: EMA | None = None) -> float:
    """One update; the samples are a function of the step and the place in the global batch."""
    share, dtype = GLOBAL_BATCH // world.world_size, next(made.module.parameters()).dtype
    x = torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(step))
    mine = x[world.rank * share : (world.rank + 1) * share].to(dtype)
    micro, total = made.train_micro_batch_size_per_gpu(), 0.0
    for part in mine.split(micro):
        loss = (made(part) - part.sum(1, keepdim=True)).float().square().mean()
        made.backward(loss)
        made.step()
        total += loss.item() * len(part)
    if ema:
        ema.update()
    return total


def state(made, ema: EMA) -> list[torch.Tensor]:
    """All that a checkpoint must bring back, of this rank; without the buffers' padding."""
    tensors = []
    for shard, average in zip(find_buffers(made), ema.flats, strict=True):
        for flat in (shard.flat, *read_moments(made, shard).values(), average):
            tensors += [flat[p.start : p.start + p.length].clone() for p in shard.pieces]
    return tensors


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def save(made, run_dir: Path, step: int, world: World, ema: EMA | None = None, **keep) -> Path:
    tag = save_load.save_checkpoint(made, run_dir, step, {}, retention.Retention(**keep), world,
                                    ema)
    barrier(world)  # rank 0 may still be deleting old ones
    return tag


def resume(made, run_dir: Path, world: World, ema: EMA | None = None) -> int | None:
    found = retention.find_checkpoint(run_dir, world)
    if found is None:
        return None
    save_load.load_checkpoint(made, found, world, ema)
    return found.contents.step


def exact(folder: Path, world: World, names: list[str]) -> None:
    """N steps + a checkpoint + N steps are 2N steps, bit for bit, in every engine."""
    for name in names:
        straight = build(name, world)
        average = EMA(straight, DECAY)
        for step in range(3):
            train(straight, step, world, average)
        save(straight, folder / name, 3, world, average)
        resumed = build(name, world, seed=1)
        other = EMA(resumed, DECAY)
        assert resume(resumed, folder / name, world, other) == 3
        assert same(state(straight, average), state(resumed, other)), name
        with other.swapped_in():  # as a validation between two steps does
            resumed(torch.zeros(1, 7).to(next(resumed.module.parameters()).dtype))
        for step in range(3, 6):
            expected = train(straight, step, world, average)
            assert train(resumed, step, world, other) == expected, name
        assert same(state(straight, average), state(resumed, other)), name
        groups = [made.optimizer.param_groups for made in (straight, resumed)]
        for before, after in zip(*groups, strict=True):
            assert before["lr"] == after["lr"] and before["weight_decay"] == after["weight_decay"]
        assert len({group["weight_decay"] for group in groups[1]}) == 2
        save(resumed, folder / name, 6, world, other)
        say(f"exact {name}", world)


def read_back(folder: Path, world: World, names: list[str]) -> None:
    """Each of `names`, saved by `exact` on another world size, resumed by itself and the next."""
    for index, saved in enumerate(names):
        _, weights = save_load.read_weights(folder / saved)
        _, average = save_load.read_weights(folder / saved, ema=True)
        for name in (saved, names[(index + 1) % len(names)]):
            copy = folder / f"{saved}_{name}_{world.world_size}"
            if world.is_main:
                shutil.copytree(folder / saved, copy)
            barrier(world)
            made = build(name, world, seed=2)
            ema = EMA(made, DECAY)
            assert resume(made, copy, world, ema) == 6
            save(made, copy, 7, world, ema)
            for kind, expected in ((False, weights), (True, average)):
                _, again = save_load.read_weights(copy, 7, ema=kind)
                assert same(list(expected.values()), list(again.values())), (saved, name)
            before = contents.read_contents(copy / "checkpoints" / retention.tag_of(6))
            after = contents.read_contents(copy / "checkpoints" / retention.tag_of(7))
            assert before.updates == after.updates == 6 and before.groups == after.groups
            losses = [train(made, step, world, ema) for step in (7, 8)]
            whole = [sum(gather_objects(loss, world)) / GLOBAL_BATCH for loss in losses]
            if ("bf16" in saved) == ("bf16" in name):
                say(f"losses {folder.name}/{saved} {' '.join(map(str, whole))}", world)


def say(name: str, world: World) -> None:
    barrier(world)
    if world.is_main:
        print(name, flush=True)


def main() -> None:
    warnings.filterwarnings("ignore")
    world = resolve_world(os.environ)
    start(world, 2)
    folder = Path(sys.argv[1])
    for argument in sys.argv[2:]:
        part, _, chosen = argument.partition(":")
        names = chosen.split(",") if chosen else list(ENGINES)
        if part == "exact":
            exact(folder / f"exact{world.world_size}", world, names)
        elif part == "offload":
            exact(folder / "offload", world, list(OFFLOADED))
        else:  # the folder of another world size
            read_back(folder / part, world, names)
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
