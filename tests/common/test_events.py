"""common/events.py: one line per event, whole or not at all, and nothing in it ends a run."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from common.events import (
    KINDS,
    append_event,
    events_path,
    job_name,
    read_events,
    timestamp,
)

EARLIER = Path(__file__).parents[1] / "fixtures" / "bfb3d05" / "history"
TIME = "2026-01-01T00:00:00.000+00:00"


def test_what_is_appended_is_read(tmp_path):
    said = 'a "quoted" \\ name'
    told = append_event(tmp_path, "state", state="running", reason=said, path=Path("x"))
    assert timestamp(told) == pytest.approx(events_path(tmp_path).stat().st_mtime, abs=5)
    assert read_events(tmp_path) == [told | {"path": "x"}]
    assert events_path(tmp_path).read_text().count("\n") == 1


def test_every_kind_has_a_key():
    assert all(kind.keys for kind in KINDS.values())


@pytest.mark.parametrize("line", [
    {"event": "state", "time": TIME}, {"event": "state", "time": "now", "state": "done"},
    {"event": "state", "state": "done"}, {"event": "nothing", "time": TIME, "state": "done"},
    {"event": ["state"], "time": TIME, "state": "done"}, {"event": "state", "time": 5, "state": ""},
    {"event": "skip", "time": TIME, "step": "3", "kind": "spike", "applied": True},
    {"event": "job_end", "time": TIME, "job": None, "exit": 1},
])
def test_what_is_no_event_is_left_out_with_a_warning(tmp_path, line, capsys):
    append_event(tmp_path, "state", state="running")
    with open(events_path(tmp_path), "a") as file:
        file.write(json.dumps(line) + "\n")
    append_event(tmp_path, "state", state="done")
    assert [event["state"] for event in read_events(tmp_path)] == ["running", "done"]
    assert capsys.readouterr().err.count("warning: not an event, left out: {") == 1


@pytest.mark.parametrize("damaged", [
    b'{"event": "state", "st', b"\xff\xfe", b"[1]", b"null", b"\0" * 4096, b"[" * 100_000])
def test_a_torn_line_costs_no_other(tmp_path, damaged, capsys):
    append_event(tmp_path, "state", state="running")
    with open(events_path(tmp_path), "ab") as file:
        file.write(damaged)  # the last: a kill tore it
    assert [event["state"] for event in read_events(tmp_path)] == ["running"]
    append_event(tmp_path, "state", state="done")
    with open(events_path(tmp_path), "rb+") as file:
        whole = file.read().split(b"\n")
        file.seek(0)
        file.write(b"\n".join([whole[0], damaged, *whole[1:]]))  # not the last: a disk did
    assert not capsys.readouterr().err
    assert [event["state"] for event in read_events(tmp_path)] == ["running", "done"]
    assert "events.jsonl:2: not a JSON object" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_of_a_line_and_says_so(tmp_path, capsys):
    append_event(tmp_path, "state", state="running")
    before = events_path(tmp_path).read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_append_with_little_room,
                                                          args=(tmp_path, len(before) + 40))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert events_path(tmp_path).read_bytes() == before


def _append_with_little_room(run_dir, size):
    import contextlib
    import io
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        append_event(run_dir, "state", state="failed", reason="x" * 100)
    assert "cannot be written ([Errno 27] File too large)" in said.getvalue()


def _append_many(run_dir, writer):
    for place in range(100):
        append_event(run_dir, "state", state="running", job=f"{writer}-{place}", more="x" * 5000)


def test_writers_at_the_same_time_lose_no_line(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    jobs = [event["job"] for event in read_events(tmp_path)]
    assert sorted(jobs) == sorted(f"{n}-{place}" for n in range(4) for place in range(100))
    assert not capsys.readouterr().err


def test_the_name_of_a_job():
    assert job_name({}) is None
    assert job_name({"SLURM_JOB_ID": "7"}) == job_name(
        {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": ""}) == "7-0"
    assert job_name({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == "7-2"


def test_the_files_of_bfb3d05_are_events(tmp_path, capsys):
    run_dir = shutil.copytree(EARLIER, tmp_path / "run")
    kinds = [event["event"] for event in read_events(run_dir)
             if event["event"] not in ("skip", "substitution")]  # these had no time
    # Of the states the last was kept.
    assert kinds == ["job_start", "start", "job_end", "requeue",
                     "job_start", "start", "state", "job_end", "requeue"]
    append_event(run_dir, "state", state="running", job="8-0")
    assert read_events(run_dir)[-1]["job"] == "8-0"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["jobs.jsonl", "requeues.jsonl", "skips.jsonl",
                                  "substitutions.jsonl", "config/starts.jsonl", "status.json"])
@pytest.mark.parametrize("damage", [b"{", b'{"time": 1e300, "event": []}\n', b"\xff\n", b"3\n"])
def test_a_damaged_file_of_bfb3d05_costs_its_own_events(tmp_path, name, damage):
    run_dir = shutil.copytree(EARLIER, tmp_path / "run")
    count = len(read_events(run_dir))
    with open(run_dir / name, "ab") as file:
        file.write(damage)
    assert len(read_events(run_dir)) == count - (name == "status.json")
    (run_dir / name).unlink()
    (run_dir / name).mkdir()
    assert 0 < len(read_events(run_dir)) < count
