"""Every ablation as config: all combinations build and learn, senseless ones are refused."""

import re
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from model import AVFullDiT, AVFullDiTConfig, JointConfig
from model.joint import AVFullAttention
from model.towers.attention import QKV, Attention
from model.variants import RENAMED
from model.weights.load import new_parameter_names
from model.weights.names import is_new, released_name
from tests.model.test_oracle import LAYOUTS
from tests.support.models import towers

ROPES = ("shrink_audio", "expand_video", "vanilla")
INITS = {"full": ("normal", "zero_output", "bias_warmup"), "cross": ("zero_output",)}


def combinations(fusion):
    for rope, text, num_joint in product(ROPES, ("masked", "stream"), (1, 2, 3)):
        for layout, init in product(LAYOUTS[fusion], INITS[fusion]):
            yield replace(
                towers.CONFIG, audio_hop=300, fusion=fusion, rope=rope, rope_layout=layout,
                audio_text=text, init=init, num_joint_blocks=num_joint,
            )


@pytest.mark.parametrize("fusion", ["full", "cross"])
def test_every_combination_builds_learns_and_keeps_its_config(fusion):
    inputs = towers.joint_inputs(1)
    wan, tangoflux = towers.build_released()
    every = {("wan", name) for name in wan.state_dict()}
    every |= {("tangoflux", name) for name in tangoflux.state_dict()}
    for config in combinations(fusion):
        torch.manual_seed(0)
        model = AVFullDiT(config)
        outputs = model(**inputs, cross_modal_bias=config.cross_modal_bias(10))
        sum(out.square().mean() for out in outputs).backward()
        grads = [parameter.grad for parameter in model.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads), config
        assert AVFullDiTConfig.from_dict(asdict(config)) == config
        released = {released_name(name, config) for name, _ in model.named_parameters()
                    if not is_new(name)}
        assert released == every, config  # whatever became of a block, it has a place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "half"}, "model.fusion='half' is unknown; use one of full, cross"),
        ({"rope": "stretch"}, "model.rope='stretch' is unknown"),
        ({"init": "I3"}, "model.init='I3' is unknown; use one of normal, zero_output, bias_warmup"),
        ({"fusion": "cross", "rope_layout": "hybrid"}, "has no new heads; use native or wan"),
        ({"fusion": "cross", "init": "bias_warmup"},
         "always starts from a zero output; use init=zero_output"),
        ({"bias_steps": 10},
         "bias_steps=10 has no effect with model.init=zero_output; use init=bias_warmup"),
        ({"init": "bias_warmup", "bias_start": 1.0}, "bias_start=1.0 must not be above 0"),
        ({"num_joint_blocks": 0}, "num_joint_blocks=0 must be at least 1"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message):
        JointConfig(**change)


@pytest.mark.parametrize(("code", "word"), RENAMED["init"].items())
def test_a_code_is_refused_with_its_word_and_read_from_old_files(code, word):
    with pytest.raises(ValueError, match=f"model.init={code} is called {word} now"):
        JointConfig(init=code)
    assert AVFullDiTConfig.from_dict({"init": code}).init == word


def test_old_configs_mean_what_they_meant():
    """A model.json written before the ablations existed is the default of each."""
    old = {"task": "t2av", "num_joint_blocks": 2, "fps": 24.0}
    new = AVFullDiTConfig.from_dict(old)
    assert (new.fusion, new.rope, new.rope_layout, new.audio_text, new.init) == (
        "full", "shrink_audio", "native", "masked", "zero_output")


def test_the_bias_rises_to_exactly_nothing():
    config = JointConfig(init="bias_warmup", bias_start=-8.0, bias_steps=4)
    assert [config.cross_modal_bias(step) for step in range(6)] == [-8, -6, -4, -2, 0, 0]
    assert JointConfig().cross_modal_bias(0) == 0
    model = AVFullDiT(replace(towers.CONFIG, init="bias_warmup"))
    inputs = towers.joint_inputs()
    with torch.no_grad():
        last = model(**inputs, cross_modal_bias=config.cross_modal_bias(4))
        assert all(torch.equal(a, b) for a, b in zip(last, model(**inputs), strict=True))


@pytest.mark.parametrize("text", ["masked", "stream"])
def test_a_strong_bias_gives_the_two_towers(text):
    """At -10 the outputs are the backbones' up to e^-10 of the mass."""
    model = AVFullDiT(replace(towers.CONFIG, init="bias_warmup", audio_text=text))
    inputs = towers.joint_inputs()
    with torch.no_grad():
        alone = model(**inputs, cross_modal=False)
        for bias, most in ((-10.0, 2e-3), (-40.0, 1e-6)):
            for a, b in zip(model(**inputs, cross_modal_bias=bias), alone, strict=True):
                assert (a - b).norm() / b.norm() < most


def test_stream_is_one_unmasked_attention():
    torch.manual_seed(0)
    video, stream = QKV(*torch.randn(3, 2, 12, 4, 16)), QKV(*torch.randn(3, 2, 16, 4, 16))
    union = [torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(video, stream, strict=True)]
    expected = scaled_dot_product_attention(*union).transpose(1, 2)
    outputs = AVFullAttention(Attention("sdpa"), "stream")(video, stream, 10, cross_modal=True)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-6, rtol=0)


def test_i0_is_random_throughout_and_i1_is_not():
    for init, zero in (("normal", False), ("zero_output", True)):
        torch.manual_seed(0)
        model = AVFullDiT(replace(towers.CONFIG, init=init, num_joint_blocks=3))
        names = {n for n in new_parameter_names(model) if n.endswith("new_weight")}
        outputs = {n for n in names if "to_q" not in n and "to_k" not in n
                   and "add_q" not in n and "add_k" not in n}
        assert len(outputs) == 2 * 2 + 4  # v and output of two single blocks, twice of the double
        assert all(bool(model.get_parameter(n).any()) != zero for n in outputs)
        assert all(0.015 < model.get_parameter(n).std() < 0.025 for n in names - outputs)


def test_the_cross_baseline_starts_as_the_two_towers():
    model = AVFullDiT(replace(towers.CONFIG, fusion="cross"))
    inputs = towers.joint_inputs()
    with torch.no_grad():
        pairs = zip(model(**inputs), model(**inputs, cross_modal=False), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("change", "new"),
    [
        ({"num_joint_blocks": 12}, 100_737_024),
        ({"num_joint_blocks": 18}, 151_105_536),
        ({"num_joint_blocks": 24}, 251_842_560),
        ({"num_joint_blocks": 1}, 8_394_752),
        ({"fusion": "cross"}, 604_283_904),
        ({"fusion": "cross", "num_joint_blocks": 24}, 805_711_872),
    ],
)
def test_parameter_counts_of_every_variant(change, new):
    with torch.device("meta"):
        model = AVFullDiT(AVFullDiTConfig(**change))
    names = new_parameter_names(model)
    added = sum(p.numel() for name, p in model.named_parameters() if name in names)
    total = sum(p.numel() for p in model.parameters())
    assert (added, total - added) == (new, 4_999_787_712 + 516_695_616 + 1_313_920)


def test_the_page_states_these_counts():
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
    for change in ({"num_joint_blocks": 12}, {}, {"num_joint_blocks": 24}, {"fusion": "cross"},
                   {"fusion": "cross", "num_joint_blocks": 24}):
        with torch.device("meta"):
            model = AVFullDiT(AVFullDiTConfig(**change))
        names = new_parameter_names(model)
        added = sum(p.numel() for name, p in model.named_parameters() if name in names)
        total = sum(p.numel() for p in model.parameters())
        assert re.search(rf"\|\W*{added:,}\W*\|\W*{total:,}\W*\|", page), change
