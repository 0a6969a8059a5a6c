"""training/checkpoint.py under faults on two real ranks; the checks are in checkpoint_worker.py."""

import json

import pytest

from tests.launch import torchrun
from training.checkpoint import CheckpointError, check_same_model, read_weights


@pytest.mark.slow
def test_faults_on_two_ranks(tmp_path):
    done = torchrun(2, "tests/checkpoint_worker.py", str(tmp_path))
    for name in (
        "second writer refused",
        "fresh start",
        "keeps the last two",
        "resume continues bit for bit",
        "full disk on one rank",
        "flipped bit refused",
        "truncated checkpoint passed over",
        "no complete checkpoint: refused",
        "killed in the first save: a fresh start",
    ):
        assert name in done.stdout


def test_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_weights(tmp_path)


def test_a_run_older_than_a_key_resumes_with_its_default_alone(tmp_path):
    saved = {"num_joint_blocks": 2, "video": {"patch_size": [1, 2, 2]}}
    (tmp_path / "manifest.json").write_text(json.dumps({"model": saved}))
    model = {"num_joint_blocks": 2, "video": {"patch_size": (1, 2, 2)}, "fusion": "full"}
    check_same_model(tmp_path, model, {"num_joint_blocks": 18, "fusion": "full"})
    for other in ({"fusion": "cross"}, {"num_joint_blocks": 18}):
        with pytest.raises(CheckpointError, match="was trained with"):
            check_same_model(tmp_path, model | other, {"num_joint_blocks": 18, "fusion": "full"})
