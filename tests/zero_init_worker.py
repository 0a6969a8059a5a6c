"""Build the tiny model plainly and under deepspeed.zero.Init, and compare every parameter.

Run by tests/test_model_zero_init.py in a process of its own, because zero.Init patches torch.
Prints one JSON object: parameters compared, partitioned ones, differing ones, fixed-point facts.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed  # noqa: E402
import torch  # noqa: E402

from model import AVFullDiT  # noqa: E402
from tests import towers  # noqa: E402

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    # No tensor is small enough to stay whole, so that every parameter is really partitioned.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def build(seed: int = 7) -> AVFullDiT:
    torch.manual_seed(seed)
    return AVFullDiT(towers.EARLY_SINGLE)


def gathered(model: AVFullDiT) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def main() -> None:
    deepspeed.init_distributed("gloo")
    plain = build()
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        sharded = build()
    shapes = {name: tuple(p.ds_shape) for name, p in sharded.named_parameters()}
    partitioned = sum(parameter.numel() == 0 for parameter in sharded.parameters())
    expected, found = plain.state_dict(), gathered(sharded)
    differing = [
        name for name in expected
        if name not in found or not torch.equal(expected[name], found[name])
        or tuple(expected[name].shape) != shapes[name]
    ]
    print(json.dumps({
        "parameters": len(expected), "found": len(found), "partitioned": partitioned,
        "differing": differing,
    }))


if __name__ == "__main__":
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    main()
