"""tools.status: from files as train.py and launch/train.sbatch leave them, whole or half done."""

import errno
import json
import os
import time
from datetime import datetime
from pathlib import Path

import pytest

from cluster.requeue import decide
from common.events import append_event, events_path
from common.files import append_lines
from tests.support.launch import ROOT, run
from tools.status import StatusError, find_run, main, read_run, report
from training.checkpoint.contents import Contents, write_contents

NODES = {"nodes": "n[1-2]", "ranks": 4}


def tell(run_dir, event, ago=0.0, **values):
    """An event of `ago` seconds ago."""
    when = datetime.fromtimestamp(time.time() - ago).astimezone().isoformat()
    append_lines(events_path(run_dir), [{"event": event, "time": when, **values}])


@pytest.fixture
def folder(tmp_path):
    """A run at step 40 of 100, preempted once, going on as job 7-1."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "run.json").write_text(json.dumps(
        {"task": "t2av", "max_steps": 100, "global_batch_size": 8, "log_every": 1}))
    steps = [{"step": step, "train/loss": 1.0, "train/loss_video": 0.4, "train/loss_audio": 0.6,
              "time/step_seconds": 0.5} for step in range(1, 41)]
    held = {"step": 20, "validation/loss_video": 0.3, "validation/loss_audio": 0.7}
    append_lines(tmp_path / "metrics.jsonl", [*steps, held])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "train/lo')  # being written
    tag = tmp_path / "checkpoints" / "step00000030"
    tag.mkdir(parents=True)
    (tag / "weight-00000.safetensors").write_bytes(b"12345")
    write_contents(tag, Contents(
        step=30, world_size=4, updates=0, skipped_steps=0, parameters={}, kinds=["weight"],
        groups=[], files={"weight-00000.safetensors": (5, "")}, run={}))
    tell(tmp_path, "job_start", 700, job="7-0", **NODES)
    tell(tmp_path, "state", 690, job="7-0", state="running")
    tell(tmp_path, "start", 690, first_step=0)
    tell(tmp_path, "skip", 650, step=12, kind="spike", applied=True)
    tell(tmp_path, "skip", 620, step=33, kind="spike", applied=True)  # its step is done again
    tell(tmp_path, "state", 301, job="7-0", state="preempted", reason="signal")
    tell(tmp_path, "job_end", 300, job="7-0", exit=0, stage="train")
    tell(tmp_path, "requeue", 299, job="7-0", step=30, exit=0, state="preempted", requeue=True,
         why="preempted")
    tell(tmp_path, "job_start", 200, job="7-1", log="logs/x-7.out", **NODES)
    tell(tmp_path, "state", 190, job="7-1", state="running", checkpoint=str(tag))
    tell(tmp_path, "start", 190, first_step=30)
    tell(tmp_path, "skip", 100, step=33, kind="gradient not finite", applied=False)
    return tmp_path


def test_everything_is_told(folder):
    told = report(read_run(folder))
    for line in (
        "state       running, last sign 0 s ago",
        "step        40 of 100, 40.0 %, time left 0:00:30",
        "speed       0.5 s a step, 16 samples/s",
        "loss        1.0000  video 0.4000  audio 0.6000  (mean of the last 20 records 1.0000)",
        "validation  video 0.3000  audio 0.7000  at step 20",
        "checkpoint  step 30, 0 s ago, whole: 1 files, 5e-09 GB, written by 4 ranks; 1 there",
        "job         7-1 on n[1-2], 4 ranks, started 3 min ago",
        "starts      2, on n[1-2]; requeued 1 times, 1 of them by the job itself",
        "skips       1 updates, 2 events; last gradient not finite at step 33",
    ):
        assert line in told, told
    assert "start of job 7-1" in told.splitlines()[-1]


def test_a_damaged_checkpoint_and_a_failure_are_named(folder):
    weights = folder / "checkpoints" / "step00000030" / "weight-00000.safetensors"
    weights.write_bytes(b"123")
    append_event(folder, "alarm", words="rank 3 on n2: phase 'data' took too long", exit=76,
                 folder=folder / "failures" / "20260101T000000_1")
    told = report(read_run(folder))
    assert "is missing or has not the 5 bytes" in told
    assert "failure: rank 3 on n2: phase 'data' took too long" in told.splitlines()[-1]


def test_a_checkpoint_that_cannot_be_read_now_is_named(folder, monkeypatch):
    real = Path.stat

    def stat(path, **options):
        if path.suffix == ".safetensors":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert "Stale file handle; 1 there" in report(read_run(folder))


def test_a_run_that_died_in_silence_is_doubted(folder):
    now = time.time()
    os.utime(folder / "metrics.jsonl", (now - 3000, now - 3000))
    events = [json.loads(line) for line in events_path(folder).read_text().splitlines()]
    events_path(folder).unlink()
    for event in events:
        tell(folder, ago=3000, **{key: value for key, value in event.items() if key != "time"})
    assert "running?  NO SIGN FOR 50 min" in report(read_run(folder))
    tell(folder, "job_end", 60, job="7-1", exit=137)
    told = report(read_run(folder))
    assert "ended with exit 137 60 s ago: see the job's log logs/x-7.out" in told


def test_a_start_that_has_not_got_so_far_and_a_cancelled_job(folder):
    tell(folder, "job_end", 30, job="7-1", exit=137)
    tell(folder, "job_start", job="7-2", **NODES)
    told = report(read_run(folder))
    assert "state       starting, running before" in told
    assert "step        40 before this start\n" in told  # perhaps with another max_steps
    tell(folder, "state", job="7-2", state="running")
    tell(folder, "state", job="7-2", state="preempted")  # scancel ends the script too: no END
    assert "state       preempted, last sign 0 s ago" in report(read_run(folder))


def test_a_job_that_was_refused_says_nothing_of_the_one_that_trains(folder):
    tell(folder, "job_start", job="8-0", nodes="n9", ranks=1)  # the same run directory
    assert "starting, running before" in report(read_run(folder))
    tell(folder, "job_end", job="8-0", exit=78)
    told = report(read_run(folder))
    assert "state       running, last sign" in told and "job         7-1 on n[1-2]" in told
    assert "starts      2, on n[1-2]" in told and "n9" not in told
    assert "end of job 8-0, exit 78" in told.splitlines()[-1]


def test_what_becomes_of_a_preempted_one(folder, monkeypatch):
    tell(folder, "state", job="7-1", state="preempted", reason="signal")
    tell(folder, "job_end", job="7-1", exit=0)
    assert "preempted: signal, goes on when requeued or submitted again (squeue --me)" in report(
        read_run(folder))
    assert "requeued 1 times, 1 of them by the job itself" in report(read_run(folder))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert decide(folder, 0)[0]
    told = report(read_run(folder))
    assert "preempted: signal, in the queue again unless cancelled (squeue --me), last" in told
    assert "requeued 2 times, 2 of them by the job itself" in told


def test_a_requeue_by_slurm_or_a_person_counts(folder):
    tell(folder, "job_start", job="7-2", **NODES)
    assert "starts      3, on n[1-2]; requeued 2 times, 1 of them by the job itself" in report(
        read_run(folder))


def test_a_crash_that_is_in_the_queue_again(folder):
    tell(folder, "job_end", job="7-1", exit=137)
    assert "ended with exit 137 0 s ago: see the job's log" in report(read_run(folder))
    assert decide(folder, 137)[0]
    told = report(read_run(folder))
    assert "exit 137 0 s ago, in the queue again unless cancelled (squeue --me)" in told
    assert "requeued: ended without a word, exit 137" in told
    tell(folder, "job_start", job="7-2", **NODES)
    assert "requeued 2 times, 2 of them by the job itself" in report(read_run(folder))


def test_a_crash_loop_is_explained_and_the_log_named(folder, monkeypatch):
    """A process may tell its end (failed) or not (killed)."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tell(folder, "job_end", job="7-1", exit=137)
    assert [decide(folder, 137)[0] for _ in range(2)] == [True, True]
    tell(folder, "state", job="7-1", state="failed", reason="RuntimeError: peer")
    assert "failed: RuntimeError: peer, in the queue again unless" in report(read_run(folder))
    assert not decide(folder, 137)[0]
    words = ", not requeued: 2 requeues brought no checkpoint after step 30"
    assert f"failed: RuntimeError: peer{words}, last sign" in report(read_run(folder))
    assert "requeued 3 times, 3 of them by the job itself" in report(read_run(folder))


def test_a_killed_one_that_is_not_requeued_names_its_log(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tell(folder, "job_end", job="7-1", exit=137)
    assert [decide(folder, 137)[0] for _ in range(3)] == [True, True, False]
    assert ("ended with exit 137 0 s ago, not requeued: 2 requeues brought no checkpoint after "
            "step 30: see the job's log logs/x-7.out") in report(read_run(folder))


def test_a_hopeless_exit_is_explained(folder):
    tell(folder, "job_end", 60, job="7-1", exit=77)
    assert "ended with exit 77 (bad numbers) 60 s ago" in report(read_run(folder))


def test_a_start_that_the_preflight_ended(tmp_path):
    tell(tmp_path, "job_start", 30, job="8-0", nodes="n1", ranks=2)
    assert "state       starting; last sign" in report(read_run(tmp_path))
    tell(tmp_path, "job_end", 9, job="8-0", exit=1, stage="preflight")
    told = report(read_run(tmp_path))
    assert "state       ended with exit 1 9 s ago, in preflight: see the job's log" in told


def test_a_run_without_a_batch_script(tmp_path):
    tell(tmp_path, "state", 50, job=None, state="running")
    assert "state       running, last sign 50 s ago" in report(read_run(tmp_path))
    tell(tmp_path, "state", job=None, state="failed", reason="KeyError: x")
    told = report(read_run(tmp_path))
    assert "state       failed: KeyError: x, last sign 0 s ago" in told and "job  " not in told


def test_it_imports_nothing_heavy():
    code = "import sys, tools.status; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert run(["python", "-c", code]).stdout == "[]\n"


def test_the_requeue_that_was_decided_is_shown(folder):
    assert decide(folder, 1)[0]
    assert "requeued 2 times, 2 of them by the job itself" in report(read_run(folder))


def test_what_is_no_run_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "nothing was started there yet; a job that waits has no files (squeue --me)" in (
        capsys.readouterr().err)
    with pytest.raises(StatusError, match="only a config takes key=value"):
        find_run(str(tmp_path), ["a=1"])


def test_it_looks_again_until_it_is_stopped(folder, capsys, monkeypatch):
    rounds = []

    def wait(seconds):
        rounds.append(seconds)
        tell(folder, "state", job="7-1", state="done", step=77 + len(rounds))
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", wait)
    assert main([str(folder), "--watch"]) == 0
    shown = capsys.readouterr().out.split("\033[2J\033[H")
    assert len(shown) == 3 and "done" not in shown[0].splitlines()[1]
    assert all("done" in again.splitlines()[1] for again in shown[1:])


def test_where_reads_the_config_as_train_does(tmp_path):
    said = run(["python", "-m", "tools.status", "--where", f"{ROOT}/configs/alt_merge_t2v.yaml"])
    assert said.stdout == "runs/alt_merge_t2v\n"
    said = run(["python", "-m", "tools.status", "--where", "configs/playground.yaml", "run_dir=x"])
    assert said.stdout == "x\n"
    wrong = run(["python", "-m", "tools.status", "--where", "configs/no.yaml"], check=False)
    assert wrong.returncode == 78 and "no such file" in wrong.stderr
