"""Host memory and time of loading a full-size Wan2.2-TI2V-5B checkpoint under zero.Init.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 benchmarks/load_memory.py --folder /big/disk

writes a synthetic checkpoint of the released shapes (random bf16, shards of about 2 GB with an
index, 10 GB), builds the video tower under zero.Init in bf16, streams the checkpoint in and prints,
for each rank, its share of the model and the most memory beyond it. Mapped pages of the files are
the kernel's and are not counted.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from model import AVFullDiT, AVFullDiTConfig, VideoDiTConfig  # noqa: E402
from model.weights.load import load_pretrained  # noqa: E402
from model.weights.names import released_name  # noqa: E402
from model.weights.released import WAN_FIXED  # noqa: E402
from tests.support.workers.zero_init_worker import BF16, anonymous_mib  # noqa: E402
from training.engine import write_parameter  # noqa: E402

SHARD_BYTES = 2_000_000_000


def write_checkpoint(config: AVFullDiTConfig, wan: Path) -> None:
    """A released layout of random bf16 tensors, one shard in memory at a time."""
    folder = wan / "transformer"
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AVFullDiT(config)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size, weight_map = 0, {}
    parameters = list(model.named_parameters())
    for index, (ours, parameter) in enumerate(parameters):
        key = released_name(ours, config)
        assert key is not None
        values = torch.empty(parameter.shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        shards[-1][key[1]] = values
        size += values.nbytes
        if size >= SHARD_BYTES or index == len(parameters) - 1:
            name = f"diffusion_pytorch_model-{len(weight_map):05d}.safetensors"
            save_file(shards[-1], folder / name)
            weight_map |= dict.fromkeys(shards[-1], name)
            shards, size = [{}], 0
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    values = dataclasses.asdict(config.video) | WAN_FIXED
    (folder / "config.json").write_text(json.dumps(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint; reused")
    parser.add_argument("--layers", type=int, default=VideoDiTConfig.num_layers)
    arguments = parser.parse_args()
    deepspeed.init_distributed("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    video = dataclasses.replace(VideoDiTConfig(), num_layers=arguments.layers)
    config = AVFullDiTConfig(task="t2v", video=video, audio=None)
    if rank == 0 and not (arguments.folder / "transformer/config.json").is_file():
        write_checkpoint(config, arguments.folder)
    dist.barrier()

    before_build = anonymous_mib()
    with deepspeed.zero.Init(config_dict_or_path=BF16):
        model = AVFullDiT(config)
    sizes = [torch.Size(p.ds_shape).numel() * 2 / 2**20 for p in model.parameters()]
    built, peak = anonymous_mib(), 0.0

    def write(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> None:
        nonlocal peak
        write_parameter(parameter, tensor)
        peak = max(peak, anonymous_mib())

    began = time.perf_counter()
    load_pretrained(model, arguments.folder, None, write=write)
    found = {
        "rank": rank, "ranks": world, "layers": arguments.layers,
        "model_mib": round(sum(sizes)), "largest_tensor_mib": round(max(sizes)),
        "share_mib": round(built - before_build), "beyond_share_mib": round(peak - built),
        "seconds": round(time.perf_counter() - began, 1),
    }
    for turn in range(world):
        dist.barrier()
        if turn == rank:
            print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
