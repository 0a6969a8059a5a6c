"""launch/: shell that parses and that shellcheck has nothing against; one node without Slurm.

The batch scripts are run by tests/cluster/test_slurm.py, on a real Slurm.
"""

import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.launch import ROOT, environment

SCRIPTS = sorted((ROOT / "launch").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_stop_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert "set -euo pipefail" in script.read_text() or script.name == "env.sh"  # sourced by all


@pytest.mark.skipif(not shutil.which("shellcheck"), reason=(
    "NO SHELLCHECK HERE, launch/ is not linted: apt-get install shellcheck"))
def test_shellcheck_is_silent():
    done = subprocess.run(["shellcheck", "--external-sources", *map(str, SCRIPTS)], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_a_site_has_to_look_at_is_marked():
    """Paths, devices, sizes and times of a cluster stand on lines that say EDIT."""
    site = re.compile(r"^#SBATCH --(gpus|cpus|mem|time|ntasks-per-node|array|signal)|=/(?!tmp)|ib0")
    for script in SCRIPTS:
        for line in script.read_text().splitlines():
            if site.search(line) and script.name != "pair.sbatch":
                assert "# EDIT" in line, f"{script.name}: {line}"


def write_executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_jobs_of_a_pair_inherit_no_cache_of_the_node_that_submits(tmp_path):
    """They would build DeepSpeed's op in one folder of a shared disk, all nodes at once."""
    keys = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TMPDIR")
    words = " ".join(f'"{key}=${{{key}-}}"' for key in keys)
    write_executable(tmp_path / "sbatch", f'#!/bin/sh\necho {words} >>"{tmp_path}/seen"\necho 7\n')
    clean = {key: value for key, value in environment().items() if key not in keys}
    for extra in ({}, {"SLURM_JOB_ID": "5", "SLURM_SUBMIT_DIR": str(ROOT)}):
        done = subprocess.run(
            ["bash", "launch/pair.sbatch", "configs/alt_merge"], cwd=ROOT, text=True, check=False,
            env=clean | {"PATH": f"{tmp_path}:{clean['PATH']}"} | extra, capture_output=True)
        assert done.returncode == 0 and "run directory runs/alt_merge_t2v\n" in done.stdout, done
    assert set((tmp_path / "seen").read_text().splitlines()) == {
        " ".join(f"{key}=" for key in keys)}


@pytest.mark.parametrize("line", [
    "container=(apptainer exec image)", "srun_options=(--container-image=image)"])
def test_in_a_container_the_host_needs_no_environment(tmp_path, line):
    """Every python of a batch script runs in it; here only that one has any."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    env = tmp_path / "launch" / "env.sh"
    begin = env.read_text().index("container=() srun_options=()\n")
    end = env.read_text().index("\n", begin)
    env.write_text(f"{env.read_text()[:end]}; {line}{env.read_text()[end:]}")
    tools = tmp_path / "bin"
    tools.mkdir()
    inside = f'echo "$*" >>"{tmp_path}/inside"; case "$*" in *--where*) echo runs/x;; esac'
    write_executable(tools / "apptainer", f'#!/bin/sh\nshift 2\n{inside}\n')
    write_executable(tools / "srun", f'#!/bin/bash\nwhile [[ $1 == --* ]]; do [[ $1 != '
                     f'--container-image=* ]] || seen=1; shift; done\n[[ $seen ]] || exec "$@"\n'
                     f'{inside}\n')
    write_executable(tools / "python", "#!/bin/sh\necho no environment here >&2; exit 1\n")
    write_executable(tools / "sbatch", f'#!/bin/sh\nfor word; do last=$word; done\n'
                     f'echo "$*" >>"{tmp_path}/submitted"\n'
                     f'exec 3>&1 >>"{tmp_path}/log" 2>&1\n'
                     f'case "$*" in *--wrap*) SLURM_JOB_ID=7 sh -c "$last";; esac\n'
                     f'echo 7 >&3\n')

    def submit():
        return subprocess.run(
            ["bash", "launch/pair.sbatch", "--partition=a", "--nodes=2", "configs/x"],
            cwd=tmp_path, text=True, check=False, capture_output=True,
            env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_TMPDIR": str(tmp_path)})

    refused = submit()  # as if --partition a were meant: the prefix names no pair
    assert refused.returncode == 78 and "each as --option=value" in refused.stderr
    (tmp_path / "configs").mkdir()
    for task in ("t2av", "t2v"):
        (tmp_path / "configs" / f"x_{task}.yaml").touch()
    done = submit()
    assert done.returncode == 0 and "run directory runs/x" in done.stdout, done
    assert not list(tmp_path.glob("avfulldit-*"))  # the report's own folder
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert ["--nodes=2" in line for line in submitted] == [True, True, False]
    assert all("--partition=a" in line for line in submitted)
    seen = (tmp_path / "inside").read_text().splitlines()
    assert [line.split(" configs/")[0] for line in seen] == [
        *["python -m tools.status --where"] * 2, "python -m tools.report runs/x runs/x"], seen
    batch = (ROOT / "launch" / "train.sbatch").read_text()
    calls = re.findall(r"(.{0,5})python (?!-u)", batch)  # -u: the ranks' own, under srun
    assert len(calls) == 4 and all(call.endswith("once ") for call in calls), calls


def test_local_starts_one_process_where_there_is_no_gpu(tmp_path):
    """Also without nvidia-smi, whose absence must not end the script in silence."""
    write_executable(tmp_path / "torchrun", '#!/bin/sh\necho torchrun "$@"\n')
    script = tmp_path / "launch" / "local.sh"  # away from the checkout's own .venv/bin/torchrun
    script.parent.mkdir()
    for name in ("local.sh", "env.sh"):
        shutil.copy(ROOT / "launch" / name, script.parent)
    done = subprocess.run(
        ["bash", str(script), "configs/x.yaml", "a=1"], capture_output=True, text=True, check=False,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert done.stdout.strip() == (
        "torchrun --standalone --nproc-per-node=1 train.py configs/x.yaml a=1"
    ), done.stderr
