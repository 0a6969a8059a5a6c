"""training/guards/run_state.py: how a run stands, as a fold over its events."""

import shutil

import pytest

from common.events import append_event
from tests.common.test_events import EARLIER, TIME
from training.guards.run_state import fold, read_state


def events(*told):
    """("kind", values) as events."""
    return [{"event": kind, "time": TIME, **values} for kind, values in told]


START = ("job_start", {"job": "7-0", "nodes": "n1"})
RUNNING = ("state", {"job": "7-0", "state": "running"})
LATER = ("job_start", {"job": "7-1", "nodes": "n1"})
OTHER = ("job_start", {"job": "8-0", "nodes": "n2"})
BY_HAND = ("state", {"job": None, "state": "running"})


def end(job, code):
    return "job_end", {"job": job, "exit": code}


@pytest.mark.parametrize(("told", "job", "state"), [
    ([START], "7-0", "unknown"),
    ([START, RUNNING], "7-0", "running"),
    ([START, RUNNING, ("state", {"job": "7-0", "state": "done"}), end("7-0", 0)], "7-0", "done"),
    ([START, RUNNING, end("7-0", 137), LATER], "7-1", "unknown"),
    ([BY_HAND], None, "running"),
    ([START, RUNNING, BY_HAND], None, "running"),  # in the same directory, without Slurm
    ([RUNNING], "7-0", "running"),  # its job_start was torn
    ([end("7-0", 1)], "7-0", "unknown"),
    # Another job came while one trained, and was refused; while it tries it is the newest start.
    ([START, RUNNING, OTHER], "8-0", "unknown"),
    ([START, RUNNING, OTHER, end("8-0", 78)], "7-0", "running"),
    ([START, RUNNING, OTHER, end("8-0", 1)], "8-0", "unknown"),
    # A wrong configuration after the end of the other, or of the same job, is this run's.
    ([START, RUNNING, end("7-0", 0), OTHER, end("8-0", 78)], "8-0", "unknown"),
    ([START, RUNNING, LATER, end("7-1", 78)], "7-1", "unknown"),  # its node failed: no end
])
def test_the_current_start(told, job, state):
    start = fold(events(*told)).current
    assert (start.job, start.state) == (job, state)


def test_nothing_is_known_of_no_run():
    assert fold([]).current is None and fold([]).start_of("7-0") is None


def test_two_starts_by_hand_are_two():
    failed = ("state", {"job": None, "state": "failed"})
    assert [start.state for start in fold(events(BY_HAND, failed, BY_HAND)).starts] == [
        "failed", "running"]
    assert len(fold(events(START, RUNNING, RUNNING)).starts) == 2  # twice in one allocation


def test_what_a_later_start_does_again_counts_once():
    def skip(step):
        return "skip", {"step": step, "kind": "spike", "applied": False}

    def bad(step):
        return "substitution", {"step": step, "shard": "x"}

    begin, again = (("start", {"first_step": step}) for step in (0, 2))
    # At step 2, whose validation is not repeated, a sample of it was substituted, too.
    told = [begin, bad(1), skip(1), skip(2), bad(2), bad(3), skip(3)]
    assert [event["step"] for event in fold(events(*told)).skips] == [1, 2, 3]
    run = fold(events(*told, again, bad(3), skip(3)))
    assert [event["step"] for event in run.skips] == [1, 2, 3]
    assert [event["step"] for event in run.substitutions] == [1, 2, 3]
    assert len(run.cards) == 2 and len(run.events) == 10
    anew = fold(events(begin, bad(1), skip(1), begin))
    assert not anew.skips and not anew.substitutions


def test_a_decision_belongs_to_its_start():
    told = {"requeue": True, "why": "", "step": 0, "exit": 1, "state": "running"}
    run = fold(events(START, RUNNING, end("7-0", 1), ("requeue", {"job": "7-0", **told}), LATER))
    assert run.starts[0].decided["requeue"] and run.current.decided is None


def test_a_run_of_bfb3d05_goes_on(tmp_path):
    run_dir = shutil.copytree(EARLIER, tmp_path / "run")
    run = read_state(run_dir)
    assert [(start.job, start.state, start.ended["exit"], start.decided["requeue"])
            for start in run.starts] == [("7-0", "unknown", 0, True), ("7-1", "running", 137, True)]
    assert [card["first_step"] for card in run.cards] == [0, 2]
    assert [event["step"] for event in run.skips + run.substitutions] == [4, 4]
    append_event(run_dir, "job_start", job="7-2", nodes="n3")
    assert read_state(run_dir).current.state == "unknown"
    append_event(run_dir, "start", first_step=3)
    assert not read_state(run_dir).skips
