"""Ten SIGKILLs at random moments of one training; benchmarks/training_kills/ has a hundred."""

import pytest

from tests.training_kills import run


@pytest.mark.faults
def test_a_training_killed_ten_times_is_the_undisturbed_one(tmp_path):
    different, _ = run(tmp_path, kills=10, steps=60, seed=1)
    assert not different
