"""train.py with one thing going wrong on one rank: the real loop, engine, data and signals.

    # as train.py, ranks from environment
    python tests/support/workers/fault_worker.py CONFIG [key=value ...]
    # several runs in the same processes
    torchrun ... tests/support/workers/fault_worker.py --runs SPEC.json

The fault is JSON in the variable FAULT, or "fault" of a run in SPEC: {"kind", "rank", "steps"};
instead of a name, "kind" may be an object with one for each step.
With --runs each rank leaves RUN/weights_rankN.jsonl, a digest of its fp32 weights after every
step, and RUN/error_rankN.txt where the run raised.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import train
from common.ranks import resolve_world
from common.settings import load_config
from config import RunConfig, build_plan
from data.schema import DataError
from evaluation import samples
from model.objective import Objective
from training.distributed import leave, shutdown, start
from training.guards.bad_numbers import BadNumbersError
from training.zero_state import find_buffers


class Fault:
    """Patches the loop once; what happens depends on the step and the rank."""

    def __init__(self) -> None:
        self.spec: dict[str, Any] = {"kind": "none", "rank": 0, "steps": []}
        self.rank = int(os.environ.get("RANK", "0"))
        self.step = 0
        self.digests: Path | None = None
        self.train_step, self.losses = train.train_step, Objective.losses
        train.train_step = self.patched_step
        fault = self

        def losses(self, model, noised, cross_modal_bias=0.0):
            return fault.patched_losses(self, model, noised, cross_modal_bias)

        Objective.losses = losses  # type: ignore[method-assign]

    @property
    def due(self) -> bool:
        return self.spec["rank"] in (self.rank, "all") and self.step in self.spec["steps"]

    @property
    def kind(self) -> str:
        """What goes wrong at this step."""
        kind = self.spec["kind"]
        return kind if isinstance(kind, str) else kind[str(self.step)]

    def patched_step(self, engine: Any, step: int, *rest: Any) -> Any:
        self.step = step
        self.act()
        try:
            return self.train_step(engine, step, *rest)
        finally:
            self.step = 0  # a validation is not at any step
            if self.digests:
                digest = hashlib.sha256()
                for shard in find_buffers(engine):
                    digest.update(shard.flat.detach().numpy().tobytes())
                    assert shard.flat.isfinite().all(), f"step {step}: weights are not finite"
                with open(self.digests, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "digest": digest.hexdigest()}) + "\n")

    def act(self) -> None:
        """What goes wrong at the start of a step."""
        if not self.due:
            return
        kind = self.kind
        if kind == "hang":
            time.sleep(3600)
        elif kind == "stop":  # as a debugger or the kernel would
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind in ("SIGUSR1", "SIGTERM"):
            for _ in range(3):  # Slurm sends them more than once
                os.kill(os.getpid(), getattr(signal, kind))
        elif kind == "group":  # Slurm signals every process of a job
            os.killpg(os.getpgrp(), signal.SIGUSR1)
            os.killpg(os.getpgrp(), signal.SIGTERM)
        elif kind == "crash":
            raise ZeroDivisionError("a bug of ours")
        elif kind == "memory":
            torch.empty(1 << 50, dtype=torch.uint8)

    def patched_losses(self, objective: Objective, model: Any, noised: Any, bias: float) -> Any:
        if self.due and self.kind == "slow":
            time.sleep(0.4)
        video, audio = self.losses(objective, model, noised, bias)
        if not self.due:
            return video, audio
        kind = self.kind
        if kind == "blind":
            raise RuntimeError("no memory to look with")
        if kind == "nan_loss":
            video = video * float("nan")
        elif kind == "inf_loss":  # its gradient is finite
            video = video + float("inf")
        elif kind == "nan_gradient":  # its loss is finite
            video.register_hook(lambda gradient: gradient * float("nan"))
        elif kind == "spike":
            video = video * 100
        return video, audio


def no_decoders(*arguments: Any) -> None:
    raise DataError("wan=gone: no such folder")


def run_all(path: Path, fault: Fault) -> None:
    world = resolve_world(os.environ)
    start(world, 5)
    for run in json.loads(path.read_text()):
        config = load_config(RunConfig, run["config"], run["overrides"])
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        fault.spec = fault.spec | run.get("fault", {"kind": "none"})
        fault.digests = run_dir / f"weights_rank{world.rank}.jsonl"
        try:
            train.run(config, build_plan(config, world), world)
        except BadNumbersError as error:
            (run_dir / f"error_rank{world.rank}.txt").write_text(str(error))
    shutdown()


if __name__ == "__main__":
    injected = Fault()
    if sys.argv[1] == "--runs":
        run_all(Path(sys.argv[2]), injected)
        leave(0)
    else:
        injected.spec |= json.loads(os.environ.get("FAULT", "{}"))
        if injected.spec["kind"] == "blind" and injected.spec["rank"] == injected.rank:
            samples.Decoders = no_decoders  # type: ignore[assignment, misc]
        leave(train.main(sys.argv[1:]))
