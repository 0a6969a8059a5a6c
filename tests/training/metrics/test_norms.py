"""Gradient norms and update ratios per part equal a dense reference in every engine."""

import pytest

from tests.support.launch import run_ranks
from tests.support.workers.checkpoint_worker import ENGINES, OFFLOADED


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_norms_per_part_equal_a_dense_reference(processes):
    done = run_ranks(processes, "tests/support/workers/health_worker.py")
    for name in ENGINES:
        assert f"held {name}\n" in done.stdout


@pytest.mark.faults(seconds=90)
def test_norms_per_part_with_the_optimiser_on_the_host():
    """DeepSpeedCPUAdam keeps its gradients elsewhere."""
    done = run_ranks(2, "tests/support/workers/health_worker.py", *OFFLOADED)
    for name in OFFLOADED:
        assert f"held {name}\n" in done.stdout, done.stderr[-3000:]
