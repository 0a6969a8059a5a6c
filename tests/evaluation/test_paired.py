"""The paired difference against what it must be, on files that heldout writes."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.ranks import World
from evaluation import paired
from evaluation.paired import bootstrap, differences, steps_of
from evaluation.validation import (
    Row,
    measure,
    read_step,
    repeated_ids,
    spread_by_t,
    summarise,
    write_rows,
)

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


def test_many_samples_do_not_need_their_resamples_at_once(monkeypatch):
    values = np.random.default_rng(3).normal(size=701)
    picks = np.random.default_rng(0).integers(0, 701, (paired.RESAMPLES, 701))
    low, high = np.percentile(values[picks].mean(axis=1), paired.INTERVAL)
    assert bootstrap(values)[2:] == (low, high)
    monkeypatch.setattr(paired, "DRAWS_AT_ONCE", 7010)
    tracemalloc.start()
    assert bootstrap(values)[2:] == (low, high)
    assert tracemalloc.get_traced_memory()[1] < 1e6 < picks.nbytes
    tracemalloc.stop()


def test_an_id_that_is_there_twice_is_not_paired(tmp_path):
    """Two streams of one manifest have it; nothing tells which line is which."""
    for name, shift in (("a", 0.0), ("b", 0.5)):
        write(tmp_path / name, shift, "abcbd" if name == "b" else "abcd")
    assert differences(tmp_path / "a", tmp_path / "b", 5).tolist() == [[0.5, 1.5]] * 3
    assert repeated_ids(tmp_path / "b", 5) == {"b"} and not repeated_ids(tmp_path / "a", 5)
    assert len(read_step(tmp_path / "b", 5)) == 5


def test_one_clip_with_and_without_sound_is_measured():
    """At step 0 the picture is deaf: the video losses of both are equal to the bit."""
    batch = SimpleNamespace(sample_ids=["a", "b", "a", "a"])
    video, audio = torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([4.0, 5.0, 0.0, 4.0])
    losses = video, audio, torch.tensor([True, True, False, True])
    engine = SimpleNamespace(eval=lambda: None, train=lambda: None,
                             zero_optimization_stage=lambda: 0)
    got = measure(engine, [(batch, torch.ones(4, dtype=torch.bool))], lambda *_: losses, T, True,
                  World(0, 1, 0, 1, "test"), lambda: None)
    assert got == [("a", [1.0, 1.0], None), ("a", [1.0, 1.0], [4.0, 4.0]),
                   ("a", [1.0, 1.0], [4.0, 4.0]), ("b", [2.0, 2.0], [5.0, 5.0])]


def test_standard_error_of_each_t(tmp_path):
    losses = [Row("a", [1.0, 3.0], None), Row("b", [2.0, 7.0], [1.0, 1.0])]
    write_rows(tmp_path, 5, {"raw": losses, "ema": losses[:1]}, T)
    assert spread_by_t(tmp_path, 5, "video") == {"0.25": pytest.approx(0.5), "0.75": 2.0}
    assert spread_by_t(tmp_path, 5, "audio") == {"0.25": 0.0, "0.75": 0.0}
    assert spread_by_t(tmp_path, 6, "video") == {}  # a full disk kept no file
