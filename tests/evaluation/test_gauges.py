"""The gauges against the same quantities written out, and that looking changes nothing."""

from dataclasses import replace

import pytest
import torch

from evaluation.gauges import Gauges, attention_mass, rms
from model import AVFullDiT
from model.towers.attention import QKV
from model.weights.names import part_of
from tests.support.models.towers import CONFIG, T2V, joint_inputs, randomise_new, video_inputs


def brute_force(video, stream, num_audio, masked, bias):
    """Every probability of the whole matrix, one query and head at a time, in float64."""
    keys = torch.cat((video.key, stream.key), dim=1).double()
    kinds = ["v"] * video.key.shape[1] + ["a"] * num_audio
    kinds += ["t"] * (stream.key.shape[1] - num_audio)
    found = {"a": [], "v": []}  # of the query's kind
    for sample in range(keys.shape[0]):
        for kind, other, queries in (("a", "v", stream.query[sample, :num_audio]),
                                     ("v", "a", video.query[sample])):
            mass = []
            for query in queries.double():
                for head in range(query.shape[0]):
                    logits = [float(query[head] @ keys[sample, index, head]) / 4.0
                              for index in range(len(kinds))]
                    seen = [not (kind == "v" and masked and k == "t") for k in kinds]
                    across = [k != kind and (k != "t" or kind == "v") for k in kinds]
                    weights = [
                        torch.tensor(logit + bias * x).exp().item() if s else 0.0
                        for logit, s, x in zip(logits, seen, across, strict=True)
                    ]
                    mass.append(sum(w for w, k in zip(weights, kinds, strict=True) if k == other)
                                / sum(weights))
            found[kind].append(sum(mass) / len(mass))
    return torch.tensor(found["a"]), torch.tensor(found["v"])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("bias", [0.0, -2.0])
def test_attention_mass_equals_a_brute_force_softmax(masked, bias):
    torch.manual_seed(0)
    video = QKV(*(torch.randn(2, 6, 3, 16) for _ in range(3)))
    stream = QKV(*(torch.randn(2, 7, 3, 16) for _ in range(3)))
    got = attention_mass(video, stream, 4, masked, bias)
    for value, expected in zip(got, brute_force(video, stream, 4, masked, bias), strict=True):
        assert value == pytest.approx(expected.numpy(), rel=1e-5)


@pytest.mark.parametrize("audio_text", ["masked", "stream"])
def test_mass_weighs_what_the_model_really_attends_to(audio_text):
    """With values that tell the modality, the attention's own output is the mass."""
    model = AVFullDiT(replace(CONFIG, audio_text=audio_text))
    torch.manual_seed(1)
    video = QKV(*(torch.randn(1, 6, 4, 16) for _ in range(2)), torch.ones(1, 6, 4, 16))
    value = torch.zeros(1, 7, 4, 16)
    value[:, :4] = 2.0
    stream = QKV(*(torch.randn(1, 7, 4, 16) for _ in range(2)), value)
    only = QKV(video.query, video.key, torch.zeros(1, 6, 4, 16))
    video_out, _ = model.joint_blocks[0].attention(only, stream, 4, True)
    _, heard = attention_mass(video, stream, 4, audio_text == "masked")
    assert video_out.mean() / 2 == pytest.approx(heard.item(), rel=1e-4)


@pytest.mark.parametrize("config", [CONFIG, T2V, replace(CONFIG, fusion="cross")])
def test_a_watched_forward_gives_the_same_bits_and_leaves_no_hook(config):
    torch.manual_seed(0)
    model = randomise_new(AVFullDiT(config)) if config.task == "t2av" else AVFullDiT(config)
    inputs = video_inputs() if config.task == "t2v" else joint_inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
        gauges = Gauges(model)
        with gauges.on(torch.tensor([True, True])):
            assert torch.equal(model(**inputs)[0], expected)
        before = {name: value.clone() for name, value in gauges.sums.items()}
        model(**inputs)
    assert all(torch.equal(gauges.sums[name], value) for name, value in before.items())
    layers = {name.split("/")[-1] for name in before if "attention" in name}
    assert layers == ({"layer00", "layer01"} if config.fusion == "full" and config.task == "t2av"
                      else set())
    assert "health/activation_video_tower" in before


def test_padding_does_not_count():
    torch.manual_seed(0)
    model, inputs = AVFullDiT(CONFIG), joint_inputs()
    both, first = Gauges(model), Gauges(model)
    with torch.no_grad():
        with both.on(torch.tensor([True, False])):
            model(**inputs)
        with first.on(torch.tensor([True])):
            model(**{key: value[:1] for key, value in inputs.items()})
    for name, value in first.sums.items():
        assert both.sums[name].numpy() == pytest.approx(value.numpy(), rel=1e-4), name


def test_rms():
    assert rms(torch.full((2, 3, 4), -3.0)).tolist() == [3.0, 3.0]


def test_parts_of_the_model():
    names = [name for name, _ in AVFullDiT(CONFIG).named_parameters()]
    parts = {name: part_of(name) for name in names}
    assert set(parts.values()) == {"video_tower", "audio_tower", "joint_new"}
    assert all((part == "joint_new") == ("new_" in name) for name, part in parts.items())
    for name, part in parts.items():
        if part != "joint_new":
            assert (part == "video_tower") == (name.startswith("video.") or ".video." in name)
    assert {part_of(name) for name, _ in AVFullDiT(T2V).named_parameters()} == {"video_tower"}
