"""tools/replay.py: a step's samples, t, noise and losses again, from what the run left behind."""

import json
import sys

import pytest
import torch

from tests.support.faults import events, start_runs, write_world
from tools import replay


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Two ranks in fp32; update 5, whose weights are the checkpoint of step 4, is skipped."""
    root = write_world(tmp_path_factory.mktemp("replay"))
    start_runs(root, 2, {"run": {
        "overrides": ["save_every=4", f"deepspeed={root}/fp32_zero3.json"],
        "fault": {"kind": "nan_gradient", "rank": 0, "steps": [5]},
    }})
    return root / "runs" / "run"


@pytest.mark.slow
def test_it_finds_the_samples_t_and_losses_of_a_skipped_step(run_dir):
    (skip,) = events(run_dir, "skip")
    again = list(replay.replay(run_dir, skip["step"], None, torch.device("cpu")))
    assert [told["id"] for told in again] == [sample["id"] for sample in skip["samples"]]
    for told, sample in zip(again, skip["samples"], strict=True):
        assert told["t"] == sample["t"] and told["epoch"] == skip["epoch"]
        assert told["weights_of_step"] == 4 and told["latents_finite"]
        assert [told["loss_video"], told["loss_audio"]] == pytest.approx(sample["losses"], rel=1e-5)


@pytest.mark.slow
def test_one_sample_is_the_same_alone(run_dir, capsys, monkeypatch):
    whole = list(replay.replay(run_dir, 3, None, torch.device("cpu")))
    assert "loss_video" not in whole[0]  # no checkpoint before step 3 is kept
    monkeypatch.setattr(sys, "argv", ["replay", str(run_dir), "3", whole[5]["id"]])
    assert replay.main() == 0
    assert json.loads(capsys.readouterr().out) == whole[5]
    assert len({told["noisy_video"] for told in whole}) == 8


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), [
    (["0"], "step=0 must be 1 to 8"), (["9"], "step=9 must be 1 to 8"),
    (["3", "nobody"], "id=nobody is not in step 3"),
])
def test_what_cannot_be_is_one_line(run_dir, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["replay", str(run_dir), *arguments])
    assert replay.main() == 78
    assert message in capsys.readouterr().err
