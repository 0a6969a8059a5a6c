"""What logging costs: training steps in interleaved blocks, everything on and everything off.

    python -m benchmarks.logging_cost [--pairs 12] [--steps 1] [--batch 1] [--log-every 1]

The real widths of both towers (3072 and 1024), few layers, 2 s clips, the real engine.
"On" sums losses and work at every step, and logs norms per part, FLOPs and TensorBoard at every
`--log-every`-th; "off" leaves all of that out but the count of tokens in a forward's hook. The
blocks alternate, so that a machine that slows down slows both. Prints the median of the paired
ratios with a 95 % bootstrap interval. The cost grows with the parameters, not with what a step
trains on (`--batch`, `--frames`). Gauges and validation losses are not logging: their time is on
record as validation.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.guards import interval
from common.ranks import World
from model import AVFullDiT, AVFullDiTConfig
from model.flops import training_work
from model.flow import FlowConfig
from model.objective import Objective
from model.towers.audio_blocks import AudioDiTConfig
from model.towers.video_dit import VideoDiTConfig
from model.weights.load import new_parameter_names
from model.weights.names import part_of
from training import engine as ds
from training.distributed import shutdown, start
from training.ds_config import complete_ds_config
from training.metrics.accumulator import Scale, StepAccumulator
from training.metrics.norms import PartNorms, group_places
from training.metrics.writer import Clock, MetricWriter


def inputs(size: int, frames: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random numbers in the shapes of clips of `frames` latent frames at 192 x 320; 2 s are 13."""
    return {
        "noisy_video": torch.randn(size, 48, frames, 12, 20, device=device),
        "t": torch.full((size,), 0.7, device=device),
        "video_text": torch.randn(size, 128, 4096, device=device),
        "noisy_audio": torch.randn(size, 44, 64, device=device),
        "audio_text": torch.randn(size, 64, 1024, device=device),
        "audio_text_mask": torch.ones(size, 64, dtype=torch.bool, device=device),
        "duration": torch.full((size,), 2.04, device=device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=12, help="of blocks, one on and one off")
    parser.add_argument("--steps", type=int, default=1, help="of a block")
    parser.add_argument("--log-every", type=int, default=1, help="a divisor of --steps")
    parser.add_argument("--layers", type=int, default=1, help="joint layers; none is unimodal")
    parser.add_argument("--batch", type=int, default=1, help="clips a step")
    parser.add_argument("--frames", type=int, default=13)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    world = World(0, 1, 0, 1, "alone")
    start(world, 30)
    config = AVFullDiTConfig(
        video=VideoDiTConfig(num_layers=arguments.layers),
        audio=dataclasses.replace(AudioDiTConfig(), num_layers=0,
                                  num_single_layers=arguments.layers),
        num_joint_blocks=arguments.layers,
    )
    model = AVFullDiT(config)
    precision = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    ds_config = complete_ds_config(
        {"train_micro_batch_size_per_gpu": arguments.batch, "zero_optimization": {"stage": 2}}
        | (precision if arguments.dtype == "bf16" else {}), arguments.batch, 1.0, 1)
    new, optimizer = new_parameter_names(model), ds.OptimizerConfig()
    engine, _ = ds.build_engine(model, new, optimizer, ds_config)
    norms = PartNorms(engine, part_of, group_places(engine.module, new, optimizer), world)
    watch = StepAccumulator(engine, norms, Scale(arguments.batch, (1.0, 1.0), 1.0, 1, 1.0),
                  partial(training_work, config), None)
    objective, batch = Objective("t2av", 0, FlowConfig()), inputs(
        arguments.batch, arguments.frames, engine.device)
    clock, step = Clock(), 0
    blocks: dict[str, list[tuple[float, float]]] = {"on": [], "off": []}
    with tempfile.TemporaryDirectory() as folder:
        writer = MetricWriter(Path(folder), 0, 1)
        for pair in range(-1, arguments.pairs):  # the first pair warms up
            for name in sorted(blocks, reverse=pair % 2 == 0):
                began, worked = time.perf_counter(), time.process_time()
                for _ in range(arguments.steps):
                    step += 1
                    logged = step % arguments.log_every == 0
                    video, audio = engine(**batch)
                    losses = video.square().mean(), audio.square().mean()
                    engine.backward(objective.total(*losses))
                    if name == "on":
                        each = (loss.expand(arguments.batch) for loss in losses)
                        watch.losses(batch["t"].cpu(), *each,
                                     torch.ones(arguments.batch, device=engine.device))
                        watch.before_update(logged)
                    engine.step()
                    if name == "on":
                        watch.add(watch.take_sums().tolist(), True)
                    if name == "on" and logged:
                        values = watch.record(step, 0, clock.tick(watch.here), defaultdict(float))
                        writer.step(step, values, clock)
                if engine.device.type == "cuda":
                    torch.cuda.synchronize()
                if pair >= 0:
                    spent = time.perf_counter() - began, time.process_time() - worked
                    blocks[name].append(spent)
        writer.close(step, {"task": "t2av"})
    shutdown()
    count = ds.count_parameters(model.parameters())
    print(f"{count:,} parameters, {arguments.dtype}, {engine.device}, {os.cpu_count()} CPUs, "
          f"{arguments.pairs} pairs of blocks of {arguments.steps} steps, "
          f"one in {arguments.log_every} logged")
    for column, kind in enumerate(("wall", "CPU")):
        on, off = ([block[column] for block in blocks[name]] for name in ("on", "off"))
        middle, low, high = interval([a / b for a, b in zip(on, off, strict=True)])
        print(f"  {kind:4s} {statistics.median(on) / arguments.steps:.4f} s a step on, "
              f"{statistics.median(off) / arguments.steps:.4f} off; cost {middle - 1:+.2%} "
              f"[{low - 1:+.2%}, {high - 1:+.2%}]")


if __name__ == "__main__":
    main()
