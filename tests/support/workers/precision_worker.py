"""How exactly engines accumulate and reduce gradients, on two ranks; run by test_precision.py.

    torchrun --nproc-per-node=2 tests/support/workers/precision_worker.py OUT.json NAME=FILE.json \\
        ...

Writes name -> largest relative error of the gradient of eight bf16 micro-batches on two ranks,
against the fp32 sum of the same sixteen bf16 gradients.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import nn

from common.ranks import resolve_world
from training import engine as ds
from training.distributed import start
from training.ds_config import complete_ds_config, read_ds_config

WIDTH, MICRO_BATCHES, RANKS = 64, 8, 2


def batch(rank: int, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + index)
    return torch.randn(4, WIDTH, generator=generator).bfloat16()


def build() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=False)


def weight() -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16() / 8


def reference(dtype: torch.dtype) -> torch.Tensor:
    """Mean over ranks and micro-batches of the gradients that autograd gives in `dtype`."""
    model = build().to(dtype)
    model.weight.data.copy_(weight())
    total = torch.zeros(WIDTH, WIDTH)
    for rank in range(RANKS):
        for index in range(MICRO_BATCHES):
            model.zero_grad()
            model(batch(rank, index).to(dtype)).square().sum().backward()
            total += model.weight.grad.float()
    return total / (RANKS * MICRO_BATCHES)


def error(values: dict, rank: int) -> float:
    micro = values["train_micro_batch_size_per_gpu"]
    config = complete_ds_config(values, micro * MICRO_BATCHES * RANKS, 0.0, RANKS)
    model = ds.build_sharded(build, config)
    ds.write_parameter(model.weight, weight())
    engine, _ = ds.build_engine(model, set(), ds.OptimizerConfig(), config)
    dtype = next(engine.module.parameters()).dtype
    for index in range(MICRO_BATCHES):
        engine.backward(engine(batch(rank, index).to(dtype)).square().sum())
        if index < MICRO_BATCHES - 1:
            engine.step()
    found = safe_get_full_grad(engine.module.weight).float()
    expected = reference(dtype)
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    world = resolve_world(os.environ)
    start(world, 5)
    found = {}
    for argument in sys.argv[2:]:
        name, path = argument.split("=", 1)
        values = read_ds_config(path)
        zero = values.get("zero_optimization", {})
        zero |= {key: 10_000 for key in zero if key.endswith("bucket_size") and zero[key]}
        found[name] = error(values, world.rank)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
