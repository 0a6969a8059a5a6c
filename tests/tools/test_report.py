"""tools/report.py on run directories written by hand: what the page says, and what it refuses."""

import dataclasses
import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.events import append_event
from common.settings import ConfigError, load_config
from config import RunConfig
from data.schema import load_metadata
from evaluation import plots
from evaluation.validation import Row, write_rows
from tests.support.inputs import prepared
from tests.support.launch import ROOT
from tests.support.models import towers
from tools import report
from training.metrics.tags import SCALARS, described

T = (0.25, 0.75)
LOSSES = {"t2av": {"train/loss": 1.5, "train/loss_video": 0.5, "train/loss_audio": 1.0},
          "t2v": {"train/loss": 0.6, "train/loss_video": 0.6}}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    root = prepared.write_shards(tmp_path_factory.mktemp("data") / "set", train=4, validation=2)
    return dataclasses.asdict(load_metadata(root))


def write_run(folder, task, metadata, rows, data=None):
    """A run directory without checkpoints; `rows` by weights: losses at step 5."""
    (folder / "config").mkdir(parents=True)
    config = dataclasses.replace(towers.CONFIG, task=task)
    for name, values in (("run", {"task": task, "data": data or {"root": "shards/set"}}),
                         ("data", metadata), ("model", config.to_dict())):
        (folder / "config" / f"{name}.json").write_text(json.dumps(values))
    held = {f"validation_t/video/{t:.2f}": 1.0 for t in T}
    lines = [{"step": 5, "time/step_seconds": 1.0, **LOSSES[task]},
             {"step": 5, "validation/loss_video": 1.0, **held}]
    write_lines(folder / "metrics.jsonl", lines)
    write_rows(folder, 5, rows, T)
    return folder


def write_lines(path, lines):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows(shift, names="abcd"):
    return [Row(name, [1.0 + shift, 2.0 + shift], None) for name in names]


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
    return report.main()


@pytest.fixture
def twins(tmp_path, metadata):
    a = write_run(tmp_path / "a", "t2av", metadata, {"raw": rows(0.5), "ema": rows(0.25)})
    b = write_run(tmp_path / "b", "t2v", metadata, {"raw": rows(0.0), "ema": rows(0.0)})
    return a, b


def cells(page, row):
    return re.findall("<td>(.*?)</td>", page.split(f"<tr><th>{row}</th>")[1].split("</tr>")[0])


def test_a_t2av_run_and_its_twin_are_compared_part_by_part(twins):
    page = report.build_page(list(twins), [])
    assert cells(page, "last training video loss") == ["0.5000", "0.6000"]
    assert cells(page, "last training audio loss") == ["1.0000", ""]
    assert "1.5000" not in page  # video + audio is no neighbour of video alone


def test_averaged_weights_are_paired_where_both_runs_have_them(twins):
    page = report.build_page(list(twins), [])
    assert "-0.50000 [-0.50000, -0.50000]" in page and "-0.25000 [-0.25000, -0.25000]" in page
    write_rows(twins[1], 5, {"raw": rows(0.0)}, T)
    page = report.build_page(list(twins), [])
    assert "-0.50000 [" in page and "-0.25000 [" not in page and "Averaged" not in page


def test_an_id_that_a_run_holds_twice_is_named_and_not_paired(twins):
    for run in twins:
        write_rows(run, 5, {"raw": [*rows(0.0), *rows(9.0, "b")]}, T)
    page = report.build_page(list(twins), [])
    assert "<tr><th>5</th><td>3</td>" in page and "1 id that a run holds twice (b)" in page
    for run in twins:
        write_rows(run, 5, {"raw": [*rows(0.0), *rows(9.0)]}, T)
    page = report.build_page(list(twins), [])
    assert "nothing can be paired" in page and "4 ids that a run holds twice (a, b, c, ...)" in page


def test_only_what_some_run_has_is_drawn(twins):
    page = report.build_page(list(twins), [])
    assert "<!-- validation video loss" in page and "validation video loss by t" in page
    assert "<!-- validation audio loss" not in page


def test_each_t_has_its_standard_error_where_the_samples_are_known(twins):
    curves = plots.load_curves(twins[0], 0, "a")
    bars = "LineCollection"
    assert bars in plots.plot_by_t([curves], "video")
    assert bars not in plots.plot_by_t([curves._replace(run_dir=None)], "video")  # a reference


def test_every_stream_and_every_part_of_the_model_has_its_row(tmp_path, metadata):
    data = {"streams": [{"root": "x/near", "proportion": 1}, {"remote": "s3://far/away",
                                                              "proportion": 3}]}
    run = write_run(tmp_path / "run", "t2av", metadata, {"raw": rows(0.0)}, data)
    append_event(run, "start", first_step=0, data={"near": "cafe", "away": "babe"})
    page = report.build_page([run], [])
    near, away = cells(page, "near"), cells(page, "away")
    assert near[:2] == ["x/near", "25 %"] and near[-1] == "cafe"
    assert near[2] == "9 frames at 24 fps, 64 x 64" and near[3] == "train 4, validation 2"
    assert away == ["s3://far/away", "75 %", *["not recorded"] * 4, "babe"]
    both = {"near": metadata, "away": metadata | {"frames": 240, "counts": {"train": 360},
                                                 "rejected": {"silent": 3, "short": 2}}}
    (run / "config" / "streams.json").write_text(json.dumps(both))
    away = cells(report.build_page([run], []), "away")
    assert away[2:] == ["240 frames at 24 fps, 64 x 64", "train 360", "1.00",
                        "5: silent 3, short 2", "babe"]
    counts = [int(cells(page, part)[0].replace(",", "")) for part in (
        "video tower", "audio tower", "joint blocks, new weights", "all")]
    assert min(counts) > 0 and sum(counts[:3]) == counts[3]
    assert "fusion full" in cells(page, "joint blocks, new weights")[1]


def test_a_twin_without_sound_has_one_tower(twins):
    page = report.build_page([twins[1]], [])
    assert cells(page, "video tower")[0] == cells(page, "all")[0]
    assert "<th>audio tower</th>" not in page


def test_values_that_are_no_numbers_are_left_out_of_a_reference(twins, monkeypatch):
    path = write_lines(twins[0].parent / "c" / "metrics.jsonl", [
        {"step": 1, "train/loss_video": None, "note": "x", "train/lr": 0.5},
        {"step": 2, "train/loss_video": 3.0, "train/lr": float("nan")}])
    assert call(monkeypatch, twins[0], "--reference", path, "--overlay") == 0
    overlay = EventAccumulator(str(twins[0] / "tb" / "reference_c"))
    overlay.Reload()
    assert [(e.step, e.value) for e in overlay.Scalars("train/loss_video")] == [(2, 3.0)]
    assert [(e.step, e.value) for e in overlay.Scalars("train/lr")] == [(1, 0.5)]
    assert set(overlay.Tags()["scalars"]) == {"train/loss_video", "train/lr"}


def test_references_of_one_name_are_refused(twins, monkeypatch, capsys):
    paths = [write_lines(twins[0].parent / where / "t2av.jsonl", [{"step": 1, "train/lr": 1.0}])
             for where in "cd"]
    assert call(monkeypatch, twins[0], "--overlay", *(
        word for path in paths for word in ("--reference", path))) == 78
    error = capsys.readouterr().err
    assert f"--reference={paths[1]}: called t2av, as {paths[0]} is" in error and "ln -s" in error
    assert not (twins[0] / "tb").exists() and not (twins[0] / "report.html").exists()


def test_an_overlay_of_nothing_is_refused(twins, monkeypatch, capsys):
    assert call(monkeypatch, twins[0], "--overlay") == 78
    assert "--overlay: no --reference" in capsys.readouterr().err


def test_an_overlay_that_a_disk_did_not_take_is_an_error(twins, monkeypatch, capsys):
    path = write_lines(twins[0].parent / "t2av.jsonl", [{"step": 1, "train/lr": 1.0}])
    (twins[0] / "tb").write_text("a file where the folder should be")
    assert call(monkeypatch, twins[0], "--reference", path, "--overlay") == 78
    assert "reference_t2av: not written" in capsys.readouterr().err


@pytest.mark.parametrize("text, why", [
    (None, "no such file"), ("", "no record in it"), ("step 1\n", "not JSON lines"),
    ('[1]\n', "not JSON lines"), ('{"train/loss": 1}\n', "without a step")])
def test_a_file_that_is_no_reference_is_refused_by_name(tmp_path, text, why):
    path = tmp_path / "t2av.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"--reference={path}: .*{why}.*give the metrics.jsonl"):
        report.read_reference(path, 0)


@pytest.mark.parametrize("twin", ["t2av", "t2v"])
def test_a_kept_reference_is_a_whole_run_of_its_config(twin):
    """benchmarks/playground/*.jsonl: "is my loss normal?" is asked against them."""
    curves = report.read_reference(ROOT / "benchmarks" / "playground" / f"{twin}.jsonl", 0)
    tags = {tag for record in curves.records for tag in record if tag != "step"}
    assert {described(tag) for tag in tags} <= set(SCALARS)
    assert ("train/loss_audio" in tags) == (twin == "t2av")
    config = load_config(RunConfig, ROOT / "configs" / f"playground_{twin}.yaml", [])
    for tag in ("train/loss", "validation/loss_video_ema"):
        steps, losses = curves.points(tag)
        assert (steps[1:] > steps[:-1]).all(), f"{tag} holds a step twice"
        assert steps[-1] == config.max_steps
        assert losses[-1] < losses[0]
    new = max(1, config.optimizer.lr_new) if twin == "t2av" else 1  # a t2v run has no new weights
    assert curves.points("train/lr")[1].max() == pytest.approx(config.optimizer.lr * new)
