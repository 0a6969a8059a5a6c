"""Train AVFullDiT, or its T2V-only twin, from a YAML file.

    python train.py configs/playground.yaml                      # one device
    bash launch/local.sh configs/alt_merge_t2av.yaml             # one node
    sbatch launch/train.sbatch configs/alt_merge_t2av.yaml       # a cluster
    ... optimizer.lr=2e-5 run_dir=runs/other                     # any key of the YAML

The same command resumes. t, noise, caption drop and the audio latent's draw are functions of
(seed, epoch, sample id), the learning rate is a function of the step: nothing of either depends on
rank or world size, and a t2v run meets the video noise of its t2av twin.
"""

import dataclasses
import faulthandler
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.ranks import World, WorldError, broadcast_object, resolve_world
from common.settings import ConfigError, load_config
from config import Plan, RunConfig, about_run, build_plan, report, report_weights
from data.loading.loader import HeldOut, build_loader
from data.schema import DataError
from evaluation.evaluator import Bench
from model import AVFullDiT, AVFullDiTConfig
from model.flops import peak_tflops, training_work
from model.objective import Batch, Objective
from model.weights.load import (
    PretrainedError,
    load_pretrained,
    new_parameter_names,
    weight_fingerprints,
)
from model.weights.names import part_of
from model.weights.selfcheck import check_stitch, describe
from training import engine as ds
from training.checkpoint.resume import check_resume
from training.checkpoint.retention import Retention, find_checkpoint
from training.checkpoint.run_dir import CheckpointError, SaveError
from training.checkpoint.run_lock import lock_run
from training.checkpoint.save_load import load_checkpoint, save_checkpoint
from training.distributed import leave, shutdown, start
from training.ema import EMA
from training.guards.bad_numbers import EXIT_CODE as BAD_NUMBERS
from training.guards.bad_numbers import BadNumbersError, Drawn, Guard
from training.guards.straggler import Straggler
from training.guards.supervisor import Agreed, Safety, StepAgreement
from training.metrics.accumulator import Scale, Watch
from training.metrics.console import budget, rank_log, summary
from training.metrics.norms import Health, group_places
from training.metrics.start_record import write_start
from training.metrics.writer import Clock, MetricWriter

# One line says it all, the same on every rank: no traceback, no folder of failures.
EXPECTED = (ConfigError, WorldError, DataError, CheckpointError, PretrainedError, BadNumbersError)
EXIT_SECONDS = 120
SPEAKER_SECONDS = 20.0  # by which the slowest rank of a node has found the same error
BUDGET_AGAIN = 20  # steps after a start at least: then there are times to reckon with


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
    engine: Any, step: int, batch: Batch, epoch: int, objective: Objective,
    empty: dict[str, torch.Tensor], agreement: StepAgreement, watch: Watch,
    cross_modal_bias: float = 0.0, logged: bool = False,
) -> Agreed:
    """Update number `step` from this rank's share of the global batch.

    Returns: over all ranks, what `watch` has summed of the step.
    """
    batch = objective.drop_captions(batch, epoch, empty)
    t = objective.draw_t(batch.sample_ids, epoch)
    agreement.begin(step, epoch, batch, t)
    micro, losses = engine.train_micro_batch_size_per_gpu(), []
    weight = batch.audio_weight.to(engine.device)
    for begin in range(0, len(batch.sample_ids), micro):
        part = slice(begin, begin + micro)
        noised = objective.noise(batch.part(part), t[part], epoch, engine.device)
        with agreement.straggler.forward():
            video, audio = objective.losses(engine, noised, cross_modal_bias)
        # Equal micro-batches: the mean of their means is the mean over the global batch, and the
        # weights make it one over its samples with sound.
        loss = objective.total(video.mean(), (audio * weight[part]).mean())
        last = begin + micro >= len(batch.sample_ids)
        screened = agreement.guard.screen(loss, last)
        watch.losses(t[part], video, audio, noised.has_audio)
        losses.append(torch.stack([video.detach(), audio.detach()], dim=1))
        if last:
            agreement.tell(watch.take_sums())
        engine.backward(screened)
        if last:
            watch.before_update(logged)
        engine.step()
    drawn = Drawn(step, epoch, batch.sample_ids, t, torch.cat(losses))
    return agreement.agree(drawn, engine.was_step_applied())


def rate_factor(step: int, config: RunConfig) -> float:
    """Learning-rate factor of the update that leads to step + 1."""
    left = (config.max_steps - step) / max(config.decay_steps, 1)
    return min(1.0, (step + 1) / max(config.warmup_steps, 1), left)


def run(config: RunConfig, plan: Plan, world: World) -> None:
    """One start of the run, with its guards around it."""
    lock = lock_run(Path(config.run_dir), world)
    with rank_log(Path(config.run_dir), world), \
            Safety(dataclasses.asdict(config), config.watchdog, world, EXPECTED) as safety:
        train(config, plan, world, safety)
    if lock:
        lock.close()


def train(config: RunConfig, plan: Plan, world: World, safety: Safety) -> None:
    """Build, resume, then go through the steps; maintenance comes before the step."""
    run_dir = Path(config.run_dir)
    about = about_run(config, plan)
    found, notes = find_checkpoint(run_dir, world), plan.notes
    if found:
        notes = notes + check_resume(found, about, dataclasses.asdict(AVFullDiTConfig()))
    fresh, first = found is None, found.manifest.step if found else 0
    model = build_model(config, plan, fresh)
    size = ds.describe_size(model, new_parameter_names(model))
    engine, rates = ds.build_engine(
        model, new_parameter_names(model), config.optimizer, plan.deepspeed
    )
    try:
        model.attend.resolve(engine.device, next(engine.parameters()).dtype)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    ema = EMA(engine, config.ema_decay) if config.ema_decay else None
    if found:
        load_checkpoint(engine, found, world, ema)
        safety.last_good = found.tag
    judged = found.manifest.run.get("guard") if found else None
    resumed_at = None if config.validate_only else first + 1 if first else 0
    agreement = StepAgreement(
        safety, Guard(config.guard, run_dir, world, resumed_at, judged),
        Straggler(world, engine.device),
    )
    ledger = None if config.validate_only or not world.is_main else run_dir / "substitutions.jsonl"
    loader = build_loader(
        config.data, config.global_batch_size, world.rank, world.world_size, config.seed, first,
        ledger, agreement.straggler.waited,
    )
    held_out, empty = HeldOut(config.data, ledger), plan.streams[0].text_states
    objective = Objective(config.task, config.seed, config.flow)
    bench = Bench(engine, held_out, objective, ema, config, world, safety)
    watch = build_watch(engine, config, plan, world, found.manifest.run.get("watch") if found
                        else None)
    writer = MetricWriter(run_dir if world.is_main else None, resumed_at, config.max_steps)
    if resumed_at:
        bench.renew_gallery()
    validated, drawn = broadcast_object((writer.validated(first), bench.drawn(first)), world)
    if world.is_main:
        device, peak = device_name(engine.device), watch.scale.peak_tflops
        if resumed_at is not None:  # validate_only makes nothing that a record would tell of
            card = write_start(
                run_dir, world, agreement.straggler.hosts, first, seed=config.seed,
                resumed_from=found and found.tag, data=about["fingerprints"],
                weights=weight_fingerprints(config.task, config.wan, config.tangoflux),
                peak={"device": device, "bf16_tflops": peak})
            resolved = {"run": dataclasses.asdict(config), "deepspeed": plan.deepspeed,
                        "data": dataclasses.asdict(plan.streams[0].metadata),
                        "streams": {stream.label: dataclasses.asdict(stream.metadata)
                                    for stream in plan.streams},
                        "model": dataclasses.asdict(plan.model)}
            writer.record(resumed_at, resolved,
                          {"environment": card, "parameters": ds.count_by(model, part_of)})
        writer.say(
            f"{config.task}: {size}; "
            f"attention {model.attention_kernel}; recompute {config.recompute}\n"
            f"{ds.describe_batch(plan.deepspeed, world)}\n"
            + (f"mfu of {peak:g} TFLOP/s, {device}\n" if peak else "")
            + (f"resuming at step {first}" if first else "starting from the pretrained backbones")
            + "".join(f"\nnote: {note}" for note in notes)
        )
    if fresh and config.self_check:
        stitched = check_stitch(model, engine, config.wan, config.tangoflux, engine.device)
        writer.say(f"stitch self-check: deviation from the backbones {describe(stitched)}")

    means = (config.max_steps, config.keep_checkpoints, ds.count_parameters(model.parameters()),
             ema is not None, os.environ)
    if world.is_main:
        writer.say(budget(run_dir, first, *means))
    if first < config.max_steps and not config.validate_only:
        safety.refuse_too_little_time()
    step, epoch, clock, began = first, 0, Clock(), Clock()
    while True:
        done = step >= config.max_steps or config.validate_only or safety.stop is not None
        last = step == config.max_steps
        if config.validate_only or config.validate_every and safety.stop is None and (
            step > first or not validated
        ) and (step % config.validate_every == 0 or last):
            with safety.phase("validation"):
                known = step == first and validated
                validate = partial(bench.validate, step, not known)
                held = validate() if config.validate_only else bench.survive(
                    "validation", step, validate)
            if held:
                writer.held_out(step, held, recorded=known)
        if config.sample_every and safety.stop is None and not config.validate_only and (
            step > first or not drawn
        ) and (step % config.sample_every == 0 or last):
            with safety.phase("sampling"):
                bench.survive("sampling", step, partial(bench.draw, step, writer))
        if step > first and (step % config.save_every == 0 or done or safety.save):
            state = {"loader": {"epoch": epoch, "samples_seen": step * config.global_batch_size},
                     "guard": agreement.guard.state(), "watch": watch.state()}
            retention = Retention(config.keep_checkpoints, config.keep_every)
            with safety.phase("checkpoint"):
                tag = save_checkpoint(engine, run_dir, step, about | state, retention, world, ema)
            safety.saved(tag)
            writer.say(f"step {step}/{config.max_steps}  checkpoint {tag}")
        if done:
            break
        ds.set_learning_rate(engine, rates, rate_factor(step, config))
        with safety.phase("data"):
            epoch, batch = next(loader)
        bias = config.model.cross_modal_bias(step)
        step += 1
        logged = step % config.log_every == 0 or step == config.max_steps
        agreed = train_step(
            engine, step, batch, epoch, objective, empty, agreement, watch, bias, logged
        )
        watch.add(agreed.sums, agreed.applied)
        if agreed.applied and ema:
            ema.update()
        if agreed.said:
            writer.say(agreed.said)
        if logged and watch.counted:
            shares, slowest = agreement.straggler.compare(watch.here)
            values = watch.record(step, epoch, clock.tick(watch.here, safety.spent), safety.spent)
            writer.step(step, values | shares, clock, slowest)
        if world.is_main and logged and 0 <= step - first - BUDGET_AGAIN < config.log_every:
            writer.say(budget(run_dir, step, *means))
        if step % config.health_every == 0:
            with safety.phase("validation"):
                moved = watch.health_record()
                inside = bench.survive("looking inside", step, partial(bench.look_inside, step))
            writer.scalars(step, moved | (inside or {}))
    ended = safety.finish(step, config.max_steps, config.validate_only)
    if world.is_main:
        writer.say(summary(run_dir, ended, began.tick(), f"{config.task}: {size}", safety.spent))
    writer.close(step, dataclasses.asdict(config))
    loader.close()  # its processes would keep a job step alive


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def build_watch(
    engine: Any, config: RunConfig, plan: Plan, world: World, state: dict[str, Any] | None
) -> Watch:
    """The measurements of the run, going on from a checkpoint's."""
    new = new_parameter_names(engine.module)
    places = group_places(engine.module, new, config.optimizer)
    weights = (config.flow.video_loss_weight, config.flow.audio_loss_weight)
    device = engine.device
    scale = Scale(config.global_batch_size, weights[: 2 if config.task == "t2av" else 1],
                  config.gradient_clipping, world.world_size,
                  config.peak_tflops or peak_tflops(device_name(device)))
    return Watch(engine, Health(engine, part_of, places, world), scale,
                 partial(training_work, plan.model), state)


def main(arguments: list[str]) -> int:
    """Exit status: cluster.requeue tells what each means."""
    arguments = [a for a in arguments if not a.startswith("--local_rank")]  # deepspeed launcher
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not arguments or "=" in arguments[0]:
        print(__doc__)
        return 78
    world, started = World(0, 1, 0, 1, "alone"), False
    try:
        world = resolve_world(os.environ)
        config = load_config(RunConfig, arguments[0], arguments[1:])
        if config.check == "weights":
            return report_weights(config)
        plan = build_plan(config, world)
        if config.check:
            report(config, plan, arguments)
            return 0
        start(world, config.timeout_minutes)
        started = True
        run(config, plan, world)
    except EXPECTED as error:
        # What every rank finds is said once per node; what one rank meets later, by that rank. The
        # launcher ends all with the first that leaves, so the others wait for the one that speaks.
        if not started and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SPEAKER_SECONDS)
        where = f"rank {os.environ['RANK']}: " if started and world.world_size > 1 else ""
        print(f"error: {where}{error}", file=sys.stderr, flush=True)
        if isinstance(error, SaveError):
            return 1  # a disk may be well again: worth another start
        return BAD_NUMBERS if isinstance(error, BadNumbersError) else 78
    finally:
        if started:  # a peer that is gone must not keep this rank
            faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)
        shutdown()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
