"""The joint model: function-preserving start, AVFull-Attention, parameter counts, gradients."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from model import AVFullDiT, AVFullDiTConfig
from model.joint import AVFullAttention
from model.towers.attention import QKV, Attention
from model.weights.load import new_parameter_names
from tests.support.models import towers


@pytest.fixture(scope="module")
def released():
    return towers.build_released()


@torch.no_grad()
@pytest.mark.parametrize("hop", [1000, 300], ids=["tau=1", "tau=3.3"])
def test_masked_video_equals_wan_at_any_tau(released, hop):
    wan, tangoflux = released
    model = towers.fill(AVFullDiT(replace(towers.CONFIG, audio_hop=hop)), wan, tangoflux)
    inputs = towers.joint_inputs()
    velocity = model(**inputs, cross_modal=False)[0]
    expected = wan(
        inputs["noisy_video"], 1000 * inputs["t"], inputs["video_text"], return_dict=False
    )[0]
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_tau_changes_audio_and_cross_modality_changes_both(released):
    model = towers.fill(AVFullDiT(towers.CONFIG), *released)
    inputs = towers.joint_inputs()
    masked = model(**inputs, cross_modal=False)
    joint = model(**inputs)
    other_tau = towers.fill(AVFullDiT(replace(towers.CONFIG, audio_hop=300)), *released)
    assert (other_tau(**inputs, cross_modal=False)[1] - masked[1]).abs().max() > 1e-3
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(joint, masked, strict=True))


def test_three_slices_equal_one_masked_call():
    torch.manual_seed(0)
    num_video, num_audio, num_text = 12, 10, 6
    video = QKV(*torch.randn(3, 2, num_video, 4, 16))
    stream = QKV(*torch.randn(3, 2, num_audio + num_text, 4, 16))
    kind = torch.tensor([0] * num_video + [1] * num_audio + [2] * num_text)  # V, A, T
    sees = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    mask = sees[kind][:, kind]  # (L, L)
    q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(video, stream, strict=True))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    outputs = AVFullAttention(Attention("sdpa"))(video, stream, num_audio, cross_modal=True)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-6, rtol=0)


def test_parameter_counts_of_the_released_shapes():
    with torch.device("meta"):
        joint, video = AVFullDiT(AVFullDiTConfig()), AVFullDiT(AVFullDiTConfig(task="t2v"))

    def count(model, wanted=lambda name: True):
        return sum(p.numel() for name, p in model.named_parameters() if wanted(name))

    new = new_parameter_names(joint)
    extra = ("audio.fc.", "audio.duration_embedder.")
    assert count(joint) == 5_668_902_784
    assert count(video) == 4_999_787_712
    assert count(joint, lambda name: name in new) == 151_105_536
    assert count(joint, lambda name: name not in new) - count(video) - count(
        joint, lambda name: name.startswith(extra)) == 516_695_616
    assert AVFullDiTConfig().avsync_tau == pytest.approx(3.588867, abs=1e-6)


def test_every_parameter_gets_a_gradient(released):
    """The new q is the only one without at first: it acts through the new v and o, both zero."""
    model = towers.fill(AVFullDiT(towers.CONFIG), *released)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        sum(velocity.square().mean() for velocity in model(**towers.joint_inputs())).backward()
        silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        expected = {n for n in new_parameter_names(model) if ".to_q." in n} if step == 0 else set()
        assert silent == expected
        optimizer.step()


def test_initialisation_of_the_new_weights():
    torch.manual_seed(0)
    model = AVFullDiT(towers.CONFIG)
    for name in new_parameter_names(model):
        parameter = model.get_parameter(name)
        if name.endswith("new_weight") and (".to_q." in name or ".to_k." in name):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
        else:
            assert not parameter.any()


@pytest.mark.parametrize("config", [towers.T2V, towers.EARLY_SINGLE], ids=["t2v", "t2av"])
def test_recompute_changes_nothing(released, config):
    inputs = towers.video_inputs() if config.task == "t2v" else towers.joint_inputs()
    gradients = []
    for recompute in ("none", "full"):
        torch.manual_seed(3)
        model = AVFullDiT(config, recompute=recompute)
        towers.randomise_new(towers.fill(model, *released))
        sum(v.square().mean() for v in model(**inputs) if v is not None).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(released):
    model = towers.randomise_new(towers.fill(AVFullDiT(towers.CONFIG), *released))
    inputs = towers.joint_inputs(3)
    together = model(**inputs)
    for index in range(3):
        alone = model(**{key: value[index:index + 1] for key, value in inputs.items()})
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[index], atol=1e-5, rtol=0)


def test_no_buffers():
    """zero.Init turns float32 buffers into bfloat16, and RoPE angles must not be."""
    assert not list(AVFullDiT(towers.CONFIG).buffers())


def test_inputs_must_match_the_task(released):
    with pytest.raises(ValueError, match="task=t2av needs noisy_audio"):
        AVFullDiT(towers.CONFIG)(**towers.video_inputs())
    with pytest.raises(ValueError, match="task=t2v takes no audio inputs"):
        AVFullDiT(towers.T2V)(**towers.joint_inputs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "a2v"}, "model.task='a2v' is unknown; use t2av or t2v"),
        ({"audio": None}, "needs model.audio"),
        ({"num_joint_blocks": 4}, "num_joint_blocks=4 must be 1 to 3"),
        ({"audio_hop": 0}, "audio_hop=0 must be above 0"),
        ({"audio": replace(towers.AUDIO, num_attention_heads=4)}, "must be above"),
        (
            {"audio": replace(towers.AUDIO, attention_head_dim=8, axes_dims_rope=(2, 2, 4))},
            "must be equal",
        ),
    ],
)
def test_configs_that_cannot_work(change, message):
    with pytest.raises(ValueError, match=message):
        replace(towers.CONFIG, **change)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="recompute='some' is unknown"):
        AVFullDiT(towers.T2V, recompute="some")


def test_config_survives_its_dictionary():
    for config in (towers.CONFIG, towers.T2V):
        assert AVFullDiTConfig.from_dict(asdict(config)) == config
    with pytest.raises(ValueError, match="num_layer is not .* 'model.video.num_layers'"):
        AVFullDiTConfig.from_dict({"video": {"num_layer": 3}})
    with pytest.raises(TypeError, match="model.num_joint_blocks='18' is a str; give int"):
        AVFullDiTConfig.from_dict({"num_joint_blocks": "18"})
