"""launch/: shell that parses, and the batch script run with a stand-in for srun.

The stand-in starts real train.py processes with the variables that srun sets; a real Slurm is not
needed here. What it cannot show is srun's own behaviour (signals, node failures).
"""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT, environment, records
from tests.prepared import write_shards
from tests.tiny import write_tangoflux, write_wan

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
[[ "$1" == mkdir ]] && exec "$@"
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 "$@" &
done
wait -n && wait -n
"""


@pytest.mark.parametrize("script", sorted((ROOT / "launch").iterdir()), ids=lambda p: p.name)
def test_scripts_parse_and_stop_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert "set -euo pipefail" in script.read_text()


def write_executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
def test_batch_script_trains_under_sruns_variables(tmp_path):
    write_wan(tmp_path / "wan")
    write_tangoflux(tmp_path / "tangoflux")
    write_shards(tmp_path / "shards", train=8, validation=2)
    (tmp_path / "bin").mkdir()
    write_executable(tmp_path / "bin" / "srun", SRUN)
    write_executable(tmp_path / "bin" / "scontrol", "#!/bin/sh\necho 127.0.0.1\n")
    clean = environment()
    variables = clean | {
        # The script puts the checkout's .venv first; the stand-ins must still be found.
        "PATH": f"{tmp_path / 'bin'}:{clean['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1", "SLURM_TMPDIR": str(tmp_path),
        "TORCH_EXTENSIONS_DIR": os.environ.get(
            "TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions")),
    }
    done = subprocess.run(
        ["bash", "launch/train.sbatch", "configs/playground.yaml", f"run_dir={tmp_path}/run",
         f"wan={tmp_path}/wan", f"tangoflux={tmp_path}/tangoflux", f"data.root={tmp_path}/shards",
         "model.num_joint_blocks=2", "max_steps=2", "validate_every=2"],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 ranks (srun), ZeRO-3" in done.stdout
    assert "END" in done.stdout and "exit 0" in done.stdout
    assert sorted(records(tmp_path / "run", "train/loss")) == [1, 2]


def test_local_starts_one_process_where_there_is_no_gpu(tmp_path):
    """Also without nvidia-smi, whose absence must not end the script in silence."""
    write_executable(tmp_path / "torchrun", '#!/bin/sh\necho torchrun "$@"\n')
    script = tmp_path / "launch" / "local.sh"  # away from the checkout's own .venv/bin/torchrun
    script.parent.mkdir()
    script.write_text((ROOT / "launch" / "local.sh").read_text())
    done = subprocess.run(
        ["bash", str(script), "configs/x.yaml", "a=1"], capture_output=True, text=True, check=False,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert done.stdout.strip() == (
        "torchrun --standalone --nproc-per-node=1 train.py configs/x.yaml a=1"
    ), done.stderr
