"""The records of one run: card, metrics, TensorBoard, and its lines on the console.

Everything here is called by all ranks alike; rank 0 alone writes and speaks. Called by train.py.
"""

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.ranks import World
from config import Plan, RunConfig
from model.flops import peak_tflops, training_work
from model.weights.load import new_parameter_names, weight_fingerprints
from model.weights.names import part_of
from training import engine as ds
from training.checkpoint.retention import Found
from training.guards.supervisor import Agreed, StepAgreement
from training.metrics.accumulator import Scale, StepAccumulator
from training.metrics.console import budget, summary
from training.metrics.norms import PartNorms, group_places
from training.metrics.start_record import write_start
from training.metrics.writer import Clock, MetricWriter
from training.schedule import Schedule


class RunLog:
    """What one start of a run measures of itself, writes down and says.

    Args:
        rewrite_from: records of earlier starts from this step on are dropped, because this start
            makes them again; None: it trains nothing, and all stay.
        state: `accumulator.state()` of the checkpoint that the run goes on from.
    """

    def __init__(
        self, engine: Any, config: RunConfig, plan: Plan, agreement: StepAgreement,
        rewrite_from: int | None, state: dict[str, Any] | None,
    ) -> None:
        self.engine, self.config, self.plan, self.agreement = engine, config, plan, agreement
        self.world, self.run_dir = agreement.world, Path(config.run_dir)
        self.spent = agreement.supervisor.spent  # seconds per section since the last record
        self.rewrite_from = rewrite_from
        self.accumulator = build_accumulator(engine, config, plan, self.world, state)
        self.writer = MetricWriter(self.run_dir if self.world.is_main else None, rewrite_from,
                                   config.max_steps)
        self.clock, self.whole = Clock(), Clock()
        self.model = f"{config.task}: " + ds.describe_size(
            engine.module, new_parameter_names(engine.module))

    def begin(self, schedule: Schedule, found: Found | None, notes: list[str]) -> None:
        """This start's card, what was resolved for it, and its first lines.

        Args:
            notes: lines about the data and about what has changed.
        """
        peak, device = self.accumulator.scale.peak_tflops, device_name(self.engine.device)
        if self.world.is_main and self.rewrite_from is not None:
            self._write_card(schedule.first, found, {"device": device, "bf16_tflops": peak})
        start = f"resuming at step {schedule.first}" if schedule.first else (
            "starting from the pretrained backbones")
        self.writer.say("\n".join([
            f"{self.model}; attention {self.engine.module.attention_kernel}; recompute "
            f"{self.config.recompute}",
            ds.describe_batch(self.plan.deepspeed, self.world),
            *([f"mfu of {peak:g} TFLOP/s, {device}"] if peak else []),
            start, *(f"note: {note}" for note in notes),
        ]))

    def _write_card(self, first: int, found: Found | None, peak: dict[str, Any]) -> None:
        config, plan = self.config, self.plan
        card = write_start(
            self.run_dir, self.world, self.agreement.straggler.hosts, first, seed=config.seed,
            resumed_from=found and found.tag, data=plan.about["fingerprints"],
            weights=weight_fingerprints(config.task, config.wan, config.tangoflux), peak=peak)
        resolved = {
            "run": dataclasses.asdict(config), "deepspeed": plan.deepspeed,
            "data": dataclasses.asdict(plan.streams[0].metadata),
            "streams": {stream.label: dataclasses.asdict(stream.metadata)
                        for stream in plan.streams},
            "model": dataclasses.asdict(plan.model)}
        self.writer.record(self.rewrite_from or 0, resolved, {
            "environment": card, "parameters": ds.count_by(self.engine.module, part_of)})

    def budget(self, step: int) -> None:
        """Say what is left of time and disk."""
        if self.world.is_main:
            config = self.config
            self.writer.say(budget(
                self.run_dir, step, config.max_steps, config.keep_checkpoints,
                ds.count_parameters(self.engine.module.parameters()),
                config.ema_decay is not None, os.environ))

    def restart_clocks(self) -> None:
        """What came before was no step."""
        self.clock, self.whole = Clock(), Clock()

    def step(self, step: int, epoch: int, agreed: Agreed, schedule: Schedule) -> None:
        """Add a step to its period; write the period down where one ends. A collective."""
        accumulator = self.accumulator
        accumulator.add(agreed.sums, agreed.applied)
        if agreed.said:
            self.writer.say(agreed.said)
        if schedule.record(step) and accumulator.counted:
            here = accumulator.here
            shares, slowest = self.agreement.straggler.compare(here)
            seconds = self.clock.tick(here, self.spent)
            values = accumulator.record(step, epoch, seconds, self.spent)
            self.writer.step(step, values | shares, self.clock, slowest)
        if schedule.budget(step):
            self.budget(step)

    def health(self, step: int, inside: dict[str, float]) -> None:
        """Update ratios, losses by t, and what was seen inside the model; a collective."""
        self.writer.scalars(step, self.accumulator.health_record() | inside)

    def checkpoint(self, step: int, tag: Path) -> None:
        self.writer.say(f"step {step}/{self.config.max_steps}  checkpoint {tag}")

    def end(self, step: int, ended: str) -> None:
        """The summary; ``ended``: how, in words."""
        if self.world.is_main:
            self.writer.say(summary(self.run_dir, ended, self.whole.tick(), self.model, self.spent))
        self.writer.close(step, dataclasses.asdict(self.config))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def build_accumulator(
    engine: Any, config: RunConfig, plan: Plan, world: World, state: dict[str, Any] | None
) -> StepAccumulator:
    """The measurements of the run, going on from a checkpoint's."""
    new = new_parameter_names(engine.module)
    places = group_places(engine.module, new, config.optimizer)
    weights = (config.flow.video_loss_weight, config.flow.audio_loss_weight)
    scale = Scale(config.global_batch_size, weights[: 2 if config.task == "t2av" else 1],
                  config.gradient_clipping, world.world_size,
                  config.peak_tflops or peak_tflops(device_name(engine.device)))
    return StepAccumulator(engine, PartNorms(engine, part_of, places, world), scale,
                           partial(training_work, plan.model), state)
