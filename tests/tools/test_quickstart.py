"""tools/quickstart.py: its gates fail where they must, and say why."""

import json
import os

import numpy as np
import pytest

from data.clips.decode import CutSpec
from data.clips.mux import write_clip
from tools import quickstart
from tools.quickstart import QuickstartError, check_clip, check_losses, validation_losses

RATE = 16000
SPEC = CutSpec(fps=24, frames=9, height=64, width=96)
FIRST = {"validation/loss_video": 2.0, "validation/loss_audio": 1.5}


def noise(shape, scale):
    return scale * np.random.default_rng(0).random(shape, dtype=np.float32)


def write(path, frames=None, audio=None):
    """A clip of 12 frames; noise in picture and sound unless told otherwise."""
    frames = noise((12, 64, 96, 3), 255).astype(np.uint8) if frames is None else frames
    audio = noise((RATE // 2, 2), 0.3) if audio is None else audio
    write_clip(path, frames, 24, audio, RATE)
    return path


def test_losses_that_fell_pass():
    check_losses(FIRST, {tag: value - 0.1 for tag, value in FIRST.items()})


@pytest.mark.parametrize("tag", FIRST)
@pytest.mark.parametrize("change", [0.1, 0.0, float("nan")])
def test_a_loss_that_did_not_fall_fails(tag, change):
    last = {name: value - 0.1 for name, value in FIRST.items()} | {tag: FIRST[tag] + change}
    with pytest.raises(QuickstartError, match=f"{tag} did not fall"):
        check_losses(FIRST, last)


@pytest.mark.parametrize("tag", FIRST)
def test_a_missing_loss_fails(tag):
    without = {name: value for name, value in FIRST.items() if name != tag}
    for first, last in ((without, FIRST), (FIRST, without)):
        with pytest.raises(QuickstartError, match=f"{tag} was not measured"):
            check_losses(first, last)


@pytest.mark.parametrize("lines", [[], [{"step": 1, "train/loss": 1.0}], [{"step": 0} | FIRST]])
def test_a_run_without_two_validations_fails(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(QuickstartError, match="validation losses .* at least 2"):
        validation_losses(tmp_path)


def test_first_and_last_validation_losses(tmp_path):
    lines = [{"step": 0} | FIRST, {"step": 1, "train/loss": 1.0}, {"validation/loss_video": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert validation_losses(tmp_path) == (FIRST, {"validation/loss_video": 1.0})


def test_a_run_without_metrics_fails(tmp_path):
    with pytest.raises(QuickstartError, match="no metrics.jsonl"):
        validation_losses(tmp_path)


def test_a_clip_with_picture_and_sound_passes(tmp_path):
    check_clip(write(tmp_path / "good.mp4"), SPEC)


def test_a_flat_picture_fails(tmp_path):
    flat = np.full((12, 64, 96, 3), 90, np.uint8)
    with pytest.raises(QuickstartError, match="flat.mp4: the picture is one flat colour"):
        check_clip(write(tmp_path / "flat.mp4", flat), SPEC)


def test_a_silent_clip_fails(tmp_path):
    path = write(tmp_path / "quiet.mp4", audio=np.zeros((RATE // 2, 2), np.float32))
    with pytest.raises(QuickstartError, match="quiet.mp4: silent: "):
        check_clip(path, SPEC)


def test_a_clip_without_sound_fails(tmp_path):
    write_clip(tmp_path / "mute.mp4", noise((12, 64, 96, 3), 255).astype(np.uint8), 24, None, RATE)
    with pytest.raises(QuickstartError, match="mute.mp4: no_audio: "):
        check_clip(tmp_path / "mute.mp4", SPEC)


def test_no_gpu_is_seen_and_a_failed_step_ends_in_one_line(tmp_path, monkeypatch, capsys):
    """Also where GPUs are: NPROC=2 CPU ranks must not meet a CUDA device."""
    monkeypatch.setattr(quickstart, "ROOT", tmp_path / "run")
    monkeypatch.setattr(os, "environ", os.environ | {"CUDA_VISIBLE_DEVICES": "0"})
    seen = []

    def fail(title, *command):
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        raise QuickstartError(f"'{title}' exited with 1")

    monkeypatch.setattr(quickstart, "step", fail)
    assert quickstart.main() == 1 and seen == [""]
    assert capsys.readouterr().err == "error: quickstart: 'make clips' exited with 1\n"
