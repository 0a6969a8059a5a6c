"""What logging costs: training steps in interleaved blocks, everything on and everything off.

    python -m benchmarks.logging_cost [--blocks 6] [--steps 3] [--layers 1]

The real widths of both towers (3072 and 1024), few layers, one 2 s clip a step, the real engine.
"On" logs every step with norms per part, FLOPs and TensorBoard; "off" leaves all of that out. The
blocks alternate, so that a machine that slows down slows both; the medians of single steps are
compared, on a CPU in seconds of processor time, which other work on the machine does not lengthen.
The cost grows with the parameters, not with the clip (`--frames` shortens it). Gauges and held-out
losses are not logging: their time is on record as validation.
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

from model import AVFullDiT, AVFullDiTConfig
from model.audio_blocks import AudioDiTConfig
from model.flops import training_work
from model.flow import FlowConfig
from model.names import part_of
from model.objective import Objective
from model.pretrained import new_parameter_names
from model.video_dit import VideoDiTConfig
from training import engine as ds
from training.distributed import World, shutdown, start
from training.ds_config import complete_ds_config
from training.health import Health, group_places
from training.metrics import Clock, MetricWriter
from training.watch import Scale, Watch


def inputs(frames: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random numbers in the shapes of a clip of `frames` latent frames at 192 x 320; 2 s are 13."""
    return {
        "noisy_video": torch.randn(1, 48, frames, 12, 20, device=device),
        "t": torch.tensor([0.7], device=device),
        "video_text": torch.randn(1, 128, 4096, device=device),
        "noisy_audio": torch.randn(1, 44, 64, device=device),
        "audio_text": torch.randn(1, 64, 1024, device=device),
        "audio_text_mask": torch.ones(1, 64, dtype=torch.bool, device=device),
        "duration": torch.tensor([2.04], device=device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=1, help="joint layers; none is unimodal")
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
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
        | (precision if arguments.dtype == "bf16" else {}), 1, 1.0, 1)
    new, optimizer = new_parameter_names(model), ds.OptimizerConfig()
    engine, _ = ds.build_engine(model, new, optimizer, ds_config)
    health = Health(engine, part_of, group_places(engine.module, new, optimizer), world)
    watch = Watch(engine, health, Scale(1, (1.0, 1.0), 1.0, 1, 1.0),
                  partial(training_work, config), None)
    objective, batch = Objective("t2av", 0, FlowConfig()), inputs(arguments.frames, engine.device)
    clock, seconds = Clock(), {True: [], False: []}  # type: ignore[var-annotated]
    now = time.perf_counter if engine.device.type == "cuda" else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        writer = MetricWriter(Path(folder), 0, 1)
        step = 0
        for block in range(2 * arguments.blocks + 1):
            on = block % 2 == 0
            for _ in range(arguments.steps):
                began, step = now(), step + 1
                video, audio = engine(**batch)
                losses = video.square().mean(), audio.square().mean()
                engine.backward(objective.total(*losses))
                if on:
                    watch.losses(batch["t"].cpu(), losses[0][None], losses[1][None],
                                 torch.ones(1, device=engine.device))
                    watch.before_update(True)
                engine.step()
                if on:
                    watch.add(watch.take_sums().tolist(), True)
                    values = watch.record(step, 0, clock.tick(1), defaultdict(float))
                    writer.step(step, values, clock)
                elif engine.device.type == "cuda":
                    torch.cuda.synchronize()
                if block:  # the first block warms up
                    seconds[on].append(now() - began)
        writer.close(step, {"task": "t2av"})
    shutdown()
    on, off = (statistics.median(seconds[key]) for key in (True, False))
    count = ds.count_parameters(model.parameters())
    print(f"{count:,} parameters, {arguments.dtype}, {engine.device}, {os.cpu_count()} CPUs: "
          f"on {on:.4f} s, off {off:.4f} s a step, cost {on / off - 1:+.2%} "
          f"({len(seconds[True])} and {len(seconds[False])} steps, interleaved)")


if __name__ == "__main__":
    main()
