"""Train AVFullDiT, or its T2V-only twin, from a YAML file.

    python train.py configs/playground.yaml                      # one device
    bash launch/local.sh configs/alt_merge_t2av.yaml             # one node
    sbatch launch/train.sbatch configs/alt_merge_t2av.yaml       # a cluster
    ... optimizer.lr=2e-5 run_dir=runs/other                     # any key of the YAML

The same command resumes. t, noise, caption drop and the audio latent's draw are functions of
(seed, epoch, sample id), the learning rate is a function of the step: none of them depends on rank
or world size, and a t2v run has the video noise of its t2av twin.
"""

import dataclasses
import faulthandler
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from common import ranks, settings
from common.errors import ExpectedError
from config import Plan, RunConfig, build_plan, check, find_resume
from data.loading.loader import ValidationSet, build_loader
from evaluation.evaluator import Evaluator
from evaluation.run_log import RunLog
from model import AVFullDiT
from model.objective import Batch, Objective
from model.weights.load import load_pretrained, new_parameter_names
from training import distributed
from training import engine as ds
from training.checkpoint import save_load
from training.ema import EMA
from training.guards.supervisor import StepAgreement, Supervisor, supervised
from training.schedule import Schedule

EXIT_SECONDS = 120
SPEAKER_SECONDS = 20.0  # by which the slowest rank of a node has found the same error


def build_model(config: RunConfig, plan: Plan, fresh: bool) -> AVFullDiT:
    """The stitched model; both backbones' weights are read unless a checkpoint replaces them."""
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
    empty: dict[str, torch.Tensor], agreement: StepAgreement, accumulator: Any,
    cross_modal_bias: float = 0.0, logged: bool = False,
) -> Any:
    """Update number `step` from this rank's share of the global batch.

    Args:
        empty: the encoded "" of both text encoders, for the captions that are dropped.
        logged: whether the gradients' norms are read.

    Returns: what all ranks agreed on, with the sums that `accumulator` has taken of the step.
    """
    # What is random of a sample is a function of (seed, epoch, sample id), on whatever rank.
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
        accumulator.losses(t[part], video, audio, noised.has_audio)
        losses.append(torch.stack([video.detach(), audio.detach()], dim=1))
        # The exchange between the ranks travels during the last backward pass, which hides it.
        if last:
            agreement.tell(accumulator.take_sums())
        engine.backward(screened)
        if last:
            accumulator.before_update(logged)
        engine.step()
    return agreement.agree(torch.cat(losses), engine.was_step_applied())


def run(config: RunConfig, plan: Plan, world: ranks.World) -> None:
    """One start of the run, with its guards around it."""
    with supervised(dataclasses.asdict(config), config.watchdog, world) as supervisor:
        train(config, plan, world, supervisor)


def train(config: RunConfig, plan: Plan, world: ranks.World, supervisor: Supervisor) -> None:
    """Build, resume, then go through the steps."""
    run_dir = Path(config.run_dir)

    # Find the checkpoint to go on from. A run that has changed in what must stay ends here.
    found, changes = find_resume(config, plan, world)
    first, saved = (found.contents.step, found.contents.run) if found else (0, {})
    # This start writes the records from here on again: those of `first` are there, but a fresh
    # start drops all. validate_only trains nothing and drops nothing.
    rewrite_from: int | None = first + 1 if first else 0
    if config.validate_only:
        rewrite_from = None

    # The model is born as the ZeRO stage keeps it; the backbones fill it, or the checkpoint does.
    model = build_model(config, plan, fresh=found is None)
    engine, rates = ds.build_engine(
        model, new_parameter_names(model), config.optimizer, plan.deepspeed)
    try:
        model.attend.resolve(engine.device, next(engine.parameters()).dtype)
    except (ValueError, ImportError) as error:
        raise settings.ConfigError(str(error)) from error
    ema = EMA(engine, config.ema_decay) if config.ema_decay else None
    if found:
        save_load.load_checkpoint(engine, found, world, ema)
        supervisor.last_good = found.tag

    # What the ranks exchange at every step, and the batches of every step from `first` on.
    agreement = StepAgreement(supervisor, config.guard, saved.get("guard"), engine.device)
    writes = run_dir if world.is_main and not config.validate_only else None
    loader = build_loader(
        config.data, config.global_batch_size, world.rank, world.world_size, config.seed, first,
        writes, agreement.straggler.waited)
    objective, empty = Objective(config.task, config.seed, config.flow), plan.streams[0].text_states

    # Who looks at the model, who writes down what is measured, and when either is due.
    evaluator = Evaluator(
        engine, ValidationSet(config.data, writes), objective, ema, config, world, supervisor)
    log = RunLog(engine, config, plan, agreement, rewrite_from, saved.get("watch"))
    if rewrite_from:
        evaluator.renew_gallery()
    due = Schedule.of(config, first, *evaluator.done_at(first, log.writer))
    log.begin(due, found, plan.notes + changes)

    # A fresh model contains both backbones: each alone gives what its original gives.
    if found is None and config.self_check:
        log.writer.say(evaluator.check_stitch())
    log.budget(first)
    if due.trains():
        supervisor.refuse_too_little_time()
    log.restart_clocks()

    step, epoch = first, 0
    while True:
        # Between two steps: validate, sample, save. The first and the last step pass here, too, so
        # that the final save is not a special case.
        stopping = supervisor.stop is not None
        done = due.done(step) or stopping
        if due.validation(step, stopping):
            with supervisor.section("validation"):
                evaluator.validate(step, log.writer, due.recorded(step))
        if due.samples(step, stopping):
            with supervisor.section("sampling"):
                evaluator.sample(step, log.writer)
        if due.checkpoint(step, done or supervisor.save):
            # The loader's place is for people: it starts from the step.
            state = {"loader": {"epoch": epoch, "samples_seen": step * config.global_batch_size},
                     "guard": agreement.guard.state(), "watch": log.accumulator.state()}
            retention = save_load.Retention(config.keep_checkpoints, config.keep_every)
            with supervisor.section("checkpoint"):
                tag = save_load.save_checkpoint(
                    engine, run_dir, step, plan.about | state, retention, world, ema)
            supervisor.saved(tag)
            log.checkpoint(step, tag)
        if done:
            break

        # One update over the global batch, at a learning rate that is a function of the step.
        ds.set_learning_rate(engine, rates, due.rate_factor(step))
        with supervisor.section("data"):
            epoch, batch = next(loader)
        bias = config.model.cross_modal_bias(step)
        step += 1
        agreed = train_step(engine, step, batch, epoch, objective, empty, agreement,
                            log.accumulator, bias, due.record(step))
        if ema:
            ema.update()

        # Log what this period measured, and now and then what the model looks like inside.
        log.step(step, epoch, agreed, due)
        if due.health(step):
            with supervisor.section("validation"):
                log.health(step, evaluator.look_inside(step))

    # Leave the final state for the batch script, and end the loader's processes, which would keep a
    # job step alive.
    log.end(step, supervisor.finish(step, config.max_steps, config.validate_only))
    loader.close()


def main(arguments: list[str]) -> int:
    """Exit status; cluster.requeue explains each."""
    arguments = [a for a in arguments if not a.startswith("--local_rank")]  # deepspeed launcher
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not arguments or "=" in arguments[0]:
        print(__doc__)
        return 78
    world, started = ranks.World(0, 1, 0, 1, "alone"), False
    try:
        world = ranks.resolve_world(os.environ)
        config = settings.load_config(RunConfig, arguments[0], arguments[1:])
        if config.check:
            return check(config, world, arguments)
        plan = build_plan(config, world)
        distributed.start(world, config.timeout_minutes)
        started = True
        run(config, plan, world)
    except ExpectedError as error:
        # An error of every rank is printed once per node; a later one, by its rank. The launcher
        # ends all with the first that leaves, so the others wait for the one that speaks.
        if not started and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SPEAKER_SECONDS)
        where = f"rank {os.environ['RANK']}: " if started and world.world_size > 1 else ""
        print(f"error: {where}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        if started:  # a peer that is gone must not keep this rank
            faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)
        distributed.shutdown()
    return 0


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1:]))
