"""Norms per part on real engines against a dense, unsharded reference; run by test_norms.py.

    torchrun --nproc-per-node=N tests/support/workers/health_worker.py
"""

import copy
import os
import sys
import warnings

import pytest
import torch

from common.ranks import World, resolve_world, sum_over_ranks
from tests.support.workers.checkpoint_worker import (
    ENGINES,
    GLOBAL_BATCH,
    NEW,
    OPTIMIZER,
    Model,
    build,
)
from training import engine as ds
from training.distributed import leave, shutdown, start
from training.metrics.norms import PartNorms, group_places
from training.zero_state import find_buffers, parameter_shapes

STEPS = 3
PARTS = {"first": "video_tower", "second": "audio_tower", "new": "joint_new"}


def part_of(name: str) -> str:
    return PARTS[name.split(".")[0]]


def batch(step: int) -> torch.Tensor:
    return torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(step))


def loss_of(model, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x.sum(1, keepdim=True)).float().square().mean()


def dense(start_at: dict[str, torch.Tensor]) -> list[tuple[dict, dict]]:
    """Per step (gradient norms, update ratios) of plain torch on the whole batch."""
    model = Model()
    model.load_state_dict(start_at)
    adam = torch.optim.AdamW(
        ds.parameter_groups(model, NEW, OPTIMIZER), betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    found = []
    for step in range(STEPS):
        adam.zero_grad()
        loss_of(model, batch(step)).backward()
        norms = by_part({name: p.grad for name, p in model.named_parameters()})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = copy.deepcopy(model.state_dict())
        adam.step()
        moved = by_part({name: value - before[name] for name, value in model.state_dict().items()})
        weights = by_part(before)
        found.append((norms, {part: moved[part] / weights[part] for part in moved}))
    return found


def by_part(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(part_of(name), []).append(tensor.flatten())
    return {part: float(torch.cat(pieces).norm()) for part, pieces in parts.items()}


def whole_weights(made, world: World) -> dict[str, torch.Tensor]:
    """What the engine starts from: a bf16 `zero.Init` draws other numbers than a plain model."""
    weights = {name: torch.zeros(shape) for name, shape in parameter_shapes(made).items()}
    for shard in find_buffers(made):
        for piece in shard.owned(world):
            place = weights[piece.name].view(-1)[piece.begin : piece.begin + piece.length]
            place += shard.flat[piece.start : piece.start + piece.length].cpu()
    return {name: sum_over_ranks(weight) for name, weight in weights.items()}


def watched(made, name: str, world: World) -> list[tuple[dict, dict]]:
    groups = group_places(made.module, NEW, OPTIMIZER)
    part_norms = PartNorms(made, part_of, groups, world)
    share, dtype = GLOBAL_BATCH // world.world_size, next(made.module.parameters()).dtype
    found = []
    for step in range(STEPS):
        mine = batch(step)[world.rank * share : (world.rank + 1) * share].to(dtype)
        norms = None
        for part in mine.split(made.train_micro_batch_size_per_gpu()):
            made.backward(loss_of(made, part))
            if made.is_gradient_accumulation_boundary():
                norms = part_norms.gradient_norms()
                total = sum(norm**2 for norm in norms.values()) ** 0.5
            made.step()
        own = made.get_global_grad_norm()
        assert own is None or float(own) == pytest.approx(total, rel=1e-5), name
        found.append((norms, part_norms.update_ratios()))
    return found


def check(name: str, world: World) -> None:
    made = build(name, world)
    expected = dense(whole_weights(made, world))
    tolerance = 0.05 if name.startswith("bf16") else 2e-4
    for step, (got, wanted) in enumerate(zip(watched(made, name, world), expected, strict=True)):
        for kind, values, reference in zip(("gradient", "update"), got, wanted, strict=True):
            assert values == pytest.approx(reference, rel=tolerance), (name, step, kind)
    if world.is_main:
        print(f"held {name}", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    world = resolve_world(os.environ)
    start(world, 5)
    for name in sys.argv[1:] or ENGINES:
        check(name, world)
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)  # as train.py does: an interpreter that winds down under gloo may abort
