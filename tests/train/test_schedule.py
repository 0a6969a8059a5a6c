"""The learning rate: linear up, constant, linear down, a function of the step alone."""

import pytest

import train
from config import RunConfig
from data.loading.sources import DataConfig


@pytest.mark.parametrize(
    ("decay_steps", "expected"),
    [(0, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
     (5, [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])],
)
def test_rate_factor(decay_steps, expected):
    config = RunConfig("run", "wan", "tangoflux", DataConfig("root"), warmup_steps=4,
                       decay_steps=decay_steps, max_steps=10)
    found = [train.rate_factor(step, config) for step in range(10)]
    assert found == pytest.approx(expected)
