"""Expanded projections: new columns and rows beside untouched pretrained ones (Eq. 6 and 9)."""

import torch
import torch.nn.functional as F

from model.towers.layers import DurationEmbedder, ExpandedLinear, SingleOutput, timestep_sinusoid


def test_expanded_columns_equal_one_wide_linear():
    torch.manual_seed(0)
    layer, x = ExpandedLinear(8, 16, new_std=0.5), torch.randn(2, 3, 8)
    wide = F.linear(
        x, torch.cat((layer.weight, layer.new_weight)), torch.cat((layer.bias, layer.new_bias))
    )
    torch.testing.assert_close(layer(x), wide)
    # Sliced back, the pretrained heads keep their bits.
    assert torch.equal(layer(x)[..., :8], F.linear(x, layer.weight, layer.bias))


def test_new_rows_go_between_attention_and_mlp_columns():
    torch.manual_seed(0)
    layer = SingleOutput(8, 32, new_dim=16)
    torch.nn.init.normal_(layer.new_weight)
    attended, hidden = torch.randn(2, 3, 24), torch.randn(2, 3, 32)
    weight = torch.cat((layer.weight[:, :8], layer.new_weight, layer.weight[:, 8:]), dim=1)
    expected = F.linear(torch.cat((attended, hidden), dim=-1), weight, layer.bias)
    torch.testing.assert_close(layer(attended, hidden), expected, atol=1e-5, rtol=1e-5)


def test_new_rows_start_silent():
    layer = SingleOutput(8, 32, new_dim=16)
    attended, hidden = torch.randn(2, 3, 24), torch.randn(2, 3, 32)
    plain = F.linear(torch.cat((attended[..., :8], hidden), dim=-1), layer.weight, layer.bias)
    assert torch.equal(layer(attended, hidden), plain)


def test_sinusoid_equals_a_float64_reference():
    t = torch.tensor([0.0, 0.1234, 0.997, 1.0])
    angles = 1000 * t.double()[:, None] * 10000.0 ** -(torch.arange(128).double() / 128)
    expected = torch.cat((angles.cos(), angles.sin()), dim=1)
    torch.testing.assert_close(timestep_sinusoid(t, 256).double(), expected, atol=1e-7, rtol=0)


def test_duration_is_clamped_and_bfloat16_keeps_its_angles():
    torch.manual_seed(0)
    embedder = DurationEmbedder(8, 30.0)
    tokens = embedder(torch.tensor([30.0, 99.0, 2.0417]))
    assert tokens.shape == (3, 1, 8)
    torch.testing.assert_close(tokens[0], tokens[1])
    features = embedder.frequencies(torch.tensor([2.0417]) / 30)
    assert features.shape == (1, 257) and features.dtype == torch.float32
    half = DurationEmbedder(8, 30.0).bfloat16()(torch.tensor([2.0]))
    assert half.dtype == torch.bfloat16
