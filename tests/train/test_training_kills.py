"""Six SIGKILLs of one training, at random moments, change no bit (a hundred: benchmarks/)."""

import pytest

from tests.support.kills.training_kills import run


@pytest.mark.faults(seconds=80)
def test_killed_six_times_it_is_the_undisturbed_run(tmp_path):
    different, _ = run(tmp_path, kills=6, steps=32, seed=1)
    assert not different
