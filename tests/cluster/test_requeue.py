"""cluster/requeue.py and record.py: what a batch script writes down and does about an exit."""

import json
import subprocess
import sys

import pytest

from cluster import record, requeue
from cluster.requeue import decide, newest_step
from common.events import append_event, events_path
from tests.support.launch import ROOT, environment
from training.guards.run_state import read_state


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def save(run_dir, step):
    tag = run_dir / "checkpoints" / f"step{step:08d}"
    tag.mkdir(parents=True)
    (tag / "manifest.json").write_text("{}")


def tell(run_dir, state, job=None):
    append_event(run_dir, "state", state=state, job=job)


@pytest.mark.parametrize(("state", "code", "again"), [
    ("done", 0, False), ("stopped", 0, False), ("preempted", 0, True), ("running", 1, True),
    ("running", 137, True), ("running", 76, True), ("failed", 77, False), ("running", 78, False),
    ("done", 1, False),  # it hung at its exit
    ("running", 0, True),  # srun was told of no failure, but it did not finish
])
def test_which_exits_are_requeued(run_dir, state, code, again):
    tell(run_dir, state)
    assert decide(run_dir, code)[0] == again


def test_a_crash_loop_ends_and_progress_starts_it_anew(run_dir):
    tell(run_dir, "running")
    save(run_dir, 100)
    assert [decide(run_dir, 1)[0] for _ in range(4)] == [True, True, False, False]
    assert "no checkpoint after step 100" in decide(run_dir, 1)[1]
    save(run_dir, 200)
    assert [decide(run_dir, 1)[0] for _ in range(3)] == [True, True, False]


def test_a_preemption_is_no_crash_and_a_new_job_counts_anew(run_dir, monkeypatch):
    """Three preemptions while the model loads are bad luck, and a person's word is a new start."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert all(decide(run_dir, 143)[0] for _ in range(4))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")  # the same job, which was requeued
    assert [decide(run_dir, 1)[0] for _ in range(2)] == [True, True]
    assert decide(run_dir, 143)[0] and not decide(run_dir, 1)[0]
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    assert [decide(run_dir, 1)[0] for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("damaged", [
    b'{"event": "job_start", "ti', b'{"event": "job_end"}\n', b"\0\0\n", b"7\n", b"\xff\xfe\n",
    b'{"event": "requeue", "time": 1, "requeue": true}\n', b'{"event": ["state"]}\n'])
def test_a_damaged_history_does_not_decide(run_dir, damaged):
    """A full disk or a power cut tore a line: the run goes on, and a crash loop is still seen."""
    tell(run_dir, "preempted")
    with open(events_path(run_dir), "ab") as file:
        file.write(damaged)
    assert decide(run_dir, 0)[0]
    tell(run_dir, "running")
    assert [decide(run_dir, 1)[0] for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("place", ["folder", "link to nowhere", "full disk"])
def test_a_history_that_cannot_be_read_or_written_does_not_decide(run_dir, place, capsys):
    path = events_path(run_dir)
    if place == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/full" if place == "full disk" else "/nowhere/events.jsonl")
    assert decide(run_dir, 1) == (True, "ended before it trained, exit 1, newest checkpoint at "
                                        "step 0")
    assert f"{path} cannot be written" in capsys.readouterr().err


def test_what_an_earlier_start_said_does_not_count(run_dir, monkeypatch):
    """A finished run, extended, that dies before train.py can tell anything."""
    tell(run_dir, "done", "1-0")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert decide(run_dir, 138) == (False, "the run is done")
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    for arguments in (["job_start", "nodes=n1", "ranks=1"], ["job_end", "exit=138"]):
        assert record.main([str(run_dir), *arguments]) == 0
    assert decide(run_dir, 138)[0]


def test_only_finished_checkpoints_count(run_dir):
    save(run_dir, 100)
    (run_dir / "checkpoints" / "step00000300").mkdir()  # a killed save
    assert newest_step(run_dir) == 100
    assert newest_step(run_dir / "none") == 0


def test_the_command_of_the_batch_script(run_dir, tmp_path, capsys):
    config = tmp_path / "x.yaml"
    config.write_text("run_dir: elsewhere\n")
    arguments = [str(config), f"run_dir={run_dir}"]
    tell(run_dir, "preempted")
    assert requeue.main(["0", *arguments]) == 0
    assert "requeue: preempted, exit 0" in capsys.readouterr().out
    assert requeue.main(["77", *arguments]) == 1
    assert "no requeue: bad numbers" in capsys.readouterr().out
    assert requeue.main(["0"]) == requeue.main(["x", *arguments]) == 78
    config.write_text("seed: 1\n")
    assert requeue.main(["0", str(config)]) == 78


def test_a_job_is_written_down_whatever_its_name(run_dir, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    log = 'logs/a "b" \\ c=d-7.out'
    assert record.main([str(run_dir), "job_start", "nodes=n[1-2]", "ranks=4", f"log={log}"]) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert record.main([str(run_dir), "job_end", "exit=137", "stage=train"]) == 0
    [start] = read_state(run_dir).starts
    assert (start.job, start.began["ranks"], start.began["log"]) == ("7-0", 4, log)
    assert (start.ended["exit"], start.ended["stage"]) == (137, "train")
    for wrong in (["job_end"], ["job_end", "exit=x"], ["end", "exit=1"], ["job_end", "exit"]):
        assert record.main([str(run_dir), *wrong]) == 78
        assert capsys.readouterr().err.startswith("error: ")
    assert len(read_state(run_dir).events) == 2


@pytest.mark.parametrize("name", ["requeue", "record"])
def test_it_imports_nothing_heavy(name):
    code = f"import sys, cluster.{name}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(),
                          capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
