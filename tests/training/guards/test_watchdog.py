"""watchdog.py: a run that does not move ends within its budget, with everyone's stacks."""

import json
import pickle
import sys
import time

import pytest

from tests.support.faults import Ranks, write_world
from tests.support.launch import run
from training.guards.watchdog import WatchdogConfig

SCRIPT = """
import os, sys, time
from pathlib import Path
from training.distributed import World
from training.guards.failure_report import Failure
from training.guards.watchdog import Watchdog, WatchdogConfig
world = World(0, 1, 0, 1, "alone")
def stuck_in_a_read():
    time.sleep(60)
failure = Failure(Path(sys.argv[1]), {"seed": 3}, world)
if sys.argv[3] == "full disk":
    failure.folder.parent.write_text("no folder can be made here")
elif sys.argv[3] == "hung disk":  # reading or writing a pipe that nobody has open never returns
    failure.folder.mkdir(parents=True)
    for name in ("alarm", "rank00000.stacks.txt"):
        os.mkfifo(failure.folder / name)
with Watchdog(WatchdogConfig(data=3, compute=60), failure) as watchdog:
    for turn in range(4):  # longer than the budget together: every turn has its own
        watchdog.enter("data")
        time.sleep(0.9)
    watchdog.enter(sys.argv[2])
    if sys.argv[3] == "peer ends":
        failure.wait_for_others = lambda: time.sleep(3)
        while not failure.alarm.exists():
            time.sleep(0.01)
        raise ConnectionError("connection closed by peer")
    if sys.argv[3] != "leave":
        stuck_in_a_read()
print("left in order")
"""


def start(tmp_path, phase, then):
    return run([sys.executable, "-c", SCRIPT, str(tmp_path), phase, then], check=False)


@pytest.mark.slow
def test_a_phase_over_its_budget_ends_with_76_and_stacks(tmp_path):
    done = start(tmp_path, "data", "hang")
    assert done.returncode == 76
    (folder,) = (tmp_path / "failures").iterdir()
    assert "stuck_in_a_read" in (folder / "rank00000.stacks.txt").read_text()
    told = json.loads((folder / "rank00000.json").read_text())
    assert told["reason"] == "phase 'data' took more than watchdog.data=3 seconds"
    assert json.loads((folder / "config.json").read_text()) == {"seed": 3}
    assert str(folder) in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["full disk", "hung disk"])
def test_it_ends_with_76_also_where_the_disk_is_what_hangs(tmp_path, disk):
    began = time.monotonic()
    done = start(tmp_path, "data", disk)
    assert done.returncode == 76 and time.monotonic() - began < 40
    if disk == "full disk":
        assert "watchdog.data=3 seconds; nothing could be written of it" in done.stderr


@pytest.mark.slow
def test_a_peer_that_ends_first_does_not_change_the_code(tmp_path):
    """The collective this rank hangs in breaks when the other rank's watchdog ends it."""
    done = start(tmp_path, "data", "peer ends")
    assert done.returncode == 76 and "connection closed by peer" in done.stderr, done.stderr


@pytest.mark.faults
def test_within_its_budgets_it_does_nothing(tmp_path):
    done = start(tmp_path, "compute", "leave")
    assert done.returncode == 0 and "left in order" in done.stdout
    assert not (tmp_path / "failures").exists()


@pytest.mark.parametrize("value", [0, -1])
def test_a_budget_that_cannot_be_is_named(value):
    with pytest.raises(ValueError, match="data\n  Input should be greater than 0"):
        WatchdogConfig(data=value)


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "stacks"), [("hang", 2), ("stop", 1)])
def test_one_stuck_rank_ends_all_with_every_stack_there_is(tmp_path, kind, stacks):
    """hang: Python sleeps for ever; stop: SIGSTOP, so that not even its watchdog runs."""
    root = write_world(tmp_path)
    ranks = Ranks(2, [f"{root}/run.yaml", f"run_dir={root}/run", "watchdog.compute=8"],
                  {"kind": kind, "rank": 1, "steps": [3]}, TORCH_FR_BUFFER_SIZE="100")
    ranks.programs[0].wait(300)
    codes, outputs = ranks.finish(0 if kind == "stop" else 300)  # a stopped one never ends
    assert codes[0] == 76, outputs[0]
    assert codes[1] == (76 if kind == "hang" else -9)  # a stopped one is the launcher's to kill
    (folder,) = (root / "run" / "failures").iterdir()
    found = {path.name for path in folder.glob("*.stacks.txt")}
    assert len(found) == stacks
    if kind == "hang":
        assert "act" in (folder / "rank00001.stacks.txt").read_text()
    # Which collective rank 0 waits in, where the code calls it, and that rank 1 never came to it.
    last = [pickle.loads((folder / f"flight_{rank}").read_bytes())["entries"][-1]
            for rank in range(stacks)]
    assert not last[0]["retired"]
    assert any(frame["filename"].endswith("train.py") for frame in last[0]["frames"])
    assert all(one["collective_seq_id"] < last[0]["collective_seq_id"] for one in last[1:])
    told = json.loads((folder / "rank00000.json").read_text())
    assert told["last"]["step"] == 3 and len(told["last"]["sample_ids"]) == 4
    # The rank's last words; what may follow are those of Python's resource tracker.
    said = [line for line in outputs[0].splitlines() if line.startswith("error: rank 0: ")]
    assert said[-1].endswith(str(folder))
