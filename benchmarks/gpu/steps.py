"""Training steps of the full-size model through train.py's own step and the DeepSpeed engine.

    python -m benchmarks.gpu.steps RESULT.json JOB [--rehearse]

A job is one engine and some ways to run it. Each way starts from the same random weights and fresh
moments and trains on one fixed batch with fixed noise, so that losses and gradient norms of the
ways can be compared. A step is everything of train.py's but the loader: noise drawn on the CPU,
copies, forward, backward, the guards' sums, clipping, AdamW, and the sums added up.
"""

import argparse
import gc
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import benchmarks.gpu.stand_in  # noqa: F401  # before train
import train
from benchmarks.gpu.common import (
    CLIPS,
    PEAK_TFLOPS,
    SMALL,
    Clip,
    Record,
    build,
    random_batch,
    randomise,
    set_compiled,
    spread,
    synchronize,
    without_audio,
)
from benchmarks.gpu.traces import SPIN, profile
from common.ranks import World
from model import AVFullDiT, AVFullDiTConfig
from model.flops import training_work
from model.flow import FlowConfig
from model.objective import Objective
from model.weights.load import new_parameter_names
from model.weights.names import part_of
from training import engine as ds
from training.distributed import leave, start
from training.ds_config import complete_ds_config, read_ds_config
from training.guards.bad_numbers import GuardConfig
from training.guards.supervisor import StepAgreement, Supervisor
from training.guards.watchdog import WatchdogConfig
from training.metrics.accumulator import Scale, StepAccumulator
from training.metrics.norms import PartNorms, group_places
from training.zero_state import base_optimizer, find_buffers, read_moments

LEARNING_RATE = 1e-4  # ten times the paper's: the loss on one batch must fall within 13 steps


@dataclass(frozen=True)
class Way:
    """One way to run an engine."""

    compiled: bool = False
    recompute: str = "none"
    steps: int = 10  # timed, after 3 to warm up
    profiled: bool = False
    checked: bool = False  # AdamW's update of the flat shard compared with its formula

    @property
    def name(self) -> str:
        return ("compiled" if self.compiled else "eager") + (
            ", recompute" if self.recompute == "full" else "")


@dataclass(frozen=True)
class Job:
    """One engine."""

    ways: tuple[Way, ...]
    task: str = "t2av"
    preset: str = "zero2"
    micro: int = 8
    batch: int = 8  # global: micro x accumulation
    clip: str = "2s"


EAGER, COMPILED = Way(), Way(compiled=True)
EAGER_FULL, COMPILED_FULL = Way(recompute="full"), Way(compiled=True, recompute="full")
JOBS = {
    # What may not fit comes last: after an out-of-memory error the engine is not used again.
    "t2av": Job((replace(EAGER_FULL, profiled=True, checked=True),
                 replace(COMPILED, profiled=True), COMPILED_FULL, replace(EAGER, steps=5))),
    "t2v": Job((replace(EAGER, profiled=True), COMPILED, EAGER_FULL), task="t2v"),
    "t2av_micro4": Job((EAGER, COMPILED), micro=4),
    "t2av_micro1": Job((replace(EAGER, steps=5), replace(COMPILED, steps=5)), micro=1),
    "t2av_single": Job((EAGER, COMPILED), micro=1, batch=1),
    "t2av_zero1": Job((COMPILED_FULL, replace(COMPILED, steps=5)), preset="zero1"),
    "t2av_zero3": Job((EAGER_FULL,), preset="zero3"),
    "t2av_5s": Job((EAGER_FULL, COMPILED_FULL, COMPILED), micro=4, batch=4, clip="5s"),
}


class Phases:
    """The engine, with a mark on the device where each phase of a step begins."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.spin = engine, False
        self.marks: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def mark(self, name: str) -> None:
        if self.engine.device.type == "cuda":
            if self.spin:
                torch.cuda._sleep(SPIN)  # a kernel that the profiler's timeline can be cut at
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def __call__(self, **inputs: Any) -> Any:
        self.mark("forward")
        return self.engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self.mark("backward")
        self.engine.backward(loss)
        self.mark("other")

    def step(self) -> None:
        self.mark("update")
        self.engine.step()
        self.mark("other")

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds per phase of the step that has ended, on the device's own clock."""
        values: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            spent = 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)
            values[name] = values.get(name, 0.0) + spent
        self.marks = []
        return values


class Run:
    """One job's engine, batch and the objects that train.py's step needs."""

    def __init__(self, job: Job, device: torch.device, small: bool, supervisor: Any) -> None:
        if small:
            job = replace(job, micro=min(job.micro, 2), batch=min(job.batch, 2))
        self.job, self.device, self.step_number = job, device, 0
        self.config = SMALL if small else AVFullDiTConfig()
        if job.task == "t2v":
            self.config = without_audio(self.config)
        completed = self._ds_config(small)
        if job.preset == "zero3":  # born sharded, with the model's own start
            model = ds.build_sharded(lambda: AVFullDiT(self.config), completed)
        else:
            model = build(self.config, device, torch.bfloat16)
        new, self.optimizer = new_parameter_names(model), ds.OptimizerConfig(lr=LEARNING_RATE)
        self.engine, _ = ds.build_engine(model, new, self.optimizer, completed)
        self.model: Any = self.engine.module
        self.model.attend.resolve(device, torch.bfloat16)
        self.phases = Phases(self.engine)
        self.agreement = StepAgreement(supervisor, GuardConfig(), None, None, device)
        self.objective = Objective(job.task, 0, FlowConfig(caption_dropout=0.0))
        clip = Clip(2.0, 3, 12) if small else CLIPS[job.clip]
        self.batch = random_batch(self.config, clip, job.batch, 2 if small else 1)
        self.watch = self._watch(new)

    def _ds_config(self, small: bool) -> dict[str, Any]:
        values = read_ds_config(f"ds_configs/{self.job.preset}.json")
        values["train_micro_batch_size_per_gpu"] = self.job.micro
        if small:
            for key in ("reduce_bucket_size", "allgather_bucket_size"):
                values["zero_optimization"].pop(key, None)
            values["zero_optimization"]["reduce_bucket_size"] = 5_000_000
        return complete_ds_config(values, self.job.batch, 1.0, 1)

    def _watch(self, new: set[str]) -> Any:
        places = group_places(self.model, new, self.optimizer)
        scale = Scale(self.job.batch, (1.0, 1.0), 1.0, 1, PEAK_TFLOPS)
        norms = PartNorms(self.engine, part_of, places, World(0, 1, 0, 1, "alone"))
        return StepAccumulator(
            self.engine, norms, scale, partial(training_work, self.config), None)

    def flops(self) -> int:
        """Operations of one step, from the shapes (model.flops); recomputation does not count."""
        micro = slice(0, self.job.micro)
        part = self.batch.part(micro)
        t = self.objective.draw_t(part.sample_ids, 0)
        inputs = self.objective.noise(part, t, 0, torch.device("cpu")).inputs
        return training_work(self.config, inputs).flops * (self.job.batch // self.job.micro)

    @torch.no_grad()
    def restart(self) -> None:
        """The first weights and no moments, so that every way trains alike."""
        if self.job.preset == "zero3":
            return
        randomise(self.model)
        parameters = dict(self.model.named_parameters())
        for shard in find_buffers(self.engine):
            for piece in shard.pieces:
                source = parameters[piece.name].view(-1)[piece.begin :][: piece.length]
                shard.flat[piece.start :][: piece.length].copy_(source)
            for moment in read_moments(self.engine, shard).values():
                moment.zero_()
            state = base_optimizer(self.engine).state.get(shard.parameter, {})
            if "step" in state:
                state["step"].zero_()

    def step(self, logged: bool = False) -> dict[str, Any]:
        """One step: seconds, loss, gradient norm, milliseconds per phase."""
        self.step_number += 1
        synchronize(self.device)
        began = time.perf_counter()
        self.phases.mark("other")
        agreed = train.train_step(self.phases, self.step_number, self.batch, 0, self.objective, {},
                                  self.agreement, self.watch, 0.0, logged)
        self.watch.add(agreed.sums, agreed.applied)
        self.phases.mark("end")
        synchronize(self.device)
        seconds = time.perf_counter() - began
        table = torch.tensor(agreed.sums[: self.watch.period.numel()]).view_as(self.watch.period)
        video, audio, samples, heard = table.sum(dim=0).tolist()
        loss = float("nan")
        if agreed.applied:
            loss = video / samples + (audio / heard if self.job.task == "t2av" else 0.0)
        return {"seconds": seconds, "loss": loss, "norm": float(self.engine.get_global_grad_norm()),
                "phases": self.phases.milliseconds(), "norms": dict(self.watch.norms)}

    def measure(self, way: Way, small: bool) -> dict[str, Any]:
        """Warm up, time and describe one way."""
        self.restart()
        self.model.recompute = way.recompute
        set_compiled(self.model, way.compiled, "aot_eager" if small else "inductor")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        first = self.step(logged=True)
        norms = first["norms"]
        checked = check_update(self) if way.checked else None
        warm = [self.step() for _ in range(1 if way.checked or small else 2)]
        steps = [self.step() for _ in range(2 if small else way.steps)]
        seconds = spread(step["seconds"] for step in steps)
        flops = self.flops()
        rate = flops / seconds["median"] / 1e12
        phases = {name: spread(step["phases"][name] for step in steps)["median"]
                  for name in steps[0]["phases"]}
        values = {
            "seconds": seconds, "each": [step["seconds"] for step in steps],
            "first_step_seconds": first["seconds"], "tflop": flops / 1e12, "tflops": rate,
            "mfu": rate / PEAK_TFLOPS, "samples_per_second": self.job.batch / seconds["median"],
            "phases_ms": phases, "memory_gib": memory(), "attention": self.model.attention_kernel,
            "losses": [first["loss"], *(step["loss"] for step in (*warm, *steps))],
            "norms": [first["norm"], *(step["norm"] for step in (*warm, *steps))],
            "norm_by_parts": sum(x**2 for x in norms.values()) ** 0.5, "update": checked,
            "logged_seconds": [self.step(logged=True)["seconds"] for _ in range(2)],
        }
        if way.profiled and self.device.type == "cuda":
            values["profile"] = profile(self.step, self.phases)
        self.agreement.straggler.events.clear()
        return values


@torch.no_grad()
def check_update(run: Run) -> dict[str, float]:
    """Largest error of AdamW's update against its formula, by place in the largest flat shard.

    Places beyond 2^31 and 2^32 elements are among them: an index of 32 bits would miss those.
    """
    shard = max(find_buffers(run.engine), key=lambda s: s.flat.numel())
    size, length = shard.flat.numel(), min(1_000_000, shard.flat.numel())
    places = sorted({min(place, size - length) for place in (0, 2**30, 2**31, 2**32, size)})
    before = [shard.flat[place:][:length].clone() for place in places]
    with torch.enable_grad():
        run.step()
    moments = read_moments(run.engine, shard)
    count = float(base_optimizer(run.engine).state[shard.parameter]["step"])
    values = {}
    for place, old in zip(places, before, strict=True):
        first, second = (moments[key][place:][:length] for key in ("exp_avg", "exp_avg_sq"))
        step = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        expected = -LEARNING_RATE * (step + 0.01 * old)
        moved = shard.flat[place:][:length] - old
        values[str(place)] = float((moved - expected).norm() / expected.norm())
    return values | {"size": size, "updates": count}


def memory() -> dict[str, float]:
    """Peaks since the way began, in GiB."""
    if not torch.cuda.is_available():
        return {}
    return {"allocated": torch.cuda.max_memory_allocated() / 2**30,
            "reserved": torch.cuda.max_memory_reserved() / 2**30}


def work(job: Job, record: Record, small: bool) -> None:
    """All ways of one job; an error ends the job, what was measured stays."""
    device = torch.device("cpu" if small else "cuda")
    world = World(0, 1, 0, 1, "alone")
    began = time.perf_counter()
    start(world, 10)
    with tempfile.TemporaryDirectory() as folder, Supervisor(
            {"run_dir": folder}, WatchdogConfig(), world) as supervisor:
        run = Run(job, device, small, supervisor)
        synchronize(device)
        record.put("engine", {
            "preset": job.preset, "micro": job.micro, "batch": job.batch, "clip": job.clip,
            "task": job.task, "seconds_to_build": time.perf_counter() - began,
            "memory_gib": memory(), "optimizer": type(run.engine.optimizer).__name__,
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in run.model.parameters()),
            "tensors": len(list(run.model.parameters()))})
        for way in job.ways:
            if record.attempt(way.name, partial(run.measure, way, small)) is None:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    input()  # the driver says when the device is free
    work(JOBS[arguments.job], Record(arguments.result), arguments.rehearse)
    leave(0)


if __name__ == "__main__":
    main()
