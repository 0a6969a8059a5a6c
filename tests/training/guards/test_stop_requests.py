"""training/guards/stop_requests.py and a stop in order: all ranks, at one step, with nothing
lost.
"""

import os
import signal
import time

import pytest

from cluster.requeue import decide
from common.ranks import World
from tests.support.faults import Ranks, lines, start_runs, status, write_world
from training.guards.stop_requests import (
    SAFETY_SECONDS,
    STOP_FILE,
    UNMEASURED_SAVE_SECONDS,
    Requests,
    stop_reason,
)
from training.guards.supervisor import Supervisor
from training.guards.watchdog import WatchdogConfig


@pytest.fixture
def requests(tmp_path):
    made = Requests(tmp_path, {})
    yield made
    made.close()


def test_a_signal_is_a_vote_and_a_second_one_is_harmless(requests):
    assert requests.votes() == [0, 0, 0, 0]
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert requests.votes() == [1, 0, 0, 0]
    assert stop_reason([1, 0, 0, 0]) == "signal"


@pytest.mark.parametrize("why", [None, STOP_FILE, "signal"])
def test_a_stop_file_does_not_outlive_the_run_that_it_was_for(tmp_path, why):
    """One that came after the last step's vote would stop the next start, which has more steps."""
    with Supervisor({"run_dir": tmp_path}, WatchdogConfig(), World(0, 1, 0, 1, "alone")) as guards:
        (tmp_path / "STOP").touch()
        guards.stop = why
        said = guards.finish(5, 5)
    assert not (tmp_path / "STOP").exists()
    assert said.split()[0] == status(tmp_path)["state"].replace("done", "done:")


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    Requests(tmp_path, {}).close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_files_are_votes_of_rank_0_and_served_once(requests, tmp_path):
    (tmp_path / "SAVE").touch()
    (tmp_path / "STOP").touch()
    assert requests.votes() == [0, 0, 1, 1]
    requests.clear("SAVE")
    requests.clear("SAVE")  # gone already: no matter
    requests.looked = -100.0
    assert requests.votes() == [0, 0, 1, 0]
    other_rank = Requests(None, {})
    assert other_rank.votes() == [0, 0, 0, 0]
    other_rank.close()
    assert stop_reason([0, 0, 1, 0]) == STOP_FILE and stop_reason([0, 0, 0, 1]) is None


@pytest.mark.parametrize(
    ("left", "up"), [(10_000, False), (SAFETY_SECONDS + 115, False), (SAFETY_SECONDS + 105, True)]
)
def test_the_clock_keeps_room_for_what_was_measured(tmp_path, left, up):
    requests = Requests(tmp_path, {"SLURM_JOB_END_TIME": str(int(time.time() + left))})
    requests.took("checkpoint", 30.0)  # the first measurement replaces the guess
    requests.took("step", 20.0)
    requests.took("step", 2.0)  # the longest counts
    requests.took("validation", 10.0)
    requests.close()  # to keep: two saves, two steps, a validation: 110 s
    assert requests.longest == {"checkpoint": 30.0, "step": 20.0, "validation": 10.0}
    assert requests.time_is_up() == up


def test_without_an_end_time_there_is_time(tmp_path):
    for environ in ({}, {"SLURM_JOB_END_TIME": "N/A"}):
        requests = Requests(tmp_path, environ)
        requests.close()
        assert not requests.time_is_up()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every way to stop or to save, on two ranks, each resumed, beside an undisturbed run."""
    root = write_world(tmp_path_factory.mktemp("signals"))
    for name in ("stop", "save"):
        (root / "runs" / name).mkdir(parents=True)
        (root / "runs" / name / name.upper()).touch()
    always = {"overrides": ["save_every=100", "validate_every=4"]}
    start_runs(root, 2, {
        "whole": always,
        "usr1": always | {"fault": {"kind": "SIGUSR1", "rank": 1, "steps": [4]}},
        "term": always | {"fault": {"kind": "SIGTERM", "rank": 0, "steps": [5]}},
        "stop": always,
        "save": always,
    })
    stopped = {name: status(root / "runs" / name) for name in ("usr1", "term", "stop", "save")}
    start_runs(root, 2, {name: always for name in ("usr1", "term", "stop")})
    return root / "runs", stopped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "state", "reason", "step"),
    [("usr1", "preempted", "signal", 4), ("term", "preempted", "signal", 5),
     ("stop", "stopped", STOP_FILE, 1)],
)
def test_stops_after_the_step_saves_and_goes_on_bit_for_bit(runs, name, state, reason, step):
    folder, stopped = runs
    assert (stopped[name]["state"], stopped[name]["reason"]) == (state, reason)
    assert stopped[name]["step"] == step
    assert stopped[name]["checkpoint"].endswith(f"step{step:08d}")
    assert status(folder / name)["state"] == "done"
    for rank in (0, 1):
        expected = lines(folder / "whole" / f"weights_rank{rank}.jsonl")
        assert lines(folder / name / f"weights_rank{rank}.jsonl") == expected
    # Validation losses that the stop left out are there, and none twice.
    held = [line["step"] for line in lines(folder / name / "metrics.jsonl")
            if "validation/loss_video" in line]
    assert held == [0, 4, 8]
    assert not (folder / "stop" / "STOP").exists()


@pytest.mark.slow
def test_save_by_hand_saves_once_and_goes_on(runs):
    folder, stopped = runs
    tags = sorted(path.name for path in (folder / "save" / "checkpoints").glob("step*"))
    assert tags == ["step00000001", "step00000008"]
    assert stopped["save"]["state"] == "done" and not (folder / "save" / "SAVE").exists()


@pytest.mark.faults
def test_a_signal_to_every_process_leaves_the_loaders_workers_alive(tmp_path):
    """As Slurm does it: USR1 and TERM to each rank, its forkserver and its workers, at once."""
    root = write_world(tmp_path)
    ranks = Ranks(2, [f"{root}/run.yaml", "data.num_workers=2", "max_steps=2000",
                      f"run_dir={root}/run"], {"kind": "group", "rank": "all", "steps": [3]})
    codes, outputs = ranks.finish()
    assert codes == [0, 0], outputs
    assert status(root / "run")["state"] == "preempted" and status(root / "run")["step"] == 3
    assert "preempted (signal): step 3" in outputs[0]
    assert "worker" not in outputs[0] + outputs[1]  # no complaint about a killed one


@pytest.mark.faults(seconds=40)
def test_the_end_of_the_job_stops_in_time(tmp_path):
    """First a limit that leaves room for a start and for some steps; then one that does not."""
    root = write_world(tmp_path)
    arguments = [f"{root}/run.yaml", "max_steps=100000", f"run_dir={root}/run", "log_every=1000",
                 "save_every=1000000"]
    end = str(int(time.time() + SAFETY_SECONDS + 2 * UNMEASURED_SAVE_SECONDS) + 40)
    codes, outputs = Ranks(1, arguments, SLURM_JOB_END_TIME=end).finish(400)
    assert codes == [0], outputs
    assert status(root / "run")["reason"] == "time limit" and status(root / "run")["step"] > 1
    assert time.time() < float(end) - SAFETY_SECONDS / 2
    # A job of its own: a slow step of the first one would have left room for this one.
    end = str(int(time.time() + SAFETY_SECONDS + 2 * UNMEASURED_SAVE_SECONDS))
    codes, outputs = Ranks(1, arguments, SLURM_JOB_END_TIME=end).finish(400)
    assert codes == [78] and "submit with a longer --time" in outputs[0], outputs
    assert decide(root / "run", 78) == (False, "a configuration that cannot run")
