"""Tiny worlds and real ranks for the tests of what goes wrong (see
tests/support/workers/fault_worker.py).
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.inputs.prepared import write_shards
from tests.support.launch import run_ranks, start_ranks
from tests.support.models.tiny import write_tangoflux, write_wan

FP32 = {"train_micro_batch_size_per_gpu": 4}
BF16 = FP32 | {"bf16": {"enabled": True}}
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
ENGINES = {
    **{f"fp32_zero{stage}": FP32 | {"zero_optimization": {"stage": stage}} for stage in (0, 1, 2)},
    "fp32_zero3": FP32 | {"zero_optimization": ZERO3},
    **{f"bf16_zero{stage}": BF16 | {"zero_optimization": {"stage": stage}} for stage in (1, 2)},
    "bf16_zero3": BF16 | {"zero_optimization": ZERO3},
}


def write_world(root: Path) -> Path:
    """Backbones, shards, every engine, and run.yaml: 8 steps of 8 samples, saved every 3."""
    write_wan(root / "wan")
    write_tangoflux(root / "tangoflux")
    write_shards(root / "shards", train=20, validation=2)
    for name, values in ENGINES.items():
        (root / f"{name}.json").write_text(json.dumps(values))
    (root / "run.yaml").write_text(f"""
run_dir: {root}/runs/default
wan: {root}/wan
tangoflux: {root}/tangoflux
model: {{num_joint_blocks: 2}}
data: {{root: {root}/shards, num_workers: 0}}
optimizer: {{lr: 1.0e-3}}
warmup_steps: 1
global_batch_size: 8
max_steps: 8
validate_every: null
validation_samples: 1
save_every: 3
self_check: false
deepspeed: {root}/fp32_zero2.json
""")
    return root


def start_runs(root: Path, processes: int, runs: dict[str, dict[str, Any]]) -> str:
    """Several runs in the same ranks: name -> {"overrides", "fault"}; returns what they said."""
    spec = [{"config": f"{root}/run.yaml", "fault": run.get("fault", {"kind": "none"}),
             "overrides": [f"run_dir={root}/runs/{name}", *run.get("overrides", [])]}
            for name, run in runs.items()]
    path = root / f"spec{processes}.json"
    path.write_text(json.dumps(spec))
    return run_ranks(processes, "tests/support/workers/fault_worker.py", "--runs", str(path)).stdout


class Ranks:
    """Ranks of one train.py, started as srun does: no launcher that could kill the others."""

    def __init__(
        self, processes: int, arguments: list[str], fault: dict[str, Any] | None = None,
        **extra: str,
    ) -> None:
        self.began = time.monotonic()
        self.files = [tempfile.TemporaryFile("w+") for _ in range(processes)]
        self.programs = start_ranks(
            processes, ["tests/support/workers/fault_worker.py", *arguments],
            [file for file in self.files for _ in ("output", "errors")],
            FAULT=json.dumps(fault or {}), **extra)

    def finish(self, timeout: float = 300) -> tuple[list[int], list[str]]:
        """(exit codes, outputs) of all ranks; kills what is left at the end of the time."""
        outputs = []
        for program, file in zip(self.programs, self.files, strict=True):
            try:
                program.wait(max(timeout - (time.monotonic() - self.began), 1))
            except subprocess.TimeoutExpired:
                program.kill()
            program.wait()
            file.seek(0)
            outputs.append(file.read())
            file.close()
        return [program.wait() for program in self.programs], outputs


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """What a run has written down of this kind."""
    return [line for line in lines(run_dir / "events.jsonl") if line["event"] == kind]


def status(run_dir: Path) -> dict[str, Any]:
    """The newest state that it told."""
    return events(run_dir, "state")[-1]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
