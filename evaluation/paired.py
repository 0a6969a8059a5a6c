"""Two runs on the same validation samples: the difference of their losses, sample by sample.

Both runs evaluate each sample at the same t and noise, so what varies between samples cancels and a
small difference shows. Called by tools.report.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.validation import read_rows

RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)  # percent
DRAWS_AT_ONCE = 1 << 22  # of one sample: 64 MB


class Difference(NamedTuple):
    """Loss of B minus loss of A over the samples that both have: below 0, B is better."""

    samples: int
    mean: float
    low: float  # of a bootstrap interval of 95 % over samples
    high: float


def steps_of(run_dir: Path) -> list[int]:
    """Steps with validation losses per sample."""
    files = (run_dir / "validation").glob("step*.jsonl")
    return sorted(int(path.stem.removeprefix("step")) for path in files)


def differences(
    run_a: Path, run_b: Path, step: int, modality: str = "video", weights: str = "raw"
) -> np.ndarray:
    """(samples, t) losses of B minus those of A at a step; empty if they share nothing.

    An id that either run holds twice is left out: `repeated_ids`.
    """
    rows_a, rows_b = (read_rows(run, step, weights) for run in (run_a, run_b))
    shared = [name for name in sorted(rows_a.keys() & rows_b.keys())
              if rows_a[name][modality] and rows_b[name][modality]
              and rows_a[name]["t"] == rows_b[name]["t"]]
    return np.array([
        np.subtract(rows_b[name][modality], rows_a[name][modality]) for name in shared
    ])


def bootstrap(values: np.ndarray) -> Difference:
    """Mean of (samples,) values and its interval; the same for the same values."""
    count, generator = len(values), np.random.default_rng(0)
    at_once = max(1, DRAWS_AT_ONCE // count)
    means = [
        values[generator.integers(0, count, (min(at_once, RESAMPLES - done), count))].mean(axis=1)
        for done in range(0, RESAMPLES, at_once)
    ]
    low, high = np.percentile(np.concatenate(means), INTERVAL)
    return Difference(count, float(values.mean()), float(low), float(high))
