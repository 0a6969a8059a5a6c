"""What looks at the model between two steps: validation losses, gauges, samples.

None of it draws from a random stream of training or touches a gradient: a run that is watched
trains as one that is not, bit for bit (tests/evaluation/test_evaluator.py). Called by train.py.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from common.ranks import World, broadcast_object
from config import RunConfig
from data.loading.loader import ValidationSet
from data.schema import DataError
from evaluation.gallery import CAPTIONS, write_gallery
from evaluation.gauges import Gauges
from evaluation.validation import Losses, Row, look_inside, measure, summarise, write_rows
from model.objective import VALIDATION_EPOCH, VALIDATION_T, Batch, Noised, Objective
from model.weights.selfcheck import check_stitch, describe
from training.ema import EMA
from training.guards.optional import AttemptError
from training.guards.supervisor import Supervisor
from training.metrics.writer import MetricWriter

T = TypeVar("T")
GAUGED_SAMPLES = 4


@contextmanager
def told_alone(what: str) -> Iterator[None]:
    """Around what rank 0 writes while the others go on: what a disk does to it is a warning."""
    try:
        yield
    except OSError as error:
        print(f"warning: {what} are not kept: {error}", file=sys.stderr, flush=True)


class Evaluator(NamedTuple):
    """What looks at the model between steps: validation losses, gauges, samples."""

    engine: Any
    validation_set: ValidationSet
    objective: Objective
    ema: EMA | None
    config: RunConfig
    world: World
    supervisor: Supervisor

    def shares(self, samples: int | None, step: int) -> Iterator[tuple[Batch, torch.Tensor]]:
        micro = self.engine.train_micro_batch_size_per_gpu()
        rank, ranks = self.world.rank, self.world.world_size
        return self.validation_set.shares(samples, micro, rank, ranks, step)

    def noised(self, batch: Batch, t: float) -> Noised:
        """A batch at the validation grid's own noise, the same at every step."""
        values = torch.full((len(batch.sample_ids),), t)
        return self.objective.noise(batch, values, VALIDATION_EPOCH, self.engine.device)

    def losses_at(self, batch: Batch, t: float) -> Losses:
        noised = self.noised(batch, t)
        video, audio = self.objective.losses(self.engine, noised)
        return video, audio, noised.has_audio

    def check_stitch(self) -> str:
        """How far the model is from the backbones that a fresh one contains, in words.

        Raises:
            StitchError: too far.
        """
        config = self.config
        found = check_stitch(
            self.engine.module, self.engine, config.wan, config.tangoflux, self.engine.device)
        return f"stitch self-check: deviation from the backbones {describe(found)}"

    def validate(self, step: int, writer: MetricWriter, recorded: bool) -> None:
        """Say the validation losses and, unless they are ``recorded``, write them down.

        A failure ends a run that does nothing else, and only that.
        """
        measure = partial(self.losses, step, not recorded)
        values = measure() if self.config.validate_only else self.survive(
            "validation", step, measure)
        if values:
            writer.validation(step, values, recorded)

    def losses(self, step: int, keep: bool = True) -> dict[str, float]:
        """Validation losses of the weights and of their average.

        ``keep`` writes the losses of each sample into RUN/validation, too.
        """
        def rows() -> list[Row]:
            shares = self.shares(self.config.validation_samples, step)
            return measure(self.engine, shares, self.losses_at, VALIDATION_T,
                           self.config.task == "t2av", self.world,
                           lambda: self.supervisor.watchdog.enter("validation"))

        found = {"raw": rows()}
        values = summarise(found["raw"], VALIDATION_T)
        if self.ema:
            with self.ema.swapped_in():
                found["ema"] = rows()
            values |= summarise(found["ema"], VALIDATION_T, "_ema")
        if keep and self.world.is_main:
            with told_alone(f"validation losses of step {step} per sample"):
                write_rows(Path(self.config.run_dir), step, found, VALIDATION_T)
        return values

    def look_inside(self, step: int) -> dict[str, float]:
        """Attention between the modalities and activations, on a few validation samples.

        Empty where it failed.
        """
        bias = self.config.model.cross_modal_bias(step)
        look = partial(
            look_inside,
            self.engine, Gauges(self.engine.module), self.shares(GAUGED_SAMPLES, step),
            lambda batch: self.objective.losses(self.engine, self.noised(batch, 0.5), bias),
            self.world,
        )
        return self.survive("looking inside", step, look) or {}

    def sample(self, step: int, writer: MetricWriter) -> None:
        """Samples into RUN/samples and TensorBoard; a failure does not end the run."""
        self.survive("sampling", step, partial(self._draw, step, writer))

    def _draw(self, step: int, writer: MetricWriter) -> None:
        from evaluation.samples import (  # diffusers: slow to import
            Preview,
            draw_previews,
            log_previews,
        )

        config, sound = self.config, self.config.task == "t2av"
        first = self.validation_set.opened[0]
        tangoflux = config.tangoflux if sound else None
        preview = Preview(
            Path(config.run_dir), self.validation_set, config.wan, tangoflux,
            first.text_states, config.flow, config.seed, **dataclasses.asdict(config.samples),
        )
        folder = draw_previews(preview, self.engine, step, self.world,
                               lambda: self.supervisor.watchdog.enter("sampling"))
        if folder:
            with told_alone(f"samples of step {step} in TensorBoard"):
                log_previews(folder, step, writer.events, first.metadata.sample_rate)
            writer.say(f"step {step}/{config.max_steps}  samples {folder.parent}/index.html")

    def renew_gallery(self) -> None:
        """After a resume, which takes the samples of later steps away."""
        samples = Path(self.config.run_dir) / "samples"
        if self.world.is_main and samples.is_dir():
            with told_alone("the samples' page"):
                write_gallery(samples, samples.parent.name)

    def done_at(self, step: int, writer: MetricWriter) -> tuple[bool, bool]:
        """Whether an earlier start has validated and sampled at a step; a collective.

        A stop at that very step leaves both to the next start.
        """
        return broadcast_object((writer.validated(step), self.has_samples(step)), self.world)

    def has_samples(self, step: int) -> bool:
        return (Path(self.config.run_dir) / "samples" / f"step{step:08d}" / CAPTIONS).is_file()

    def survive(self, what: str, step: int, action: Callable[[], T]) -> T | None:
        """Run optional work; None, with a warning, when it failed.

        A failure of one rank within a collective ends the run: the others wait in it.
        """
        try:
            return action()
        except Exception as error:
            if self.world.world_size > 1 and not isinstance(error, DataError | AttemptError):
                error.add_note(f"error: {what} at step {step} failed on rank {self.world.rank}")
                raise
            if self.world.is_main:
                kind = "" if isinstance(error, AttemptError) else f"{type(error).__name__}: "
                print(f"warning: {what} at step {step} failed and training goes on: "
                      f"{kind}{error}", file=sys.stderr, flush=True)
            return None
