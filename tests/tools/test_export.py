"""tools/export.py: what leaves a run is what was trained, and the other tools read it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from evaluation import trained_run
from model import AVFullDiT, AVFullDiTConfig
from model.weights.load import iter_pretrained
from tests.tools.test_sample import call, change, copied, refused, trained  # noqa: F401
from tools import export, sample
from training.checkpoint.save_load import read_weights, write_weights


def run_export(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["export", *map(str, arguments)])
    return export.main()


@pytest.fixture
def exported(trained, tmp_path, monkeypatch):  # noqa: F811
    assert run_export(monkeypatch, trained / "run", tmp_path / "out") == 0
    return tmp_path / "out"


def test_weights_are_bit_equal(trained, exported):  # noqa: F811
    _, weights = read_weights(trained / "run")
    state = AVFullDiT.from_pretrained(exported).state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in state)


def test_a_folder_draws_the_clip_of_its_run(trained, exported):  # noqa: F811
    clips = []
    for source in (trained / "run", exported):
        arguments = sample.parse_arguments([str(source), "--num-steps", "2"])
        sampler = sample.Sampler(source, None, torch.device("cpu"))
        prompt, negative = sample.Prompt("x", "a ball", "a thud"), sampler.encode("", "")
        clips.append(sampler.draw(prompt, negative, 0, arguments))
    # Equal weights at other addresses: a CPU may add in another order, which rounds otherwise.
    (picture, sound), (same_picture, same_sound) = clips
    assert abs(picture.astype(int) - same_picture).max() <= 1
    assert abs(sound - same_sound).max() < 1e-4 < abs(sound).max()


def test_released_layouts_hold_the_trained_towers(trained, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "released"
    assert run_export(monkeypatch, trained / "run", out, "--layout", "released") == 0
    _, weights = read_weights(trained / "run")
    config = AVFullDiT.from_pretrained(saved(trained, tmp_path, monkeypatch)).config
    read = dict(iter_pretrained(config, out / "wan", out / "tangoflux"))
    assert read and all(torch.equal(read[name], weights[name]) for name in read)
    before = load_file(trained / "tangoflux/tangoflux.safetensors")
    after = load_file(out / "tangoflux/tangoflux.safetensors")
    assert before.keys() == after.keys()  # the text encoder included


def saved(trained, tmp_path, monkeypatch):  # noqa: F811
    assert run_export(monkeypatch, trained / "run", tmp_path / "saved") == 0
    return tmp_path / "saved"


def test_refusals(trained, exported, monkeypatch, capsys):  # noqa: F811
    capsys.readouterr()
    for arguments, message in (
        ((trained / "run", exported), "not empty"),
        ((trained / "run", exported.parent / "new", "--step", "7"), "step=7 has no checkpoint"),
        ((exported.parent / "nowhere", exported.parent / "new"), "no such file"),
        ((trained / "run", exported.parent / "new", "--ema"), "holds no EMA"),
        ((exported, exported.parent / "new", "--ema"), "--ema: choose it when exporting"),
        ((exported, exported.parent / "new", "--step", "7"), "was exported from step 1"),
    ):
        assert run_export(monkeypatch, *arguments) == 78
        line = capsys.readouterr().err.strip()
        assert message in line and "\n" not in line


def test_a_damaged_folder_is_one_line(exported, monkeypatch, capsys):
    [weights] = exported.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "export it again" in refused(monkeypatch, capsys, exported, "--video-prompt", "x")


def test_t2v_needs_nothing_of_tangoflux(copied, tmp_path, monkeypatch):  # noqa: F811
    shutil.rmtree(copied / "tangoflux")
    change(copied / "run/config/run.json", task="t2v")
    change(copied / "run/config/model.json", task="t2v", audio=None)
    config = AVFullDiTConfig.from_dict(trained_run.read_run_file(copied / "run/config/model.json"))
    write_weights(copied / "run", 1, AVFullDiT(config).state_dict())
    arguments = ["--video-prompt", "x", "--num-steps", "1", "--out", tmp_path / "clips"]
    assert call(monkeypatch, copied / "run", *arguments) == 0
    assert (tmp_path / "clips/prompt.mp4").is_file()
