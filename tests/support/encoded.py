"""Comparing what clips became with what was stored of them, on whatever CPU it is made again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHANGED = "what a clip becomes has changed: raise ENCODING_VERSION or restore the behaviour"


def assert_close(name: str, found: Any, stored: Any, most: float) -> None:
    """Nowhere further apart than `most`, which is what CPUs round differently."""
    found, stored = (np.asarray(value, np.float64) for value in (found, stored))
    assert found.shape == stored.shape, f"{name}: {CHANGED}"
    apart = float(np.abs(found - stored).max(initial=0.0))
    assert apart <= most, f"{name}: {apart:.3g} apart from the stored one; {CHANGED}"


def assert_same_sample(found: dict[str, Any], stored: dict[str, Any]) -> None:
    """Columns as `data.schema.pack` makes them."""
    name = stored["id"]
    assert found.keys() == stored.keys() and found["id"] == name
    for column in ("video_latents", "audio_mean", "audio_std"):  # below 1, as float16
        assert_close(f"{name}: {column}", found[column], stored[column], 1e-3)
    for column in ("video_text", "audio_text"):
        assert_close(f"{name}: {column}", _floats(found[column]), _floats(stored[column]), 0.03)
    for column in ("has_audio", "audio_text_mask"):
        assert_close(f"{name}: {column}", found[column], stored[column], 0)
    assert found["record"] == pytest.approx(stored["record"]), f"{name}: {CHANGED}"


def _floats(bits: np.ndarray) -> np.ndarray:
    """Of bfloat16's bits."""
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
