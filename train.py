"""Train AVFullDiT, or its T2V-only twin, from a YAML file.

    python train.py configs/playground.yaml                      # one device
    bash launch/local.sh 8 configs/alt_merge_t2av.yaml           # one node
    sbatch launch/train.sbatch configs/alt_merge_t2av.yaml       # a cluster
    ... optimizer.lr=2e-5 run_dir=runs/other                     # any key of the YAML

The same command resumes. t, noise, caption drop and the audio latent's draw are functions of
(seed, epoch, sample id), the learning rate is a function of the step: nothing of either depends on
rank or world size, and a t2v run meets the video noise of its t2av twin.
"""

import dataclasses
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from data.dataset import HeldOut, build_loader
from data.provenance import check_provenance
from data.schema import Batch, DataError
from data.sources import DataConfig, Opened, check_data
from model import AVFullDiT, AVFullDiTConfig, JointConfig
from model.attention import Attention
from model.flow import FlowConfig
from model.objective import VALIDATION_EPOCH, VALIDATION_T, Objective
from model.pretrained import (
    PretrainedError,
    check_weights,
    load_pretrained,
    new_parameter_names,
    read_tower_configs,
)
from model.selfcheck import check_stitch, describe
from training import engine as ds
from training.checkpoint import check_same_model, find_checkpoint, load_checkpoint, save_checkpoint
from training.config import ConfigError, load_config
from training.distributed import World, WorldError, resolve_world, shutdown, start, sum_over_ranks
from training.metrics import Clock, MetricWriter, format_seconds, peak_memory_gib
from training.run_dir import CheckpointError, lock_run


@dataclass(frozen=True)
class RunConfig:
    """One experiment; every key of the YAML. The engine's knobs are in the `deepspeed` JSON."""

    run_dir: str
    wan: str  # diffusers-layout folder or hub id
    tangoflux: str  # TangoFlux's own files, folder or hub id
    data: DataConfig
    task: Literal["t2av", "t2v"] = "t2av"
    seed: int = 0
    model: JointConfig = field(default_factory=JointConfig)  # the ablations
    flow: FlowConfig = field(default_factory=FlowConfig)
    optimizer: ds.OptimizerConfig = field(default_factory=ds.OptimizerConfig)
    warmup_steps: int = 100  # linear, then constant
    gradient_clipping: float = 1.0
    global_batch_size: int = 8
    max_steps: int = 7500
    deepspeed: str = "ds_configs/zero2.json"
    recompute: Literal["none", "full"] = "none"
    attention: str = "auto"
    self_check: bool = True  # at the first start: the stitched model contains both backbones
    check: Literal["none", "weights"] = "none"  # weights: report on the downloads and stop
    log_every: int = 1
    validate_every: int = 500
    validation_samples: int | None = None  # None: the whole held-out split
    save_every: int = 500
    keep_checkpoints: int = 2
    timeout_minutes: float = 30.0  # of a collective

    def __post_init__(self) -> None:
        for key in ("global_batch_size", "max_steps", "log_every", "validate_every", "save_every",
                    "validation_samples"):
            if (getattr(self, key) or 1) < 1 or getattr(self, key) == 0:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("warmup_steps", "gradient_clipping", "timeout_minutes"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key}={getattr(self, key)} must not be negative")
        if self.keep_checkpoints < 2:  # the newest may be the one that is being written
            raise ValueError(f"keep_checkpoints={self.keep_checkpoints} must be at least 2")


def build_model_config(config: RunConfig, stream: Opened) -> AVFullDiTConfig:
    """Tower shapes from the backbones' own files, rates from the shards, the rest from the YAML."""
    metadata, sound = stream.metadata, config.task == "t2av"  # t2v needs nothing of TangoFlux
    video, audio = read_tower_configs(config.wan, config.tangoflux if sound else None)
    widths = [("video latents", metadata.video_latent_shape[0], video.in_channels),
              ("video text states", metadata.video_text_width, video.text_dim)]
    if audio:
        widths += [("audio latents", metadata.audio_latent_shape[1], audio.in_channels),
                   ("audio text states", metadata.audio_text_width, audio.joint_attention_dim)]
    for what, stored, taken in widths:
        if stored != taken:
            raise ConfigError(
                f"data.root={stream.place} holds {what} of width {stored}, but the backbones "
                f"(wan={config.wan}, tangoflux={config.tangoflux}) take {taken}: prepare the data "
                "with the encoders of the same folders"
            )
    try:
        Attention(config.attention)
        return AVFullDiTConfig(
            task=config.task,
            video=video,
            audio=audio,
            **dataclasses.asdict(config.model),
            fps=metadata.fps,
            video_temporal_stride=metadata.video_temporal_stride,
            sample_rate=metadata.sample_rate,
            audio_hop=metadata.audio_hop,
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error


class Plan(NamedTuple):
    """All that is known before a process group or a model exists."""

    streams: list[Opened]  # what the model is built from is the same in all of them
    model: AVFullDiTConfig
    deepspeed: dict[str, Any]
    notes: list[str]


def build_plan(config: RunConfig, world: World) -> Plan:
    """Read and check every file the run names except the weights, in seconds, on any machine."""
    streams = check_data(config.data, config.global_batch_size)
    notes = check_provenance({stream.place: stream.metadata for stream in streams}, config.wan,
                             config.tangoflux if config.task == "t2av" else None)
    ds_config = ds.complete_ds_config(
        ds.read_ds_config(config.deepspeed), config.global_batch_size, config.gradient_clipping,
        world.world_size,
    )
    return Plan(streams, build_model_config(config, streams[0]), ds_config, notes)


def build_model(config: RunConfig, plan: Plan, fresh: bool) -> AVFullDiT:
    """The stitched model; both backbones' weights are read unless a checkpoint will be."""
    torch.manual_seed(config.seed)  # the new weights are drawn alike on every rank
    model = ds.build_sharded(
        lambda: AVFullDiT(plan.model, recompute=config.recompute, attention=config.attention),
        plan.deepspeed,
    )
    assert isinstance(model, AVFullDiT)
    if fresh:
        load_pretrained(model, config.wan, config.tangoflux, write=ds.write_parameter)
    return model


def train_step(
    engine: Any, batch: Batch, epoch: int, objective: Objective, empty: dict[str, torch.Tensor],
    cross_modal_bias: float = 0.0,
) -> torch.Tensor:
    """One optimiser update from this rank's share of the global batch.

    Returns: (3,) float64 on the device: this rank's video loss and audio loss, summed over
    samples, and the samples with sound.
    """
    batch = objective.drop_captions(batch, epoch, empty)
    t = objective.draw_t(batch.sample_ids, epoch)
    micro = engine.train_micro_batch_size_per_gpu()
    totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
    weight = batch.audio_weight.to(engine.device)
    for begin in range(0, len(batch.sample_ids), micro):
        part = slice(begin, begin + micro)
        noised = objective.noise(batch.part(part), t[part], epoch, engine.device)
        video, audio = objective.losses(engine, noised, cross_modal_bias)
        # Equal micro-batches: the mean of their means is the mean over the global batch, and the
        # weights make it one over its samples with sound.
        engine.backward(objective.total(video.mean(), (audio * weight[part]).mean()))
        engine.step()
        totals += summed(video, audio, noised.has_audio)
    return totals


def summed(*losses: torch.Tensor) -> torch.Tensor:
    return torch.stack([values.detach().double().sum() for values in losses])


@torch.no_grad()
def validate(
    engine: Any, held_out: HeldOut, objective: Objective, samples: int | None, world: World,
    step: int,
) -> dict[str, float]:
    """Held-out loss per modality on a fixed (sample, t, noise) grid: the same in t2av and t2v.

    Samples are dealt to the ranks in turn and padded, so that every rank runs as many forwards.
    """
    engine.eval()
    micro = engine.train_micro_batch_size_per_gpu()
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    for batch, kept in held_out.shares(samples, micro, world.rank, world.world_size, step):
        real = kept.to(engine.device)
        for value in VALIDATION_T:
            t = torch.full((len(kept),), value)
            noised = objective.noise(batch, t, VALIDATION_EPOCH, engine.device)
            video, audio = objective.losses(engine, noised)
            sums += summed(video * real, audio * real, real, noised.has_audio & real)
    engine.train()
    video_sum, audio_sum, count, heard = sum_over_ranks(sums).tolist()
    means = [video_sum / count, audio_sum / max(heard, 1)]
    tags = ["loss_video", "loss_audio"] if objective.task == "t2av" else ["loss_video"]
    return {f"validation/{tag}": mean for tag, mean in zip(tags, means, strict=False)}


def warmup(step: int, config: RunConfig) -> float:
    """Learning-rate factor of the update that leads to step + 1."""
    return min(1.0, (step + 1) / max(config.warmup_steps, 1))


def step_values(
    step: int, losses: list[float], engine: Any, config: RunConfig, objective: Objective
) -> dict[str, float]:
    """What is logged of a step: losses, mean over the log period and all ranks, and its update."""
    if not all(math.isfinite(loss) for loss in losses):
        raise FloatingPointError(
            f"loss is not finite at step {step} (video, audio = {losses}): lower optimizer.lr or "
            f"look at the batch; the last checkpoint is in {config.run_dir}/checkpoints"
        )
    tags = ["loss_video", "loss_audio"] if config.task == "t2av" else ["loss_video"]
    values = {"train/loss": objective.total(*losses)}
    values |= {f"train/{tag}": loss for tag, loss in zip(tags, losses, strict=False)}
    norm = engine.get_global_grad_norm()  # None in stage 0 with fp32, where DeepSpeed keeps none
    if norm is not None:
        values["train/grad_norm"] = float(norm)
    return values | {
        "train/lr": max(group["lr"] for group in engine.optimizer.param_groups),
        "train/samples_seen": float(step * config.global_batch_size),
        "memory/peak_gib": peak_memory_gib(engine.device),
    }


def run(config: RunConfig, plan: Plan, world: World) -> None:
    """Build, resume, then go through the steps; maintenance comes before the step."""
    run_dir = Path(config.run_dir)
    lock = lock_run(run_dir, world)
    tag = find_checkpoint(run_dir, world)
    if tag:
        check_same_model(tag, dataclasses.asdict(plan.model), dataclasses.asdict(AVFullDiTConfig()))
    fresh = tag is None
    model = build_model(config, plan, fresh)
    engine, rates = ds.build_engine(
        model, new_parameter_names(model), config.optimizer, plan.deepspeed
    )
    try:
        model.attend.resolve(engine.device, next(engine.parameters()).dtype)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    first = load_checkpoint(engine, tag, world)["step"] if tag else 0
    ledger = run_dir / "substitutions.jsonl" if world.is_main else None
    loader = build_loader(
        config.data, config.global_batch_size, world.rank, world.world_size, config.seed, first,
        ledger,
    )
    held_out, empty = HeldOut(config.data, ledger), plan.streams[0].text_states
    objective = Objective(config.task, config.seed, config.flow)
    writer = MetricWriter(run_dir if world.is_main else None, first + 1 if first else 0)
    if world.is_main:
        writer.record({"run": dataclasses.asdict(config), "deepspeed": plan.deepspeed,
                       "data": dataclasses.asdict(plan.streams[0].metadata),
                       "model": dataclasses.asdict(plan.model)})
        new = new_parameter_names(model)
        added = (p for name, p in model.named_parameters() if name in new)
        writer.say(
            f"{config.task}: {ds.count_parameters(model.parameters()):,} parameters, "
            f"{ds.count_parameters(added):,} of them new; attention {model.attention_kernel}; "
            f"recompute {config.recompute}\n{ds.describe_batch(plan.deepspeed, world)}\n"
            + (f"resuming at step {first}" if first else "starting from the pretrained backbones")
            + "".join(f"\nnote: {note}" for note in plan.notes)
        )
    if fresh and config.self_check:
        found = check_stitch(model, engine, config.wan, config.tangoflux, engine.device)
        writer.say(f"stitch self-check: deviation from the backbones {describe(found)}")

    step, clock, began = first, Clock(), Clock()
    sums, counted = torch.zeros(3, dtype=torch.float64, device=engine.device), 0
    while True:
        done = step >= config.max_steps
        fresh_step = step > first or step == 0  # a resumed run has this step's record already
        if fresh_step and (step % config.validate_every == 0 or done):
            values = validate(engine, held_out, objective, config.validation_samples, world, step)
            writer.scalars(step, values)
            writer.say(f"step {step}/{config.max_steps}  held-out  " + "  ".join(
                f"{tag.split('/')[1][5:]} {value:.4f}" for tag, value in values.items()))
            clock.restart()
        if step > first and (step % config.save_every == 0 or done):
            state = {"step": step, "model": dataclasses.asdict(plan.model)}
            path = save_checkpoint(engine, run_dir, step, state, config.keep_checkpoints, world)
            writer.say(f"step {step}/{config.max_steps}  checkpoint {path}")
            clock.restart()
        if done:
            break
        ds.set_learning_rate(engine, rates, warmup(step, config))
        epoch, batch = next(loader)
        bias = config.model.cross_modal_bias(step)
        sums += train_step(engine, batch, epoch, objective, empty, bias)
        step, counted = step + 1, counted + 1
        if step % config.log_every == 0 or step == config.max_steps:
            video_sum, audio_sum, heard = sum_over_ranks(sums).tolist()
            losses = [video_sum / (counted * config.global_batch_size), audio_sum / max(heard, 1)]
            values = step_values(step, losses, engine, config, objective)
            writer.step(step, config.max_steps, values, clock.tick(counted), clock)
            sums, counted = torch.zeros_like(sums), 0
    writer.say(f"done: step {step} after {format_seconds(began.tick())}; run directory {run_dir}")
    writer.close()
    if lock:
        lock.close()


def main(arguments: list[str]) -> int:
    """Exit status 0 when trained to the end, 78 for a configuration that cannot run."""
    arguments = [a for a in arguments if not a.startswith("--local_rank")]  # deepspeed launcher
    if not arguments or "=" in arguments[0]:
        print(__doc__)
        return 78
    world, started = World(0, 1, 0, 1, "alone"), False
    try:
        world = resolve_world(os.environ)
        config = load_config(RunConfig, arguments[0], arguments[1:])
        if config.check == "weights":
            from model.encoder_headers import check_encoders  # slow, and no run needs it

            fits, report = check_weights(config.task, config.model, config.wan, config.tangoflux)
            fit, lines = check_encoders(config.task, config.wan, config.tangoflux)
            print("\n".join([report, *lines]))
            return 0 if fits and fit else 78
        plan = build_plan(config, world)
        start(world, config.timeout_minutes)
        started = True
        run(config, plan, world)
    except (ConfigError, WorldError, DataError, CheckpointError, PretrainedError) as error:
        # What every rank finds is said once per node; what one rank meets later, by that rank.
        if started or os.environ.get("LOCAL_RANK", "0") == "0":
            where = f"rank {os.environ['RANK']}: " if started and world.world_size > 1 else ""
            print(f"error: {where}{error}", file=sys.stderr, flush=True)
        return 78
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
