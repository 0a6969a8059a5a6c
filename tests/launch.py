"""Start real processes the way users do; shared by the tests that train."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """This process's environment without any rank, on the CPU, ninja on the PATH."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items()
             if key not in ranks and not key.startswith("SLURM_")}
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"
    return clean | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(command: list[str], check: bool = True, **extra: str) -> subprocess.CompletedProcess:
    """One command from the repository's root; its output is in the error when it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment() | extra, capture_output=True, text=True, timeout=600,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} exited with {done.returncode}\n"
                             f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return done


def torchrun(processes: int, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={processes}", *arguments],
        check,
    )


def records(run_dir: Path, tag: str) -> dict[int, float]:
    """step -> value of one tag of a run's metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {record["step"]: record[tag] for record in found if tag in record}
