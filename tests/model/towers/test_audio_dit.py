"""The audio tower against diffusers' Flux class with TangoFlux's inputs, on the same weights."""

import pytest
import torch

from model import AudioDiTConfig, AVFullDiT
from tests.support.models import towers


@pytest.fixture(scope="module")
def released():
    return towers.build_released()


@pytest.mark.parametrize("config", [towers.CONFIG, towers.EARLY_SINGLE], ids=["all", "one"])
@torch.no_grad()
def test_velocity_equals_tangoflux(released, config):
    """With V <-> A masked and tau 1, even though new heads compute, W_an^o = 0 mutes them."""
    wan, tangoflux = released
    model = towers.fill(AVFullDiT(config), wan, tangoflux)
    inputs = towers.joint_inputs()
    velocity = model(**inputs, cross_modal=False)[1]
    expected = tangoflux(
        inputs["noisy_audio"], inputs["t"], inputs["audio_text"], inputs["audio_text_mask"],
        inputs["duration"],
    )
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_mask_enters_only_the_pooled_mean(released):
    model = towers.fill(AVFullDiT(towers.CONFIG), *released)
    inputs = towers.joint_inputs()
    padded_row = inputs["audio_text"].clone()
    padded_row[1, 4] += 1.0  # a padded token is attended as pretrained, hence changes the output
    changed = model(**inputs | {"audio_text": padded_row})[1]
    original = model(**inputs)[1]
    assert torch.equal(changed[0], original[0]) and not torch.equal(changed[1], original[1])


def test_wrong_latents_are_named(released):
    model = AVFullDiT(towers.CONFIG)
    inputs = towers.joint_inputs() | {"noisy_audio": torch.zeros(2, 10, 5)}
    with pytest.raises(ValueError, match=r"noisy_audio has shape \(2, 10, 5\); it must be"):
        model(**inputs)


def test_rope_axes_must_fill_the_head():
    with pytest.raises(ValueError, match="add up to attention_head_dim=128"):
        AudioDiTConfig(axes_dims_rope=(16, 56, 54))
