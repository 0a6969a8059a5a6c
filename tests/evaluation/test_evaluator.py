"""A run that is watched: what it writes is complete, true, never twice, and changes nothing.

Real processes train the tiny model; what they wrote is read back through TensorBoard's own reader.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from common.events import append_event
from common.ranks import World
from data.schema import DataError
from evaluation.evaluator import Evaluator
from evaluation.gallery import write_gallery
from evaluation.validation import read_rows
from tests.support.inputs.prepared import write_shards
from tests.support.launch import ROOT, environment, run, run_ranks
from tests.support.models.tiny import write_tangoflux, write_wan
from tools import report
from training.checkpoint.save_load import read_weights
from training.guards.optional import AttemptError
from training.guards.run_state import read_state
from training.metrics.tags import SCALARS, described
from training.metrics.writer import MetricWriter, read_records

STEPS, KILLED_AT, SAVED_AT = 6, 4, 3
WATCHED = ["log_every=2", "health_every=3", "sample_every=6", "validate_every=3", "save_every=2"]
BLIND = ["log_every=100", "health_every=100", "validate_every=null", "save_every=100"]
TIMES = ("time/", "throughput/", "memory/")  # differ from run to run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("watching")
    write_wan(root / "wan")
    write_tangoflux(root / "tangoflux")
    write_shards(root / "shards", train=20, validation=3, silent=3)
    for stage in (2, 3):
        (root / f"zero{stage}.json").write_text(json.dumps({
            "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}))
    (root / "run.yaml").write_text(f"""
run_dir: {root}/killed
wan: {root}/wan
tangoflux: {root}/tangoflux
model: {{num_joint_blocks: 2}}
data: {{root: {root}/shards, num_workers: 0}}
optimizer: {{lr: 1.0e-3}}
warmup_steps: 3
global_batch_size: 4
max_steps: {STEPS}
ema_decay: 0.9
samples: {{count: 2, num_steps: 2}}
peak_tflops: 0.1
self_check: false
keep_checkpoints: 9
deepspeed: {root}/zero2.json
""")
    return root


def start(world: Path, processes: int, runs: dict[str, list[str]]) -> None:
    spec = [{"config": f"{world}/run.yaml",
             "overrides": [f"run_dir={world}/{name.split(':')[0]}", *overrides]}
            for name, overrides in runs.items()]
    path = world / f"spec{processes}.json"
    path.write_text(json.dumps(spec))
    done = run_ranks(processes, "tests/support/workers/train_worker.py", str(path))
    (world / f"said{processes}.txt").write_text(done.stdout)


@pytest.fixture(scope="module")
def runs(world) -> Path:
    zero3 = [f"deepspeed={world}/zero3.json"]
    start(world, 2, {"two": [*WATCHED, *zero3], "two_blind": [*BLIND, *zero3]})
    halted = [*BLIND, "sample_every=1", "samples.count=1", "max_steps=2"]
    (world / "halted").mkdir()
    (world / "halted" / "STOP").touch()  # stops after step 1
    start(world, 1, {
        "one": WATCHED, "one_blind": BLIND,
        "t2v": [*WATCHED, "task=t2v", "sample_every=3", "max_steps=3"],
        "one:again": [*WATCHED, "validate_only=true"],
        "halted": halted, "halted:again": halted})
    return world


@pytest.fixture(scope="module")
def killed(runs) -> Path:
    """SIGKILL once step KILLED_AT is on record, then the same command again.

    It resumes in the middle of a log period, whose sums come from the checkpoint.
    """
    world = runs
    command = [sys.executable, "train.py", f"{world}/run.yaml", *WATCHED, "save_every=3",
               "sample_every=null"]
    path = world / "killed" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not (path.exists() and f'"step": {KILLED_AT}, "train' in path.read_text()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert f"resuming at step {SAVED_AT}" in run(command).stdout
    return world / "killed"


def read_events(run_dir: Path) -> tuple[EventAccumulator, dict[str, dict[int, float]]]:
    """The accumulator, and tag -> step -> value; a step that is there twice is an error."""
    events = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        assert len(dict(points)) == len(points), f"{tag} holds a step twice: {points}"
        found[tag] = dict(points)
    return events, found


@pytest.mark.slow
def test_every_documented_tag_is_there_and_nothing_else(runs):
    _, found = read_events(runs / "one")
    assert {described(tag) for tag in found} == set(SCALARS)
    named = defaultdict(set)
    for tag in found:
        name = described(tag)
        if "{" in name:
            head, tail = re.split(r"{\w+}.*", name, maxsplit=1)
            named[name].add(tag.removeprefix(head).removesuffix(tail))
    parts = {"video_tower", "audio_tower", "joint_new"}
    layers, times = {"layer00", "layer01"}, {f"{(i + 0.5) / 8:.2f}" for i in range(8)}
    assert named["train/grad_norm_{part}"] == named["health/update_ratio_{part}"] == parts
    assert named["health/activation_{part}"] == parts - {"joint_new"} | {
        "joint_video", "joint_audio"}
    assert named["health/attention_audio_to_video/{layer}"] == layers
    assert named["health/loss_video_t/{t}"] <= times
    assert named["validation/loss_{modality}"] == {"video", "audio", "video_ema", "audio_ema"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two", "t2v"])
def test_tensorboard_holds_the_record(runs, name):
    check_record(runs, name)


def check_record(runs: Path, name: str) -> None:
    _, found = read_events(runs / name)
    recorded: dict[str, dict[int, float]] = {}
    for record in read_records(runs / name):
        for tag in record.keys() - {"step"}:
            assert record["step"] not in recorded.setdefault(tag, {}), (tag, record["step"])
            recorded[tag][record["step"]] = record[tag]
    assert found.keys() == recorded.keys()
    for tag, values in recorded.items():
        assert found[tag] == pytest.approx(values, rel=1e-6), tag  # stored in float32
    assert (name == "t2v") != any("audio" in tag and values and "tokens" not in tag
                                  for tag, values in recorded.items())


@pytest.mark.faults(seconds=75)
def test_a_killed_and_resumed_run_has_the_undisturbed_runs_curves(runs, killed):
    check_record(runs, "killed")
    one, resumed = ({(record["step"], tag): value for record in read_records(runs / name)
                    for tag, value in record.items()} for name in ("one", "killed"))
    for key, value in one.items():
        if not key[1].startswith(TIMES):
            assert resumed[key] == value, key
    steps = [record["step"] for record in read_records(runs / "killed") if "train/loss" in record]
    assert steps == list(range(2, STEPS + 1, 2))
    for step in (0, 3, STEPS):
        for weights in ("raw", "ema"):
            assert read_rows(runs / "one", step, weights) == read_rows(killed, step, weights)


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", ["one", "two"])
def test_watching_does_not_change_training_by_one_bit(runs, name, averaged):
    """Under ZeRO-2 and, on two ranks, ZeRO-3; the weights and their average."""
    _, watched = read_weights(runs / name, STEPS, averaged)
    _, blind = read_weights(runs / f"{name}_blind", STEPS, averaged)
    assert watched.keys() == blind.keys()
    assert all(torch.equal(watched[name], blind[name]) for name in watched)


@pytest.mark.slow
def test_a_stop_at_a_sampling_step_leaves_its_samples_to_the_next_start(runs):
    said = (runs / "said1.txt").read_text()
    assert "stopped (file STOP): step 1" in said and "resuming at step 1" in said
    samples = runs / "halted" / "samples"
    assert {path.parent.name for path in samples.glob("step*/prompts.json")} == {
        f"step0000000{step}" for step in range(3)}


@pytest.mark.slow
def test_validation_losses_are_bit_equal_on_any_ranks(runs):
    assert read_rows(runs / "one", 0) == read_rows(runs / "two", 0)
    assert len(read_rows(runs / "one", 0)) == 3
    silent = [row for row in read_rows(runs / "one", 0).values() if row["audio"] is None]
    assert len(silent) == 1


@pytest.mark.slow
def test_validation_scalars_follow_from_the_file(runs):
    for step in (0, STEPS):
        record = next(record for record in read_records(runs / "one")
                      if record["step"] == step and "validation/loss_video" in record)
        rows = read_rows(runs / "one", step, "ema").values()
        means = [sum(row["audio"]) / 8 for row in rows if row["audio"]]
        mean = sum(means) / len(means)
        assert record["validation/loss_audio_ema"] == pytest.approx(mean)
        spread = sum((x - mean) ** 2 for x in means) / (len(means) - 1)
        assert record["validation/stderr_audio_ema"] == pytest.approx(
            math.sqrt(spread / len(means)))
        at_last = sum(row["video"][7] for row in rows) / len(rows)
        assert record["validation_t/video_ema/0.94"] == pytest.approx(at_last)


@pytest.mark.slow
def test_samples_are_drawn_by_all_ranks_and_reach_tensorboard(runs):
    names = ["00_validation000", "00_validation000_guidance1", "00_validation000_no_sound",
             "01_validation001"]
    for step in (0, STEPS):
        folder = runs / "two" / "samples" / f"step{step:08d}"
        files = {path.name for path in folder.iterdir()}
        assert files == {f"{name}.{end}" for name in names for end in ("mp4", "png", "gif", "wav")
                         } | {"prompts.json"}
    for name in names:  # the weights of step 0 are equal, so are the pictures
        one, two = (runs / ranks / f"samples/step00000000/{name}.png" for ranks in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    page = (runs / "two" / "samples" / "index.html").read_text()
    for place in re.findall(r'src="([^"]+)"', page):
        assert (runs / "two" / "samples" / place).is_file()
    assert "step 6" in page and "validation clip" in page and "http" not in page
    tags = read_events(runs / "two")[0].Tags()
    assert {f"samples/{name}/sound" for name in names} == set(tags["audio"])
    assert {f"samples/{name}/{kind}" for name in names for kind in ("clip", "sheet")} == set(
        tags["images"])
    assert not list((runs / "t2v" / "samples" / "step00000003").glob("*.wav"))


@pytest.mark.slow
def test_sound_is_stereo_and_the_settings_are_text(runs):
    events, _ = read_events(runs / "one")
    sound = events.Audio("samples/00_validation000/sound")[0]
    assert sound.content_type == "audio/wav" and sound.encoded_audio_string[22] == 2  # channels
    tags = events.Tags()["tensors"]
    for name in ("run", "deepspeed", "data", "streams", "model", "environment", "parameters"):
        assert f"config/{name}/text_summary" in tags
    plugins = events.summary_metadata
    assert any(value.plugin_data.plugin_name == "hparams" for value in plugins.values())
    assert any(value.plugin_data.plugin_name == "custom_scalars" for value in plugins.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "t2v"])
def test_every_chart_of_the_layout_shows_something(runs, name):
    events, found = read_events(runs / name)
    said = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = [chart for part in Layout.FromString(said).category for chart in part.chart]
    assert len(charts) == {"one": 11, "t2v": 7}[name]
    for chart in charts:
        assert any(re.search(pattern, tag) for pattern in chart.multiline.tag for tag in found)


@pytest.mark.slow
def test_validate_only_writes_no_step_twice(runs):
    said = (runs / "said1.txt").read_text().split("resuming at step 6")[1]
    assert re.search(r"step 6/6  validation  video \d\.\d+ \+- \d\.\d+", said)
    check_record(runs, "one")
    losses = [record for record in read_records(runs / "one") if "validation/loss_video" in record]
    assert [record["step"] for record in losses] == [0, 3, STEPS]
    assert f"video {losses[-1]['validation/loss_video']:.4f}" in said
    for line in ("budget: 0 steps to go", "validation video      first", "python -m tools.report"):
        assert line in said


@pytest.mark.slow
def test_validate_only_leaves_the_runs_own_record_alone(runs):
    """Its run went on behind the checkpoint that is measured: that curve stays, and all else."""
    shutil.copytree(runs / "t2v", runs / "ahead")
    ahead, late = runs / "ahead", {"step": 4, "train/loss": 9.0}
    with open(ahead / "metrics.jsonl", "a") as file:
        file.write(json.dumps(late) + "\n")
    append_event(ahead, "skip", step=4, kind="spike", applied=True)
    kept = ["metrics.jsonl", "config/run.json", "validation/step00000003.jsonl"]
    before, state = [(ahead / name).read_bytes() for name in kept], read_state(ahead)
    said = run([sys.executable, "train.py", f"{runs}/run.yaml", "task=t2v", "max_steps=3",
                f"run_dir={ahead}", "validate_only=true", "validation_samples=2"]).stdout
    assert "step 3/3  validation  video" in said and "validated: step 3" in said
    assert [(ahead / name).read_bytes() for name in kept] == before
    after = read_state(ahead)
    assert (after.cards, after.skips) == (state.cards, state.skips) and after.skips
    assert after.current.state == "done" and after.current.told["reason"] == "validate_only"


@pytest.mark.slow
def test_every_rank_leaves_a_log(runs):
    logs = [(runs / "two" / "logs" / f"rank0000{rank}.log").read_text() for rank in (0, 1)]
    assert "step 6/6  loss" in logs[0] and "rank 1 of 2" in logs[1]


@pytest.mark.slow
def test_report_of_two_runs_is_one_file_that_opens_offline(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", str(runs / "one"), str(runs / "t2v"), "--reference",
                                     str(runs / "two" / "metrics.jsonl"), "--overlay"])
    assert report.main() == 0
    page = (runs / "one" / "report.html").read_text()
    places = re.findall(r'(?:src|href)="([^"]{5})', page)
    assert places and all(place in ("data:", "#m") or place.startswith("#") for place in places)
    for text in ("Paired difference, B minus A", "validation video loss", "A: one", "B: t2v",
                 "<summary>run.json", "data:video/mp4;base64"):
        assert text in page, text
    assert page.count("reference two") >= 4  # in each plot of losses
    overlay = EventAccumulator(str(runs / "one" / "tb" / "reference_two"))
    overlay.Reload()
    expected = [(record["step"], pytest.approx(record["train/loss_video"]))
                for record in read_records(runs / "two") if "train/loss_video" in record]
    assert [(e.step, e.value) for e in overlay.Scalars("train/loss_video")] == expected


def test_a_disk_that_takes_nothing_stops_no_run(tmp_path, capsys):
    (tmp_path / "tb").write_text("a file where the folder should be")
    writer = MetricWriter(tmp_path, 1)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer.scalars(1, {"train/loss": 1.0})
    writer.scalars(2, {"train/loss": math.nan, "train/lr": 0.5})
    assert writer.events.errors == 3  # the opening and both records
    error = capsys.readouterr().err
    assert error.count("TensorBoard is off") == error.count("cannot be written") == 1
    (tmp_path / "metrics.jsonl").unlink()
    writer.scalars(3, {"train/loss": 3.0})
    assert read_records(tmp_path) == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/lr": 0.5},
                                      {"step": 3, "train/loss": 3.0}]


def test_samples_that_a_resume_took_away_are_no_longer_on_their_page(tmp_path):
    samples = tmp_path / "samples"
    for step in (1, 2):
        folder = samples / f"step0000000{step}"
        folder.mkdir(parents=True)
        (folder / "00_a.mp4").touch()
        (folder / "prompts.json").write_text('{"00_a": "a ball"}')
    config = SimpleNamespace(run_dir=str(tmp_path))
    evaluator = Evaluator(*[None] * 4, config, World(0, 1, 0, 1, "test"), None)
    write_gallery(samples, "run")
    MetricWriter(tmp_path, 2)  # resumes at step 1
    evaluator.renew_gallery()
    page = (samples / "index.html").read_text()
    assert "step 1<" in page and "step 2<" not in page
    assert evaluator.has_samples(1) and not evaluator.has_samples(2)


def test_a_failed_validation_names_itself_and_training_goes_on(capsys):
    def fail(error: Exception):
        raise error

    alone, pair = (Evaluator(*[None] * 5, World(0, size, 0, size, "test"), None) for size in (1, 2))
    assert alone.survive("validation", 7, lambda: 3) == 3
    assert alone.survive("validation", 7, lambda: fail(RuntimeError("out of memory"))) is None
    assert pair.survive("validation", 8, lambda: fail(DataError("shard gone"))) is None
    assert pair.survive("sampling", 8, lambda: fail(AttemptError("rank 1: OSError: full"))) is None
    assert capsys.readouterr().err.splitlines() == [
        "warning: validation at step 7 failed and training goes on: RuntimeError: out of memory",
        "warning: validation at step 8 failed and training goes on: DataError: shard gone",
        "warning: sampling at step 8 failed and training goes on: rank 1: OSError: full",
    ]
    with pytest.raises(RuntimeError):  # the other rank waits in a collective
        pair.survive("validation", 9, lambda: fail(RuntimeError("out of memory")))
