"""The video tower against diffusers' WanTransformer3DModel on the same weights."""

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from model import AVFullDiT
from tests.support.models import towers


@pytest.fixture(scope="module")
def pair():
    wan, tangoflux = towers.build_released()
    return wan, towers.fill(AVFullDiT(towers.T2V), wan, tangoflux)


@torch.no_grad()
def test_velocity_equals_wan(pair):
    wan, model = pair
    inputs = towers.video_inputs()
    velocity, audio = model(**inputs)
    expected = wan(
        inputs["noisy_video"], 1000 * inputs["t"], inputs["video_text"], return_dict=False
    )[0]
    assert audio is None and velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("t", [0.0, 0.25, 0.75, 0.997, 1.0])
def test_any_difference_is_the_sinusoid(pair, monkeypatch, t):
    """diffusers' float32 sinusoid is off by up to 6e-5 rad near t = 1; ours is Wan's float64."""
    wan, model = pair
    inputs = towers.video_inputs() | {"t": torch.full((2,), t)}
    expected = wan(
        inputs["noisy_video"], 1000 * inputs["t"], inputs["video_text"], return_dict=False
    )[0]
    torch.testing.assert_close(model(**inputs)[0], expected, atol=3e-5, rtol=0)
    monkeypatch.setattr(
        "model.towers.video_dit.timestep_sinusoid",
        lambda t, dim: get_timestep_embedding(1000 * t, dim, True, 0),
    )
    torch.testing.assert_close(model(**inputs)[0], expected, atol=2e-6, rtol=0)


@torch.no_grad()
def test_one_t_per_sample_equals_wans_equal_t_per_token(pair):
    wan, model = pair
    inputs = towers.video_inputs()
    per_token = (1000 * inputs["t"])[:, None].expand(-1, 3 * 2 * 3)
    expected = wan(inputs["noisy_video"], per_token, inputs["video_text"], return_dict=False)[0]
    torch.testing.assert_close(model(**inputs)[0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_bfloat16_weights_take_float32_inputs(pair):
    _, model = pair
    inputs = towers.video_inputs()
    half = AVFullDiT(towers.T2V).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    velocity = half(**inputs)[0]
    expected = model(**inputs)[0]
    assert velocity.dtype == torch.float32
    assert (velocity - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("shape", [(1, 47, 3, 4, 6), (1, 48, 3, 5, 6), (1, 48, 65, 2, 2)])
def test_wrong_latents_are_named(pair, shape):
    inputs = towers.video_inputs(1) | {"noisy_video": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"noisy_video has shape .* must be \(B, 48, T, H, W\)"):
        pair[1](**inputs)


def test_t_must_be_one_per_sample(pair):
    with pytest.raises(ValueError, match=r"t has shape \(1,\); it must be \(2,\)"):
        pair[1](**towers.video_inputs() | {"t": torch.zeros(1)})
