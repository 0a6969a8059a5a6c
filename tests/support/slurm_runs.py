"""Tiny runs on the private cluster; shared by the tests that submit them."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.inputs.prepared import write_shards
from tests.support.launch import ROOT, records
from tests.support.models.tiny import write_tangoflux, write_wan
from tests.support.slurm_cluster import Cluster

STEPS = 40
SLOW = {"TEST_STEP_SECONDS": "1"}
# What Python reads first of all: a rank that dies at once, or whose steps take their time, so that
# what must happen during a run does on any machine.
CUSTOMIZE = """import os, sys, time
if "train.py" in " ".join(sys.orig_argv):
    rank, _, code = os.environ.get("TEST_CRASH", "").partition(":")
    if rank in ("all", os.environ.get("SLURM_PROCID")):
        os._exit(int(code))
    if os.environ.get("TEST_STEP_SECONDS"):
        import torch
        original, last = torch.optim.AdamW.step, [0.0]
        def step(*arguments, **named):
            time.sleep(max(0.0, last[0] + float(os.environ["TEST_STEP_SECONDS"]) - time.time()))
            last[0] = time.time()
            return original(*arguments, **named)
        torch.optim.AdamW.step = step
"""


def write_assets(root: Path) -> Path:
    """Backbones, shards, engine and config; the config's path."""
    write_wan(root / "wan")
    write_tangoflux(root / "tangoflux")
    write_shards(root / "shards", train=32, validation=2)
    engine = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    engine["train_micro_batch_size_per_gpu"] = 1  # one global batch for 1, 2 and 4 ranks
    (root / "engine.json").write_text(json.dumps(engine))
    (root / "customize").mkdir()
    (root / "customize" / "sitecustomize.py").write_text(CUSTOMIZE)
    config = root / "tiny.yaml"
    config.write_text(
        f"run_dir: {root}/run\nwan: {root}/wan\ntangoflux: {root}/tangoflux\n"
        f"model: {{num_joint_blocks: 2}}\ndata: {{root: {root}/shards, num_workers: 0}}\n"
        "optimizer: {lr: 1.0e-3}\nwarmup_steps: 5\nglobal_batch_size: 4\n"
        f"max_steps: {STEPS}\ndeepspeed: {root}/engine.json\nself_check: false\n"
        "validate_every: null\nsave_every: 1000\n"
    )
    return config


def extensions() -> str:
    """DeepSpeed's one small op as it was built for this checkout, not again for every job."""
    return os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))


class Runs:
    """Submits launch/train.sbatch for runs of one config, each in a directory of its own."""

    def __init__(self, slurm: Cluster, root: Path) -> None:
        self.slurm, self.root, self.config = slurm, root, write_assets(root)

    def run_dir(self, name: str) -> Path:
        return self.root / name

    def submit(
        self, name: str, *options: str, nodes: str = "2", tasks: int = 1, overrides: tuple = (),
        **environment: str,
    ) -> int:
        return self.slurm.submit(
            f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}",
            "--cpus-per-task=1", "--time=60", f"--job-name={name}",
            f"--output={self.root}/%x-%j.out", *options, "launch/train.sbatch", str(self.config),
            f"run_dir={self.run_dir(name)}", *overrides,
            TORCH_EXTENSIONS_DIR=extensions(), OMP_NUM_THREADS="1",
            PYTHONPATH=f"{self.root}/customize:{ROOT}", **environment,
        )

    def steps(self, name: str) -> dict[int, float]:
        """step -> loss, so far."""
        path = self.run_dir(name) / "metrics.jsonl"
        return records(self.run_dir(name), "train/loss") if path.exists() else {}

    def checkpoints(self, name: str) -> list[int]:
        found = self.run_dir(name).glob("checkpoints/step*/manifest.json")
        return sorted(int(path.parent.name[4:]) for path in found)

    def until(self, job: int, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Fails with the job's log when the condition does not come true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds} s in vain:\n{self.slurm.log(job)[-8000:]}")
            time.sleep(0.2)

    def until_step(self, name: str, job: int, step: int) -> None:
        self.until(job, lambda: step in self.steps(name))

    def requeued(self, job: int, times: int = 1, seconds: float = 240) -> None:
        """Until it is pending again, or has started again already."""
        self.until(job, lambda: self.slurm.show(job)["Restarts"] == str(times), seconds)

    def kill_rank(self, job: int, rank: int, name: bytes = b"train.py") -> None:
        """SIGKILL to one rank's process, as the kernel does when memory runs out."""
        marks = {f"SLURM_PROCID={rank}".encode(), f"SLURM_JOB_ID={job}".encode(),
                 f"SLURM_CONF={self.slurm.conf}".encode()}
        killed = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = set((process / "environ").read_bytes().split(b"\0"))
                if marks <= variables and name in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
                    killed.append(process.name)
            except OSError:  # gone in between
                continue
        assert killed, f"no process of rank {rank} of job {job}"

    def status(self, name: str | Path) -> str:
        """What tools.status tells of a run of this object's, or of a run directory."""
        return self.slurm.run(sys.executable, "-m", "tools.status", str(self.root / name))
