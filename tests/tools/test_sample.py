"""tools/sample.py: what it refuses, each in one line, and the kernel it runs with."""

import dataclasses
import json
import shutil

import pytest
import torch

from data.schema import load_metadata
from model import AVFullDiT
from tests.support.inputs import prepared
from tests.support.models import tiny, towers
from tools import sample
from training.checkpoint.save_load import write_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory as train.py leaves it without ZeRO, of random weights."""
    root = tmp_path_factory.mktemp("trained")
    wan, tangoflux = tiny.write_wan(root / "wan"), tiny.write_tangoflux(root / "tangoflux")
    metadata = load_metadata(prepared.write_shards(root / "shards", 1, 1))
    config = dataclasses.replace(towers.CONFIG, sample_rate=tiny.SAMPLE_RATE, audio_hop=tiny.HOP)
    run = {"wan": str(wan), "tangoflux": str(tangoflux), "task": "t2av", "attention": "sdpa",
           "flow": {"shift": 5.0}}
    (root / "run" / "config").mkdir(parents=True)
    for name, values in (("run", run), ("data", dataclasses.asdict(metadata)),
                         ("model", dataclasses.asdict(config))):
        (root / "run" / "config" / f"{name}.json").write_text(json.dumps(values))
    write_weights(root / "run", 1, AVFullDiT(config).state_dict())
    return root


@pytest.fixture
def copied(trained, tmp_path):
    """A copy that a test may damage; its run.json names the copied backbones."""
    root = shutil.copytree(trained, tmp_path / "copied")
    change(root / "run/config/run.json", wan=str(root / "wan"), tangoflux=str(root / "tangoflux"))
    return root


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sample", *map(str, arguments)])
    return sample.main()


def refused(monkeypatch, capsys, *arguments) -> str:
    """The one line of error; the exit status must not be 0."""
    capsys.readouterr()
    assert call(monkeypatch, *arguments) == 78
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a_clip_is_written_and_the_kernel_named_once(trained, tmp_path, monkeypatch, capsys):
    arguments = ["--video-prompt", "x", "--num-steps", "1", "--out", tmp_path]
    assert call(monkeypatch, trained / "run", *arguments) == 0
    assert capsys.readouterr().out.count("attention sdpa") == 1
    assert (tmp_path / "prompt.mp4").is_file() and (tmp_path / "prompt.png").is_file()


def test_clips_are_not_written_among_those_of_training(copied, monkeypatch):
    assert call(monkeypatch, copied / "run", "--video-prompt", "x", "--num-steps", "1") == 0
    assert [path.name for path in (copied / "run" / "samples").iterdir()] == [
        "step00000001_sampled"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": "flash"}, "attention='flash' is unknown"),
        ({"attention": "flash_attn"}, "attention='flash_attn'"),  # not installed, or no GPU
        ({"attention": "cudnn"}, "attention='cudnn' needs bfloat16 or float16 on a GPU"),
        ({"flow": {}}, "run.json: key 'shift' is missing"),
        ({"wan": "/nowhere"}, "wan=/nowhere: there is no such folder"),
    ],
)
def test_the_runs_own_settings_are_used(copied, monkeypatch, capsys, values, message):
    change(copied / "run/config/run.json", **values)
    assert message in refused(monkeypatch, capsys, copied / "run", "--video-prompt", "x")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run/config/run.json", cut_short),
        ("run/config/data.json", zeroed),
        ("run/config/model.json", cut_short),
        ("run/checkpoints/step00000001/weight-00000.safetensors", zeroed),
        ("run/checkpoints/step00000001/manifest.json", cut_short),
        ("wan/vae/diffusion_pytorch_model.safetensors", cut_short),
        ("wan/tokenizer/tokenizer.json", cut_short),
        ("tangoflux/vae.safetensors", cut_short),
        ("tangoflux/config.json", zeroed),
    ],
)
def test_damage_is_one_clear_line(copied, monkeypatch, capsys, name, damage):
    damage(copied / name)
    line = refused(monkeypatch, capsys, copied / "run", "--video-prompt", "x")
    assert str((copied / name).parent) in line or str(copied / "run" / "checkpoints") in line
    assert "download" in line or "train" in line or "restore" in line


def test_weights_of_another_model_are_one_clear_line(copied, monkeypatch, capsys):
    write_weights(copied / "run", 1, {"some.weight": torch.zeros(3)})
    line = refused(monkeypatch, capsys, copied / "run", "--video-prompt", "x")
    assert "Missing key" in line and len(line) < 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video-prompt", "x", "--num-steps", "0"], "--num-steps=0: must be at least 1"),
        (["--video-prompt", "x", "--count", "0"], "--count=0: must be at least 1"),
        (["--video-prompt", "x", "--count", "-1"], "--count=-1: must be at least 1"),
    ],
)
def test_numbers_that_draw_nothing_are_refused(monkeypatch, capsys, arguments, message):
    assert message in refused(monkeypatch, capsys, "/nowhere", *arguments)


PROMPT = '{"id": "%s", "video_caption": "v", "audio_caption": "a"}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[1]"], ":1: a JSON list, not an object"),
        (["nonsense"], ":1: not a JSON object"),
        ([PROMPT % "x", PROMPT % "x"], ":2: id 'x' is taken by line 1"),
        ([PROMPT % "a/b", "", PROMPT % "a_b"], ":3: id 'a_b' is taken by line 1"),
        ([PROMPT % "prompt001", PROMPT.replace('"id": "%s", ', "")], ":2: id 'prompt001' is taken"),
        (['{"video_caption": 3, "audio_caption": "a"}'], ":1: key 'video_caption' is not a string"),
        ([PROMPT.replace('"v"', '"\\ud83d"') % "x"], ":1: key 'video_caption' holds a lone"),
        ([PROMPT % "\\ud83d"], ":1: key 'id' holds a lone surrogate"),
    ],
)
def test_prompts_that_cannot_be_drawn(tmp_path, monkeypatch, capsys, lines, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert f"{path}{message}" in refused(monkeypatch, capsys, "/nowhere", "--prompts", path)
