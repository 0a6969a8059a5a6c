"""cluster/requeue.py: what a batch script does about an exit, without loading anything heavy."""

import subprocess
import sys
import time

import pytest

from cluster import requeue
from cluster.requeue import decide, newest_step
from tests.support.launch import ROOT, environment
from training.guards.run_state import read_status, write_status


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def save(run_dir, step):
    tag = run_dir / "checkpoints" / f"step{step:08d}"
    tag.mkdir(parents=True)
    (tag / "manifest.json").write_text("{}")


@pytest.mark.parametrize(("state", "code", "again"), [
    ("done", 0, False), ("stopped", 0, False), ("preempted", 0, True), ("running", 1, True),
    ("running", 137, True), ("running", 76, True), ("failed", 77, False), ("running", 78, False),
    ("done", 1, False),  # it hung at its exit
    ("running", 0, True),  # srun was told of no failure, but it did not finish
])
def test_which_exits_are_requeued(run_dir, state, code, again):
    write_status(run_dir, state)
    assert decide(run_dir, code)[0] == again


def test_a_crash_loop_ends_and_progress_starts_it_anew(run_dir):
    write_status(run_dir, "running")
    save(run_dir, 100)
    assert [decide(run_dir, 1)[0] for _ in range(4)] == [True, True, False, False]
    assert "no checkpoint after step 100" in decide(run_dir, 1)[1]
    save(run_dir, 200)
    assert [decide(run_dir, 1)[0] for _ in range(3)] == [True, True, False]


def test_a_preemption_is_no_crash_and_a_new_job_counts_anew(run_dir, monkeypatch):
    """Three preemptions while the model loads are bad luck, and a person's word is a new start."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert all(decide(run_dir, 143)[0] for _ in range(4))
    assert [decide(run_dir, 1)[0] for _ in range(2)] == [True, True]
    assert decide(run_dir, 143)[0] and not decide(run_dir, 1)[0]
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    assert [decide(run_dir, 1)[0] for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("damaged", [
    '{"event": "START", "ti', '{"event": "END"}}\n', "\0\0\n", "7\n"])
@pytest.mark.parametrize("name", ["jobs", "requeues"])
def test_a_damaged_history_does_not_decide(run_dir, name, damaged):
    """A full disk or a power cut tore a line: the run goes on, and a crash loop is still seen."""
    write_status(run_dir, "preempted")
    with open(run_dir / f"{name}.jsonl", "a") as file:
        file.write(damaged)
    assert decide(run_dir, 0)[0]
    write_status(run_dir, "running")
    assert [decide(run_dir, 1)[0] for _ in range(3)] == [True, True, False]


def test_what_an_earlier_start_said_does_not_count(run_dir):
    """A finished run, extended, that dies before train.py can tell anything."""
    write_status(run_dir, "done")
    line = '{"event": "%s", "time": %d, "job": "1-0", "exit": null}\n'
    (run_dir / "jobs.jsonl").write_text(line % ("START", time.time() - 60))
    assert decide(run_dir, 138) == (False, "the run is done")
    with open(run_dir / "jobs.jsonl", "a") as file:
        file.write(line % ("START", time.time() + 60) + line % ("END", time.time() + 61))
    assert decide(run_dir, 138)[0]


def test_only_finished_checkpoints_count(run_dir):
    save(run_dir, 100)
    (run_dir / "checkpoints" / "step00000300").mkdir()  # a killed save
    assert newest_step(run_dir) == 100
    assert newest_step(run_dir / "none") == 0
    assert read_status(run_dir) == {"state": "unknown"}


def test_the_command_of_the_batch_script(run_dir, tmp_path, capsys):
    config = tmp_path / "x.yaml"
    config.write_text("run_dir: elsewhere\n")
    arguments = [str(config), f"run_dir={run_dir}"]
    write_status(run_dir, "preempted")
    assert requeue.main(["0", *arguments]) == 0
    assert "requeue: preempted, exit 0" in capsys.readouterr().out
    assert requeue.main(["77", *arguments]) == 1
    assert "no requeue: bad numbers" in capsys.readouterr().out
    assert requeue.main(["0"]) == requeue.main(["x", *arguments]) == 78
    config.write_text("seed: 1\n")
    assert requeue.main(["0", str(config)]) == 78


def test_it_imports_nothing_heavy():
    code = "import sys, cluster.requeue; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(),
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
