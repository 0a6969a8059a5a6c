"""Defects of DeepSpeed that we work around, in DeepSpeed itself: one that fails here is gone.

The numbers are those of the list in docs/development.md. Checkpoints:
tests/training/checkpoint/test_library_checkpoint.py.
"""

import json

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from tests.support.launch import run_ranks

MICRO = {"train_micro_batch_size_per_gpu": 1}


@pytest.mark.parametrize("values", [
    {"zero_optimisation": {"stage": 3}},
    {"gradient_cliping": 5.0},
    {"checkpoint": {"load_universl": True}},
    {"optimizer": {"type": "AdamW", "params": {"lrr": 1}}},
    {"scheduler": {"type": "NoSuchSchedule"}},
    {"gradient_clipping": -1},
    {"torch_autocast": {"enabled": "true"}},
    {"data_types": {"grad_accum_dtyp": "fp32"}},
    {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
])
def test_f37_typos_are_accepted(values):
    """A run would train with the defaults; training.ds_config refuses each."""
    assert DeepSpeedConfig(MICRO | values).zero_optimization_stage in (0, 2)


def test_f37_a_typo_in_zero_optimization_trains_at_stage_0():
    made = DeepSpeedConfig(MICRO | {"zero_optimisation": {"stage": 3}})
    assert made.zero_optimization_stage == 0


def test_f37_inside_its_models_typos_are_refused():
    with pytest.raises(ValidationError):
        DeepSpeedConfig(MICRO | {"zero_optimization": {"stge": 3}})


def test_f37_clipping_is_on_by_default():
    assert DeepSpeedConfig(dict(MICRO)).gradient_clipping == 1.0


def test_f39_outside_a_job_its_world_is_1():
    """A batch that is right for 8 ranks is refused on a login node: we do the arithmetic."""
    with pytest.raises(AssertionError):
        DeepSpeedConfig(MICRO | {"train_batch_size": 8, "gradient_accumulation_steps": 1})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    run_ranks(2, "tests/support/workers/library_engine_worker.py", str(folder))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_f13_client_state_sets_the_engine_and_is_rank_0s(found):
    """Our manifest is not client_state, and nothing of it is per rank."""
    assert found["client_state"] == {"global_steps": 999, "ranks": [0, 0]}


@pytest.mark.slow
def test_f14_a_nan_reaches_the_weights_where_deepspeed_does_not_look(found):
    """training.engine.SkippingAdamW at stage 0; training.ds_config refuses the switch."""
    assert not found["nan_stage0_fp32"] and not found["nan_stage2_unchecked"]
    assert found["nan_stage2_bf16"]  # what we rely on


@pytest.mark.slow
def test_f35_tensorboard_has_no_loss(found):
    assert "Train/Samples/lr" in found["tensorboard"]
    assert not [tag for tag in found["tensorboard"] if "loss" in tag.lower()]
