"""training/checkpoint.py under faults on two real ranks; the checks are in checkpoint_worker.py."""

import pytest

from tests.launch import torchrun
from training.checkpoint import CheckpointError, read_weights


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
