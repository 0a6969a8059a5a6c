"""What DeepSpeed's own checkpoints do, on two real ranks; run by test_library_checkpoint.py.

    torchrun --nproc-per-node=2 tests/support/workers/library_worker.py FOLDER

Prints `NAME: ...` for each defect that was met; one that is gone prints nothing.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from torch import nn

from common.ranks import World, barrier, gather_objects, resolve_world
from tests.support.workers.checkpoint_worker import ZERO3, Model
from training.distributed import shutdown, start
from training.ds_config import complete_ds_config
from training.engine import OptimizerConfig as Optimizer
from training.engine import build_sharded, parameter_groups
from training.zero_state import find_buffers


def build(world: World, lr: float = 0.01, stage: int = 3, accumulate: int = 1, **extra):
    """A plain engine with groups of different lr and weight decay, as a DeepSpeed user has it."""
    values = {"train_micro_batch_size_per_gpu": 1,
              "zero_optimization": (ZERO3 if stage == 3 else {"stage": stage})
              | extra.pop("zero", {})} | extra
    config = complete_ds_config(values, world.world_size * accumulate, 1.0, world.world_size)
    torch.manual_seed(0)
    model = build_sharded(Model, config)
    groups = parameter_groups(model, {"new.weight", "new.bias"},
                              Optimizer(lr=lr, weight_decay=0.1, lr_new=3.0))
    adam = torch.optim.AdamW(groups, lr=lr)
    return deepspeed.initialize(model=model, optimizer=adam, config=config)[0]


def train(engine: deepspeed.DeepSpeedEngine) -> None:
    loss = engine(torch.ones(1, 7).to(next(engine.module.parameters()).dtype)).square().mean()
    engine.backward(loss)
    engine.step()


def weights(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    """This rank's part, without the padding, which is never initialised."""
    return torch.cat([shard.flat[p.start : p.start + p.length]
                      for shard in find_buffers(engine) for p in shard.pieces])


def settings(engine: deepspeed.DeepSpeedEngine) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in engine.optimizer.param_groups]


def fails(action) -> str:
    """The type of what is raised, or ''."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 whatever the library raises
        return type(error).__name__
    return ""


class Judge:
    """Says a defect when every rank has met it."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, name: str, met: bool, what: str) -> None:
        if all(gather_objects(bool(met), self.world)) and self.world.is_main:
            print(f"{name}: {what}", flush=True)


def loading(folder: Path, world: World, judge: Judge) -> None:
    engine = build(world)
    states = {}
    for step in range(1, 5):
        train(engine)
        states[step] = weights(engine)
        if step % 2 == 0:
            engine.save_checkpoint(str(folder), tag=f"step{step}",
                                   client_state={"global_steps": 999, "rank": world.rank})
    other = build(world)
    path, _ = other.load_checkpoint(str(folder), tag="step2", load_optimizer_states=False)
    judge("F3", path and "step2" in path and torch.equal(weights(other), states[4]),
          "asked for step2 without optimiser states, the weights are those of `latest`, step4")
    other = build(world)
    fresh = weights(other)
    path, _ = other.load_checkpoint(str(folder), tag="step2", load_module_only=True)
    judge("F4", path and torch.equal(weights(other), fresh), "load_module_only loads nothing")
    found = other.load_checkpoint(str(folder / "nowhere"))
    judge("F5", found == (None, None), "no checkpoint: no error, training would start afresh")
    random = torch.get_rng_state()
    torch.manual_seed(7)
    _, client = other.load_checkpoint(str(folder), tag="step4")
    judge("F12", not torch.equal(torch.get_rng_state(), random), "random state is not restored")
    judge("F13a", other.global_steps == 999, "a key of client_state overwrites the engine's own")
    other = build(world, lr=0.5)
    other.load_checkpoint(str(folder), tag="step4")
    judge("F15", settings(other)[0][0] == 0.01, "the file's learning rate wins over the config's")
    other = build(world, zero={"sub_group_size": 30})
    judge("F16a", fails(lambda: other.load_checkpoint(str(folder), tag="step4")) == "ValueError",
          "another sub_group_size cannot be loaded")
    other = build(world, stage=2)
    judge("F16b", fails(lambda: other.load_checkpoint(str(folder), tag="step4")),
          "another ZeRO stage cannot be loaded")


def universal(folder: Path, world: World, judge: Judge) -> None:
    engine = build(world)
    train(engine)
    for state in engine.optimizer.optimizer.state.values():
        state["ema"] = torch.ones_like(state["exp_avg"])
    engine.save_checkpoint(str(folder), tag="step1")
    if world.is_main:
        ds_to_universal.main(argparse.Namespace(
            input_folder=str(folder / "step1"), output_folder=str(folder / "step1_u"),
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
            inject_missing_state=False))
    barrier(world)
    kinds = {path.stem for path in folder.glob("step1_u/zero/*/*.pt")}
    judge("F8", {"exp_avg", "fp32"} <= kinds and "ema" not in kinds,
          f"converted to {sorted(kinds)}: a state that is not Adam's is dropped")
    other = build(world, checkpoint={"load_universal": True})
    expected = settings(other)
    other.load_checkpoint(str(folder), tag="step1_u")
    judge("F7", torch.equal(weights(other), weights(engine)) and settings(engine) == expected
          and len(set(expected)) > 1 and len(set(settings(other))) == 1,
          f"groups {expected} become {settings(other)}")


def saving(folder: Path, world: World, judge: Judge) -> None:
    engine = build(world, accumulate=2)
    for _ in range(3):
        train(engine)
    engine.save_checkpoint(str(folder / "half"), tag="x")
    other = build(world, accumulate=2)
    other.load_checkpoint(str(folder / "half"), tag="x")
    judge("F17", engine.micro_steps == 3 and other.micro_steps % 2 == 0,
          "half a step of accumulation is saved without a word and lost")
    engine = build(world, stage=2)
    train(engine)
    engine.save_checkpoint(str(folder / "two"), tag="x", client_state={"mine": world.rank})
    other = build(world, stage=2)
    _, client = other.load_checkpoint(str(folder / "two"), tag="x")
    judge("F13b", client["mine"] == 0, "stage 2 keeps rank 0's client_state only")
    engine = build(world)
    train(engine)
    name = f"own{world.rank}"
    engine.save_checkpoint(str(folder / name), tag="x")
    shards = list((folder / name / "x").glob("*optim_states.pt"))
    judge("F18", len(shards) == 1, "ranks that save to different folders: no error, two halves")


def first_step(world: World, judge: Judge) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    before = model.weight.detach().bfloat16().float()
    adam = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.1)
    config = complete_ds_config({"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}},
                                world.world_size, 1.0, world.world_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    after = engine.optimizer.fp32_groups[0][0].detach()
    judge("F46", not torch.equal(before, after) and int(
        engine.optimizer.optimizer.state_dict()["state"][0]["step"]) == 1,
        "bf16 at stage 0 takes an optimiser step, with weight decay, before the first one")


def torn(folder: Path, world: World) -> None:
    """Last: rank 1 meets a full disk, which nobody hears of. Ends both processes."""
    engine = build(world)
    train(engine)
    engine.save_checkpoint(str(folder), tag="good")

    def full(state_dict, path):
        raise OSError(28, "No space left on device")

    if world.rank == 1:
        engine.checkpoint_engine.save = full
    failed = fails(lambda: engine.save_checkpoint(str(folder), tag="torn"))
    if world.rank == 1:
        latest, until = folder / "latest", time.monotonic() + 20
        while latest.read_text() != "torn" and time.monotonic() < until:
            time.sleep(0.05)
        missing = not list((folder / "torn").glob("*rank_1_*optim_states.pt"))
        if latest.read_text() == "torn" and failed == "OSError" and missing:
            print("F1 F2: `latest` names a checkpoint without rank 1's shard", flush=True)
    sys.stdout.flush()
    os._exit(0)  # rank 0 waits for rank 1 inside DeepSpeed, or has lost it


def main() -> None:
    warnings.filterwarnings("ignore")
    world = resolve_world(os.environ)
    start(world, 1)
    folder, judge = Path(sys.argv[1]), Judge(world)
    loading(folder / "loading", world, judge)
    universal(folder / "universal", world, judge)
    saving(folder / "saving", world, judge)
    first_step(world, judge)
    barrier(world)
    torn(folder / "torn", world)
    shutdown()


if __name__ == "__main__":
    main()
