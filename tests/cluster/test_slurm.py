"""launch/ on a real Slurm: two private nodes (tests/support/slurm_cluster.py), `make test-slurm`.

Every job goes through launch/train.sbatch or launch/prepare.sbatch as they are, with command-line
options in the place of the lines marked EDIT. An undisturbed run is the reference: after a signal,
a preemption, a crash or a lost node the losses must be its losses, to the last bit.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.schema import load_metadata
from tests.support.faults import events
from tests.support.kills import prepare_kills
from tests.support.launch import ROOT, records
from tests.support.slurm_cluster import Cluster, missing
from tests.support.slurm_runs import SLOW, STEPS, Runs, extensions

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=(
        f"NO SLURM HERE, nothing of launch/ is tested on one: {', '.join(missing())} not found; "
        "apt-get install slurm-wlm munge, as root")),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def runs(slurm, tmp_path_factory):
    return Runs(slurm, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def calm(runs, tmp_path_factory):
    """Run directory and log of two nodes with one rank each that nobody disturbed.

    Trained once for all processes of pytest, each of which has a cluster of its own.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with open(shared / "calm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the one that trains it has
        path = shared / "calm.txt"
        if not path.exists():
            job = runs.submit("calm")
            found = runs.slurm.wait(job, "COMPLETED", 400)
            assert found["ExitCode"] == "0:0" and found["Restarts"] == "0"
            path.write_text(f"{runs.run_dir('calm')}\n{runs.slurm.log(job)}")
    run_dir, log = path.read_text().split("\n", 1)
    return Path(run_dir), log


@pytest.fixture(scope="module")
def reference(calm):
    """step -> loss of that run."""
    losses = records(calm[0], "train/loss")
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


def test_submit_train_finish(runs, calm):
    run_dir, log = calm
    assert "2 ranks (srun), ZeRO-3" in log and "preflight: n2" in log, log
    told = runs.status(run_dir)
    assert f"step        {STEPS} of {STEPS}, 100.0 %" in told and "state       done" in told, told
    assert f"checkpoint  step {STEPS}" in told and "whole" in told
    assert "on n[1-2], 2 ranks, ended" in told
    assert not list((ROOT / "logs").glob("calm*"))
    logs = list(run_dir.glob("logs/*/rank_1.log"))
    assert len(logs) == 1  # rank 0 is in the job's own


def first(losses, steps):
    return {step: losses[step] for step in range(1, steps + 1)}


def losses_in_tensorboard(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


@pytest.mark.slurm(seconds=280)
def test_time_limit_signal_checkpoints_and_the_same_run_goes_on(runs, slurm, reference):
    job = runs.submit("limit", "--signal=USR1@900", **SLOW)
    runs.until_step("limit", job, 3)
    # Slurm looks every 30 s and sends the signal up to 60 s early: to both tasks, not to the shell.
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=16")
    runs.requeued(job)
    [step] = runs.checkpoints("limit")
    assert 3 <= step < STEPS, "the signal came too late for this test"
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    slurm.wait(job, "COMPLETED", 400)
    assert runs.steps("limit") == reference
    folder = runs.run_dir("limit") / "tb"
    drawn = losses_in_tensorboard(folder)
    assert sorted(drawn) == list(range(1, STEPS + 1))
    assert drawn == pytest.approx(reference, rel=1e-6)  # float32 there
    log = slurm.log(job)
    assert "requeue: preempted, exit 0" in log and f"resuming at step {step}" in log, log
    assert "requeued 1 times, 1 of them by the job itself" in runs.status("limit")


def test_a_time_limit_without_room_is_refused(runs, slurm):
    """And its signal, due from the first moment on, does not kill what has only just started."""
    job = runs.submit("short", "--time=4", "--signal=USR1@900", nodes="1")
    found = slurm.wait(job, "FAILED")
    assert found["ExitCode"] == "78:0" and found["Restarts"] == "0", slurm.log(job)
    assert "submit with a longer --time" in slurm.log(job)


@pytest.mark.slurm(seconds=180)
def test_preempted_by_a_higher_partition_it_resumes(runs, slurm, reference):
    job = runs.submit("low", "--partition=low", overrides=("max_steps=15",), **SLOW)
    runs.until_step("low", job, 3)
    urgent = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--time=5",
                          f"--output={runs.root}/urgent.out", "--wrap", "srun hostname")
    slurm.wait(urgent, "COMPLETED")
    runs.requeued(job)
    [step] = runs.checkpoints("low")
    assert 3 <= step < 15
    slurm.wait(job, "COMPLETED", 400)
    assert runs.steps("low") == first(reference, 15)
    assert f"resuming at step {step}" in slurm.log(job)


@pytest.mark.slurm(seconds=120)
def test_scancel_saves_and_stays_cancelled(runs, slurm, reference):
    job = runs.submit("cancel", overrides=("max_steps=12",), **SLOW)
    runs.until_step("cancel", job, 2)
    began = time.monotonic()
    slurm.run("scancel", str(job))
    slurm.wait(job, "CANCELLED")
    runs.until(job, lambda: not slurm.run("squeue", "-h", "-j", str(job), check=False).strip(), 90)
    assert time.monotonic() - began < 60
    assert runs.checkpoints("cancel")[-1] >= 2
    assert slurm.show(job)["JobState"] == "CANCELLED" and slurm.show(job)["Restarts"] == "0"
    [end] = events(runs.run_dir("cancel"), "job_end")  # or tools.status would wait for it for ever
    assert end["job"] == f"{job}-0" and end["stage"] == "train"
    assert "preempted: signal, goes on when requeued" in runs.status("cancel")
    # Submitted again it goes on, on as many nodes as are free: n2 may still be clearing up.
    step = runs.checkpoints("cancel")[-1]
    again = runs.submit("cancel", nodes="1-2", overrides=("max_steps=12",))
    slurm.wait(again, "COMPLETED", 400)
    assert f"resuming at step {step}" in slurm.log(again)
    assert runs.steps("cancel") == pytest.approx(first(reference, 12), rel=2e-2)


def test_two_nodes_with_two_ranks_each_then_one_node(runs, slurm, reference):
    """Elastic: the checkpoint of four ranks is resumed by two, on half of the nodes."""
    job = runs.submit("wide", tasks=2, overrides=("max_steps=6",))
    slurm.wait(job, "COMPLETED", 400)
    assert "4 ranks (srun), ZeRO-3" in slurm.log(job)
    again = runs.submit("wide", nodes="1", tasks=2, overrides=("max_steps=10",))
    slurm.wait(again, "COMPLETED", 400)
    log = slurm.log(again)
    assert "2 ranks (srun), ZeRO-3" in log and "resuming at step 6" in log, log
    losses = runs.steps("wide")
    # Another world sums in another order; samples, t and noise are the same.
    assert losses == pytest.approx(first(reference, 10), rel=2e-2)
    told = runs.status("wide")
    assert "starts      2" in told and "n[1-2]" in told, told


@pytest.mark.slurm(seconds=150)
def test_a_killed_rank_ends_all_and_the_job_requeues(runs, slurm, reference):
    job = runs.submit("killed", overrides=("save_every=4", "max_steps=10"), **SLOW)
    runs.until(job, lambda: bool(runs.checkpoints("killed")))
    began = time.monotonic()
    runs.kill_rank(job, rank=1)
    run_dir = runs.run_dir("killed")
    runs.until(job, lambda: bool(events(run_dir, "job_end")), 90)
    assert time.monotonic() - began < 75  # --wait=60 and what Slurm needs
    [end] = events(run_dir, "job_end")
    assert end["exit"] == 137, end  # the highest: SIGKILL
    slurm.wait(job, "COMPLETED", 400)
    assert runs.steps("killed") == first(reference, 10)
    assert slurm.show(job)["Restarts"] == "1"


@pytest.mark.slurm(seconds=100)
def test_a_crash_loop_stops(runs, slurm):
    job = runs.submit("loop", TEST_CRASH="all:1")
    found = slurm.wait(job, "FAILED", 500)
    assert found["Restarts"] == "2" and found["ExitCode"] == "1:0"
    assert "no requeue: 2 requeues brought no checkpoint after step 0" in slurm.log(job)


@pytest.mark.parametrize(("code", "why"), [(77, "bad numbers"), (78, "a configuration that")])
def test_hopeless_exit_codes_are_not_requeued(runs, slurm, code, why):
    """Both ranks end so, at moments apart: the code must come through srun as it is."""
    job = runs.submit(f"hopeless{code}", TEST_CRASH=f"all:{code}")
    found = slurm.wait(job, "FAILED")
    assert found["ExitCode"] == f"{code}:0" and found["Restarts"] == "0"
    assert f"no requeue: {why}" in slurm.log(job)


def test_a_config_that_cannot_run_ends_with_78_and_one_line(runs, slurm):
    job = runs.submit("typo", overrides=("max_step=3",))
    found = slurm.wait(job, "FAILED")
    assert found["ExitCode"] == "78:0"
    assert "unknown key 'max_step'; did you mean 'max_steps'?" in slurm.log(job)


@pytest.mark.slurm(seconds=100)
def test_a_lost_node_gives_its_job_to_the_other(runs, slurm, reference):
    job = runs.submit("lost", nodes="1", tasks=2, overrides=("save_every=4", "max_steps=10"),
                      **SLOW)
    runs.until(job, lambda: bool(runs.checkpoints("lost")))
    node = slurm.show(job)["NodeList"]
    slurm.crash_node(node)
    try:
        runs.requeued(job)
        found = slurm.wait(job, "COMPLETED", 400)
    finally:
        slurm.start_node(node)
        slurm.until_idle()
    assert {node, found["NodeList"]} == {"n1", "n2"}
    assert runs.steps("lost") == pytest.approx(first(reference, 10), rel=2e-2)


def test_two_jobs_of_a_user_on_a_node_do_not_collide(runs, slurm):
    """Shared memory, caches, ports, TMPDIR: both train at once on n1 and both finish."""
    jobs = [runs.submit(f"side{side}", "--nodelist=n1", nodes="1", tasks=2,
                        overrides=("max_steps=10",), **SLOW) for side in (1, 2)]
    for name, job in zip(("side1", "side2"), jobs, strict=True):
        runs.until_step(name, job, 1)
    assert {slurm.show(job)["JobState"] for job in jobs} == {"RUNNING"}, "not at the same time"
    for job in jobs:
        slurm.wait(job, "COMPLETED", 400)
    assert runs.steps("side1") == runs.steps("side2")


def test_preflight_names_the_node_that_lost_the_data(runs, slurm):
    """On n2 the shards' file system is not mounted: an empty folder is in its place."""
    shards = runs.root / "elsewhere"
    shutil.copytree(runs.root / "shards", shards)
    inside = ["nsenter", "--mount", f"--target={slurm.daemons['n2'].pid}"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "none", str(shards)], check=True)
    try:
        job = runs.submit("unmounted", overrides=(f"data.root={shards}",))
        found = slurm.wait(job, "FAILED")
    finally:
        subprocess.run([*inside, "umount", str(shards)], check=True)
    log = slurm.log(job)
    assert f"error: preflight: n2: data.root={shards} is not reachable" in log, log
    assert "submit again with --exclude=n2" in log and "error: preflight: n1" not in log
    assert found["ExitCode"] == "1:0" and found["Restarts"] == "0"


def test_pair_submits_twins_with_one_seed(runs, slurm):
    twin = runs.config.read_text()
    (runs.root / "twin_t2av.yaml").write_text(
        twin.replace(f"{runs.root}/run", f"{runs.root}/twin_t2av"))
    (runs.root / "twin_t2v.yaml").write_text(
        f"base: twin_t2av.yaml\ntask: t2v\nrun_dir: {runs.root}/twin_t2v\n")
    said = slurm.run(
        "bash", "launch/pair.sbatch", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1",
        "--cpus-per-task=1", f"--output={runs.root}/%x-%j.out", f"{runs.root}/twin", "max_steps=4",
        TORCH_EXTENSIONS_DIR=extensions(), OMP_NUM_THREADS="1")
    jobs = [int(line.split("job ")[1].split(",")[0]) for line in said.splitlines()]
    assert slurm.show(jobs[2])["JobState"] == "PENDING"  # the report, until both are done
    for job in jobs:
        slurm.wait(job, "COMPLETED", 400)
    assert (runs.root / "twin_t2av" / "report.html").is_file(), slurm.log(jobs[2])
    configs = [json.loads((runs.root / f"twin_{task}/config/run.json").read_text())
               for task in ("t2av", "t2v")]
    differ = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert differ == {"task", "run_dir"} and configs[0]["seed"] == configs[1]["seed"]
    refused = subprocess.run(
        ["bash", "launch/pair.sbatch", f"{runs.root}/twin", "run_dir=x"], cwd=ROOT, text=True,
        env=slurm.environment, capture_output=True, check=False)
    assert refused.returncode == 78 and "run_dir=x is what the twins differ in" in refused.stderr


def test_array_of_encoders_with_one_killed_completes_when_submitted_again(runs, slurm):
    manifest = prepare_kills.write_source(runs.root, 24)
    command = (
        "launch/prepare.sbatch", str(manifest), f"{runs.root}/encoded", "--wan",
        f"{runs.root}/wan", "--tangoflux", f"{runs.root}/tangoflux", *prepare_kills.FLAGS,
        "--clips-per-shard", "2", "--device", "cpu")
    options = ("--gpus-per-node=1", "--cpus-per-task=1", "--mem=100", "--time=10",
               f"--output={runs.root}/encode-%A_%a.out")
    array = slurm.submit("--array=0-2", *options, *command, OMP_NUM_THREADS="1")
    task = f"{array}_1"
    number = slurm.wait(task, "RUNNING")["JobId"]
    runs.until(array, lambda: any(runs.root.glob(".encoded.partial/receipts/*")))
    runs.kill_rank(int(number), rank=0, name=b"data.prepare")
    for index in (0, 2):
        slurm.wait(f"{array}_{index}", "COMPLETED", 300)
    slurm.wait(task, "FAILED")
    assert not (runs.root / "encoded").exists()  # nothing half-made is visible
    again = slurm.submit("--array=0-1", *options, *command, OMP_NUM_THREADS="1")
    for index in (0, 1):
        slurm.wait(f"{again}_{index}", "COMPLETED", 300)
    counts = load_metadata(runs.root / "encoded").counts
    assert sum(counts.values()) == 24 - 3  # every seventh clip is unusable
    assert "encoded" in slurm.run(sys.executable, "-m", "data.prepare", str(manifest),
                                  f"{runs.root}/encoded", "--status")
