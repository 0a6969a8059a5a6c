"""What is due at which step, and the learning rate: functions of the step and the settings."""

import dataclasses

import pytest

from config import RunConfig
from data.loading.sources import DataConfig
from training.schedule import BUDGET_AGAIN, Schedule

CONFIG = RunConfig(
    "run", "wan", "tangoflux", DataConfig("root"), warmup_steps=4, max_steps=10, log_every=4,
    health_every=5, validate_every=4, sample_every=5, save_every=3)
DUE = Schedule.of(CONFIG, 0, False, False)


def steps(condition, *more):
    return [step for step in range(11) if condition(step, *more)]


@pytest.mark.parametrize(
    ("decay_steps", "expected"),
    [(0, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
     (5, [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])],
)
def test_rate_factor(decay_steps, expected):
    due = Schedule.of(dataclasses.replace(CONFIG, decay_steps=decay_steps), 0, False, False)
    assert [due.rate_factor(step) for step in range(10)] == pytest.approx(expected)


def test_what_is_due_at_which_step():
    assert steps(DUE.validation, False) == [0, 4, 8, 10]
    assert steps(DUE.samples, False) == [0, 5, 10]
    assert steps(DUE.checkpoint, False) == [3, 6, 9]
    assert steps(DUE.record) == [0, 4, 8, 10] and steps(DUE.health) == [0, 5, 10]
    assert steps(DUE.done) == [10] and DUE.trains()
    assert not steps(DUE.recorded)


def test_a_stop_leaves_validation_and_samples_to_the_next_start_but_saves():
    assert not steps(DUE.validation, True) and not steps(DUE.samples, True)
    assert steps(DUE.checkpoint, True) == list(range(1, 11))


def test_a_resumed_start_does_nothing_twice():
    again = Schedule.of(CONFIG, 8, True, False)
    assert steps(again.validation, False) == [10]
    assert 9 in steps(again.checkpoint, False) and not again.checkpoint(8, True)
    sampled = Schedule.of(dataclasses.replace(CONFIG, sample_every=4), 8, False, True)
    assert sampled.validation(8, False) and not sampled.samples(8, False)
    assert not Schedule.of(CONFIG, 10, True, True).trains()


def test_never_is_never():
    due = Schedule.of(dataclasses.replace(CONFIG, validate_every=None), 0, False, False)
    assert not steps(due.validation, False)
    assert not steps(dataclasses.replace(due, sample_every=None).samples, False)


def test_validate_only_validates_and_ends():
    only = Schedule.of(dataclasses.replace(CONFIG, validate_only=True), 3, True, False)
    assert only.validation(3, False) and only.recorded(3) and only.done(3)
    assert not only.trains() and not only.samples(3, False) and not only.checkpoint(3, True)


@pytest.mark.parametrize(("log_every", "expected"), [(1, [20]), (7, [21]), (40, [40])])
def test_the_budget_is_said_once_more(log_every, expected):
    due = dataclasses.replace(DUE, log_every=log_every, max_steps=100)
    assert [step for step in range(101) if due.budget(step)] == expected
    later = dataclasses.replace(due, first=100 - BUDGET_AGAIN)
    assert len([step for step in range(80, 101) if later.budget(step)]) == 1
