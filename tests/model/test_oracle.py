"""The joint model against the float64 oracle, outputs and every gradient, for every combination."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from model import AVFullDiT
from tests.support.models import towers
from tests.support.models.oracle import Oracle

LAYOUTS = {"full": ("native", "hybrid", "wan"), "cross": ("native", "wan")}
COMBINATIONS = [
    (fusion, rope, layout, text)
    for fusion, rope, text in product(
        ("full", "cross"), ("shrink_audio", "expand_video", "vanilla"), ("masked", "stream"))
    for layout in LAYOUTS[fusion]
]


def build(**changes):
    """All 3 audio layers joint (one double, two single), tau 3.3, every weight random."""
    config = replace(towers.CONFIG, audio_hop=300, **{"num_joint_blocks": 3} | changes)
    torch.manual_seed(0)
    model = towers.fill(AVFullDiT(config), *towers.build_released())
    return towers.randomise_new(model)


def oracle_of(model):
    config = model.config
    parameters = {
        name: value.detach().double().requires_grad_() for name, value in model.named_parameters()
    }
    joint_single = min(config.num_joint_blocks, 2)
    return Oracle(
        parameters, fusion=config.fusion, rope=config.rope, layout=config.rope_layout,
        text=config.audio_text, tau=config.avsync_tau, head_dim=16, axes=(4, 4, 8),
        video_heads=4, audio_heads=2, num_video=4 - config.num_joint_blocks,
        num_double=1 - (config.num_joint_blocks - joint_single), num_single=2 - joint_single,
        num_joint=config.num_joint_blocks,
    )


def compare(model, bias=0.0):
    """Outputs and gradients of one random functional of them, on the second sample of a batch."""
    oracle = oracle_of(model)
    inputs = towers.joint_inputs()
    mine = model(**inputs, cross_modal_bias=bias)
    one = {key: value[1].double() for key, value in inputs.items()}
    theirs = oracle(
        one["noisy_video"], one["t"].item(), one["video_text"], one["noisy_audio"],
        one["audio_text"], inputs["audio_text_mask"][1].tolist(), one["duration"].item(), bias,
    )
    torch.manual_seed(9)
    weights = [torch.randn(out.shape, dtype=torch.float64) for out in theirs]
    for ours, expected in zip(mine, theirs, strict=True):
        assert error(ours[1], expected) < 1e-5
    sum((out[1] * w).sum() for out, w in zip(mine, weights, strict=True)).backward()
    sum((out * w).sum() for out, w in zip(theirs, weights, strict=True)).backward()
    for name, parameter in model.named_parameters():
        expected = oracle.p[name].grad
        assert expected is not None and expected.any(), name
        assert error(parameter.grad, expected) < 2e-4, name


def error(ours, expected):
    return ((ours.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("fusion", "rope", "layout", "text"), COMBINATIONS)
def test_every_combination_equals_the_oracle(fusion, rope, layout, text):
    compare(build(fusion=fusion, rope=rope, rope_layout=layout, audio_text=text))


@pytest.mark.parametrize("num_joint", [1, 2])
@pytest.mark.parametrize("fusion", ["full", "cross"])
def test_unimodal_blocks_before_the_joint_ones(fusion, num_joint):
    compare(build(fusion=fusion, num_joint_blocks=num_joint))


@pytest.mark.parametrize("text", ["masked", "stream"])
def test_cross_modal_bias(text):
    compare(build(audio_text=text, init="bias_warmup"), bias=-2.5)
