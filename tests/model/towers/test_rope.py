"""RoPE tables against the released classes, and what AVSyncRoPE promises."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from model import AVFullDiTConfig
from model.towers.rope import audio_rope, rotate, video_axes, video_rope

CPU = torch.device("cpu")


def test_video_table_equals_wan():
    cos, sin = WanRotaryPosEmbed(128, (1, 2, 2), 64)(torch.empty(1, 48, 5, 6, 8))
    rope = video_rope(5, 3, 4, 128, CPU)
    assert video_axes(128) == (44, 42, 42)
    torch.testing.assert_close(rope.cos, cos[0, :, 0, 0::2], atol=1e-6, rtol=0)
    torch.testing.assert_close(rope.sin, sin[0, :, 0, 1::2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("tau", [1.0, 3.588867])
def test_audio_table_equals_flux_at_fractional_ids(tau):
    ids = (torch.arange(109, dtype=torch.float64) / tau)[:, None].expand(-1, 3)
    embed = FluxPosEmbed(10000, [16, 56, 56])
    cos, sin = embed(torch.cat((ids, torch.zeros(65, 3))))
    rope = audio_rope(109, 65, (16, 56, 56), tau, CPU)
    torch.testing.assert_close(rope.cos, cos[:, 0::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(rope.sin, sin[:, 0::2], atol=1e-5, rtol=0)


def test_angles_are_exact_and_float32():
    """Float64 reference by hand at the farthest position of a 30 s clip."""
    tau = AVFullDiTConfig().avsync_tau
    rope = audio_rope(645, 0, (16, 56, 56), tau, CPU)
    frequencies = torch.cat([
        10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim) for dim in (16, 56, 56)
    ])
    angles = 644 / tau * frequencies
    assert rope.cos.dtype == rope.sin.dtype == torch.float32
    torch.testing.assert_close(rope.cos[644].double(), angles.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(rope.sin[644].double(), angles.sin(), atol=1e-6, rtol=0)


def test_equal_time_is_equal_position():
    """Eq. 12: the audio latent at the time of video frame f is rotated like audio index f."""
    frames = audio_rope(13, 0, (16, 56, 56), 1.0, CPU)
    for tau in (2.0, 4.0):
        audio = audio_rope(49, 0, (16, 56, 56), tau, CPU)
        assert torch.equal(audio.cos[:: int(tau)][:13], frames.cos)


def test_text_is_not_rotated_and_rotation_keeps_dtype_and_norm():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 16)
    rope = audio_rope(5, 4, (4, 4, 8), 1.7, CPU)
    rotated = rotate(x, rope)
    assert torch.equal(rotated[:, 5:], x[:, 5:]) and not torch.equal(rotated[:, 1], x[:, 1])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), rope).dtype == torch.bfloat16


def test_tables_first_made_while_sampling_serve_training():
    with torch.inference_mode():
        rope = video_rope(7, 5, 3, 16, CPU)
    x = torch.randn(1, 105, 2, 16, requires_grad=True)
    rotate(x, rope).sum().backward()
    assert video_rope(7, 5, 3, 16, CPU) is rope and x.grad is not None


def test_tau_comes_from_rates():
    assert AVFullDiTConfig(sample_rate=16000, audio_hop=512).avsync_tau == pytest.approx(5.2083333)
