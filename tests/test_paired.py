"""The paired difference against what it must be, on files that heldout writes."""

import numpy as np
import pytest

from tools.paired import bootstrap, differences, steps_of
from training.heldout import Row, summarise, write_rows

T = (0.25, 0.75)


def write(run, shift: float, names: str) -> None:
    run.mkdir(exist_ok=True)
    rows = [Row(name, [ord(name) + shift, ord(name) + 3 * shift], None) for name in names]
    write_rows(run, 5, {"raw": rows}, T)


def test_samples_are_paired_by_id_and_their_own_spread_cancels(tmp_path):
    write(tmp_path / "a", 0.0, "abcd")
    write(tmp_path / "b", 0.5, "dcbz")
    values = differences(tmp_path / "a", tmp_path / "b", 5)
    assert values.tolist() == [[0.5, 1.5]] * 3
    assert steps_of(tmp_path / "a") == [5]
    assert bootstrap(values.mean(axis=1)) == (3, 1.0, 1.0, 1.0)


def test_another_grid_of_t_is_not_paired(tmp_path):
    write(tmp_path / "a", 0.0, "ab")
    (tmp_path / "b").mkdir()
    write_rows(tmp_path / "b", 5, {"raw": [Row("a", [1.0, 2.0], None)]}, (0.1, 0.9))
    assert not len(differences(tmp_path / "a", tmp_path / "b", 5))


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(1)
    draws = generator.normal(0.3, 1.0, (200, 40))
    covered = sum(d.low <= 0.3 <= d.high for d in map(bootstrap, draws))
    assert 0.88 <= covered / 200 <= 0.99
    one = bootstrap(draws[0])
    assert one == bootstrap(draws[0])  # the same page for the same runs
    assert one.high - one.low == pytest.approx(2 * 1.96 * draws[0].std() / 40**0.5, rel=0.1)


def test_summary_of_rows():
    rows = [Row("a", [1.0, 3.0], None), Row("b", [2.0, 6.0], [1.0, 1.0])]
    values = summarise(rows, T, "_ema")
    assert values["validation/loss_video_ema"] == 3.0
    assert values["validation/stderr_video_ema"] == pytest.approx(1.0)  # of 2 and 4
    assert values["validation_t/video_ema/0.75"] == 4.5
    assert values["validation/loss_audio_ema"] == 1.0
