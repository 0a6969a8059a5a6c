"""The words at the start and the end of a run, rank logs, and event files cut back to a step."""

import json
import os
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from common.ranks import World
from training.metrics.console import budget, rank_log, summary
from training.metrics.tensorboard import Events, _plain, drop_from
from training.metrics.writer import Clock


def write_records(run_dir, *records: dict) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(lines)


def test_budget_of_a_fresh_start_knows_the_disk_and_no_time(tmp_path):
    line = budget(tmp_path, 0, 100, 2, 1_000_000_000, True, {})
    assert line.startswith("budget: 100 steps to go; a checkpoint takes 16.00 GB, ")
    assert budget(tmp_path, 0, 100, 2, 10**15, False, {}).endswith("3 are wanted: make room")
    end = str(int(time.time()) + 3 * 3600)
    assert "100 steps to go; this job has 3.0 h left; a checkpoint" in budget(
        tmp_path, 0, 100, 2, 10, False, {"SLURM_JOB_END_TIME": end})


def test_budget_counts_what_lies_between_the_steps(tmp_path):
    write_records(tmp_path, *({
        "step": s, "time/step_seconds": 2.0, "time/validation_seconds": 30.0 if s % 50 == 0 else 0,
        "time/checkpoint_seconds": 20.0 if s % 50 == 0 else 0} for s in range(0, 101, 10)))
    line = budget(tmp_path, 100, 1100, 2, 10, False, {})
    assert "1000 steps to go at 2.00 s and 1.00 s for saves, validation and samples, 50 min" in line


def test_budget_without_the_disks_answer_ends_no_run(tmp_path, monkeypatch):
    tag = tmp_path / "checkpoints" / "step00000060"
    tag.mkdir(parents=True)
    (tag / "weights").symlink_to(tag / "gone")
    line = budget(tmp_path, 60, 100, 2, 10, False, {})
    assert line.startswith("budget: 40 steps to go; what fits the disk is not known: ")


def test_budget_leaves_a_slow_first_record_out(tmp_path):
    write_records(tmp_path, *({"step": s, "time/step_seconds": seconds}
                              for s, seconds in ((10, 9.0), (20, 1.0))))
    assert "80 steps to go at 1.00 s, 80 s" in budget(tmp_path, 20, 100, 2, 10, False, {})


def test_a_record_that_cannot_be_read_ends_no_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    assert budget(tmp_path, 1, 2, 2, 10, False, {}).startswith("budget: 1 steps to go; a check")
    assert "done after 0:00:01" in summary(tmp_path, "done", 1, "t2v: 5 parameters", {})
    assert capsys.readouterr().err.count("metrics.jsonl cannot be read") == 2


def test_time_left_counts_what_lies_between_the_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    for away in (500.0, 0.0, 10.0):  # the first is a start's own
        now[0] += 10 * 1.0 + away
        assert clock.tick(10, {"validation": away, "data": 3.0}) == pytest.approx(1.0)
    assert clock.eta(60) == "0:01:30"  # 1 s a step, and 10 s in 20 steps


def test_budget_of_a_resumed_run_names_hours_and_requeues(tmp_path):
    write_records(tmp_path, *({"step": s, "time/step_seconds": 36.0} for s in range(60)))
    end = str(int(time.time()) + 3 * 3600)
    line = budget(tmp_path, 60, 1060, 2, 1000, False, {"SLURM_JOB_END_TIME": end})
    assert "1000 steps to go at 36.00 s, 10.0 h of the 3.0 h that this job has left" in line
    assert "about 3 requeues" in line
    tag = tmp_path / "checkpoints" / "step00000060"
    tag.mkdir(parents=True)
    (tag / "weights").write_bytes(b"x" * 20_000_000)
    assert "a checkpoint takes 0.02 GB" in budget(tmp_path, 60, 61, 2, 1, False, {})
    assert budget(tmp_path, 60, 50, 2, 1, False, {}).startswith("budget: 0 steps to go")


def test_summary_names_first_last_and_best(tmp_path):
    write_records(tmp_path, *({"step": s, "validation/loss_video": v}
                              for s, v in ((0, 3.0), (5, 1.5), (10, 2.0))),
                  {"step": 10, "train/loss": 5.0, "train/loss_video": 2.0, "train/loss_audio": 3.0,
                   "train/samples_seen": 80.0})
    text = summary(tmp_path, "done: step 10", 61, "t2av: 7 parameters, 2 of them new",
                   {"data": 9.0, "validation": 0.0, "checkpoint": 2.04, "sampling": 30.0})
    assert "\n  after the last record: checkpoint 2.0 s, sampling 30.0 s\n" in text
    assert "done: step 10 after 0:01:01" in text and "t2av: 7 parameters" in text
    assert "training loss at step 10: 5.0000  video 2.0000  audio 3.0000  after 80 samples" in text
    assert "first 3.0000  last 2.0000  best 1.5000 at step 5" in text
    assert f"python -m tools.report {tmp_path}" in text


def test_a_rank_log_holds_what_was_said_and_what_ended_the_rank(tmp_path, capsys):
    for word in ("one", "two"):
        with pytest.raises(RuntimeError), rank_log(tmp_path, World(3, 4, 1, 2, "test")):
            print(word)
            print("aside", file=sys.stderr)
            raise RuntimeError(f"the end of {word}")
    text = (tmp_path / "logs" / "rank00003.log").read_text()
    assert text.count("rank 3 of 4") == 2 and text.count("aside") == 2
    assert text.index("one") < text.index("the end of one") < text.index("\ntwo\n")
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_console_that_takes_nothing_ends_no_run(tmp_path, monkeypatch):
    full = open("/dev/full", "w", buffering=1)
    monkeypatch.setattr("sys.stdout", full)
    with rank_log(tmp_path, World(0, 1, 0, 1, "test")):
        print("a word that the job's log has no room for", flush=True)
    assert "no room for" in (tmp_path / "logs" / "rank00000.log").read_text()


def test_a_rank_log_that_takes_nothing_ends_no_run(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank00000.log").symlink_to("/dev/full")
    with rank_log(tmp_path, World(0, 1, 0, 1, "test")):
        print("done")
    with pytest.raises(KeyError), rank_log(tmp_path, World(0, 1, 0, 1, "test")):
        raise KeyError("what ended it")
    assert capsys.readouterr().out == "done\n"


def test_a_progress_bar_is_not_logged(tmp_path, capsys):
    with rank_log(tmp_path, World(0, 1, 0, 1, "test")):
        bar = tqdm(total=3, file=sys.stdout, mininterval=0)
        bar.update()
        bar.write("a line", file=sys.stdout)
        bar.close()
    text = (tmp_path / "logs" / "rank00000.log").read_text()
    assert "a line\n" in text and "1/3" not in text
    assert "1/3" in capsys.readouterr().out


def test_event_files_are_cut_back_also_behind_a_torn_record(tmp_path):
    for first in (0, 3):
        events = Events(tmp_path, first)
        for step in range(first, 5):
            events.scalars(step, {"a": float(step + 10 * first)})
        events.close()
    path = max(tmp_path.glob("events*"), key=lambda file: file.stat().st_mtime_ns)
    path.write_bytes(path.read_bytes()[:-7])  # a kill in the middle of a write
    drop_from(tmp_path, 4)
    reader = EventAccumulator(str(tmp_path), purge_orphaned_data=False)
    reader.Reload()
    assert [(e.step, e.value) for e in reader.Scalars("a")] == [(0, 0), (1, 1), (2, 2), (3, 33)]


def read_steps(reader: EventAccumulator) -> list[int]:
    reader.Reload()
    return [event.step for event in reader.Scalars("a")]


def test_a_kill_while_event_files_are_cut_back_leaves_no_step_twice(tmp_path, monkeypatch):
    events = Events(tmp_path, 0)
    for step in range(5):
        events.scalars(step, {"a": 0.0})
    events.close()

    def kill(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", kill)
        drop_from(tmp_path, 3)
    assert read_steps(EventAccumulator(str(tmp_path))) == list(range(5))
    (tmp_path / "kept.events.out.tfevents.1.host.2.0.tmp").touch()  # its name until then
    drop_from(tmp_path, 3)
    assert read_steps(EventAccumulator(str(tmp_path))) == list(range(3))
    assert [path.name[:6] for path in tmp_path.iterdir()] == ["events"]


def test_a_tensorboard_that_is_open_while_a_run_resumes_shows_no_step_twice(tmp_path):
    reader, steps = EventAccumulator(str(tmp_path)), []
    for first, end in ((0, 5), (3, 6)):
        events = Events(tmp_path, first)
        for step in range(first, end):
            events.scalars(step, {"a": 0.0})
        events.close()
        steps = read_steps(reader)
        time.sleep(1.1)  # files are read in the order of their names, which begin with the second
    assert steps == list(range(6))
    events = Events(tmp_path, None)  # validate_only takes nothing away
    events.scalars(6, {"a": 0.0})
    events.close()
    assert read_steps(reader) == read_steps(EventAccumulator(str(tmp_path))) == list(range(7))


def test_settings_of_the_hparams_tab_are_flat_and_plain():
    assert _plain({"a": {"b": 1, "c": None}, "d": [1, 2], "e": True}) == {
        "a.b": 1, "a.c": "None", "d": "[1, 2]", "e": True}
