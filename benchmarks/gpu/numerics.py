"""The real classes, small, on the GPU against the CPU; then the engine's whole life on the GPU.

    python -m benchmarks.gpu.numerics RESULT.json [--rehearse]

First part: loss and gradients of every variant of the model, fp32 (TF32 off) and bf16, against the
same weights in fp32 on the CPU. Second part: for ZeRO 1, 2, 3 in bf16, steps of train.py,
checkpoint, resume, EMA, update ratios, gauges, sampling and export.
"""

import argparse
import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import benchmarks.gpu.stand_in  # noqa: F401  # before train
import train
from benchmarks.gpu.common import (
    CLIPS,
    SMALL,
    Clip,
    Record,
    build,
    random_batch,
    randomise,
    relative,
    without_audio,
)
from common.ranks import World
from evaluation.gauges import Gauges
from model import AVFullDiT, AVFullDiTConfig
from model.flow import FlowConfig
from model.objective import Objective
from model.sampling import Prompts, sample
from model.weights.names import part_of
from training import engine as ds
from training.checkpoint.retention import Retention, find_checkpoint
from training.checkpoint.save_load import load_checkpoint, save_checkpoint
from training.distributed import leave, shutdown, start
from training.ds_config import complete_ds_config, read_ds_config
from training.ema import EMA
from training.guards.bad_numbers import GuardConfig
from training.guards.supervisor import StepAgreement, Supervisor
from training.guards.watchdog import WatchdogConfig
from training.metrics.norms import PartNorms, group_places

VARIANTS: dict[str, tuple[AVFullDiTConfig, dict[str, Any]]] = {
    "default": (SMALL, {}),
    "t2v": (without_audio(SMALL), {}),
    "double joint": (dataclasses.replace(SMALL, num_joint_blocks=4), {}),
    "stream": (dataclasses.replace(SMALL, audio_text="stream"), {}),
    "cross": (dataclasses.replace(SMALL, fusion="cross"), {}),
    "hybrid RoPE": (dataclasses.replace(SMALL, rope_layout="hybrid"), {}),
    "bias_warmup": (dataclasses.replace(SMALL, init="bias_warmup"), {"bias": -3.0}),
    "a clip without sound": (SMALL, {"silent": True}),
    "recompute": (SMALL, {"recompute": "full"}),
}


def gradients(model: AVFullDiT, batch: Any, bias: float = 0.0
              ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, and gradient by parameter name, on the CPU."""
    model.zero_grad()
    objective = Objective(model.config.task, 0, FlowConfig(caption_dropout=0.0))
    device = next(model.parameters()).device
    noised = objective.noise(batch, torch.tensor([0.3, 0.8]), 0, device)
    video, audio = objective.losses(model, noised, bias)
    loss = objective.total(video.mean(), audio.mean())
    loss.backward()
    return loss.detach().cpu(), {name: p.grad.float().cpu() for name, p in model.named_parameters()
                                 if p.grad is not None}


def errors(got: tuple[torch.Tensor, dict[str, torch.Tensor]],
           expected: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Relative errors of the loss, of all gradients as one vector and of the worst tensor."""
    (loss, grads), (loss_ref, refs) = got, expected
    assert grads.keys() == refs.keys()
    total = sum(float(ref.double().square().sum()) for ref in refs.values()) ** 0.5
    flat, flat_ref = (torch.cat([g[k].flatten() for k in refs]) for g in (grads, refs))
    # Tensors whose gradient is nothing but rounding (key biases) would always be the worst.
    real = [k for k, ref in refs.items() if float(ref.norm()) > 1e-4 * total]
    worst = max(real, key=lambda k: relative(grads[k], refs[k]))
    return {"loss": float((loss - loss_ref).abs() / loss_ref.abs()), "value": float(loss_ref),
            "gradients": relative(flat, flat_ref), "worst": worst,
            "worst tensor": relative(grads[worst], refs[worst])}


def variant(name: str, device: torch.device, grid: int) -> dict[str, Any]:
    """Errors of one variant in fp32 and bf16; bf16 against the bf16 weights in fp32."""
    config, options = VARIANTS[name]
    clip = CLIPS["2s"] if grid == 1 else Clip(2.0, 3, 12)
    batch = random_batch(config, clip, 2, grid)
    if options.get("silent"):
        batch = batch._replace(has_audio=torch.tensor([True, False]))
    bias, values = options.get("bias", 0.0), {}
    reference = build(config, torch.device("cpu"), torch.float32, "sdpa")
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.copy_(parameter.to(dtype))
        model = build(config, device, dtype)
        model.recompute = options.get("recompute", "none")
        model.load_state_dict(reference.state_dict())
        found = errors(gradients(model, batch, bias), gradients(reference, batch, bias))
        values[str(dtype).removeprefix("torch.")] = found | {"attention": model.attention_kernel}
    return values


class Sums:
    """What train.py's step tells its watch, kept as sums over the batch."""

    def losses(self, t: torch.Tensor, *columns: torch.Tensor) -> None:
        self.columns = torch.stack([column.detach().double().sum() for column in columns])

    def before_update(self, wanted: bool) -> None:
        pass

    def take_sums(self) -> torch.Tensor:
        return self.columns


class Life:
    """One small engine with what train.py puts around it."""

    def __init__(self, stage: int, device: torch.device, folder: str, agreement: Any) -> None:
        self.world, self.folder = World(0, 1, 0, 1, "alone"), Path(folder)
        self.agreement = agreement
        values = read_ds_config(f"ds_configs/zero{stage}.json")
        values["train_micro_batch_size_per_gpu"] = 2
        for key in ("reduce_bucket_size", "allgather_bucket_size"):
            if key in values["zero_optimization"]:
                values["zero_optimization"][key] = 5_000_000
        completed = complete_ds_config(values, 4, 1.0, 1)
        torch.manual_seed(0)
        model = ds.build_sharded(lambda: AVFullDiT(SMALL), completed)
        if stage < 3:
            randomise(model)
        self.optimizer = ds.OptimizerConfig(lr=1e-3)
        self.engine, _ = ds.build_engine(model, set(), self.optimizer, completed)
        self.ema = EMA(self.engine, 0.9)
        grid = 1 if device.type == "cuda" else 2
        clip = CLIPS["2s"] if grid == 1 else Clip(2.0, 3, 12)
        self.batch = random_batch(SMALL, clip, 4, grid)
        self.objective = Objective("t2av", 0, FlowConfig(caption_dropout=0.0))

    def steps(self, first: int, last: int) -> list[float]:
        """Training losses of steps first ... last, each with noise of its own."""
        losses = []
        for step in range(first, last + 1):
            sums: Any = Sums()
            train.train_step(self.engine, step, self.batch, step, self.objective, {},
                             self.agreement, sums)
            losses.append(float(sums.columns[0] + sums.columns[1]))
            self.ema.update()
        return losses


def life(stage: int, device: torch.device) -> dict[str, Any]:
    """Four steps against two, a checkpoint, a new engine and two more; then what looks at it."""
    world = World(0, 1, 0, 1, "alone")
    with tempfile.TemporaryDirectory() as folder, Supervisor(
            {"run_dir": folder}, WatchdogConfig(), world) as supervisor:
        agreement = StepAgreement(supervisor, GuardConfig(), 1, None, device)
        whole = Life(stage, device, folder, agreement)
        straight = whole.steps(1, 2)
        save_checkpoint(whole.engine, whole.folder, 2, {}, Retention(), world, whole.ema)
        straight += whole.steps(3, 4)
        resumed = Life(stage, device, folder, agreement)
        found = find_checkpoint(Path(folder), world)
        assert found is not None
        load_checkpoint(resumed.engine, found, world, resumed.ema)
        again = resumed.steps(3, 4)
        engine = resumed.engine
        norms = PartNorms(engine, part_of, group_places(engine.module, set(), resumed.optimizer),
                        world)
        gauges = Gauges(engine.module)
        noised = resumed.objective.noise(resumed.batch, torch.full((4,), 0.5), 0, device)
        with torch.no_grad(), gauges.on(torch.ones(4, dtype=torch.bool)):
            engine(**noised.inputs)
        masses = {name: float(total / count) for name, (total, count) in gauges.sums.items()}
        return {
            "straight": straight, "resumed": again, "bit for bit": straight[2:] == again,
            "falls": straight[-1] < straight[0], "update ratios": norms.update_ratios(),
            "gauges": masses, "ema": emas(resumed, noised),
            "sample": sampled(engine, resumed.batch, device) if stage < 3 else None,
            "export": exported(engine.module, folder) if stage < 3 else None,
        }


def emas(run: Life, noised: Any) -> dict[str, float]:
    """Loss with the weights, with their average, and with the weights again."""
    values = {}
    with torch.no_grad():
        values["weights"] = float(run.objective.losses(run.engine, noised)[0].mean())
        with run.ema.swapped_in():
            values["average"] = float(run.objective.losses(run.engine, noised)[0].mean())
        values["back"] = float(run.objective.losses(run.engine, noised)[0].mean())
    return values


def sampled(engine: Any, batch: Any, device: torch.device) -> bool:
    """Two steps of the sampler give finite latents of both modalities."""
    prompts = Prompts(batch.padded_video_text.to(device), batch.audio_text.to(device),
                      batch.audio_text_mask.to(device))
    noise = [torch.randn(x.shape, device=device) for x in (batch.video_latents, batch.audio_mean)]
    video, audio = sample(engine, prompts, prompts, noise[0], noise[1], batch.duration.to(device),
                          num_steps=2)
    assert audio is not None
    return bool(video.isfinite().all() and audio.isfinite().all())


def exported(model: Any, folder: str) -> bool:
    """save_pretrained and from_pretrained onto the GPU, bit for bit."""
    path, device = Path(folder, "export"), next(model.parameters()).device
    model.save_pretrained(path)
    loaded = AVFullDiT.from_pretrained(path, device=device)
    return all(bool((a == b).all()) for a, b in
               zip(model.parameters(), loaded.parameters(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    input()  # the driver says when the device is free
    record = Record(arguments.result)
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    torch.backends.cudnn.allow_tf32 = False
    names = list(VARIANTS)[:2] if arguments.rehearse else list(VARIANTS)
    for name in names:
        record.attempt(f"numerics: {name}",
                       partial(variant, name, device, 2 if arguments.rehearse else 1))
    torch.backends.cudnn.allow_tf32 = True
    start(World(0, 1, 0, 1, "alone"), 10)
    for stage in (2,) if arguments.rehearse else (1, 2, 3):
        record.attempt(f"life: zero{stage}", partial(life, stage, device))
    shutdown()
    leave(0)


if __name__ == "__main__":
    main()
