"""Released folders -> our model -> released folders, strictly and bit for bit."""

import json
import shutil
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from model import AVFullDiT, AVFullDiTConfig
from model.weights.hub import open_weights
from model.weights.load import (
    PretrainedError,
    export_tangoflux,
    export_wan,
    iter_pretrained,
    load_pretrained,
    new_parameter_names,
    read_tower_configs,
)
from tests.support.models import tiny, towers


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return tiny.write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def tangoflux(tmp_path_factory):
    return tiny.write_tangoflux(tmp_path_factory.mktemp("tangoflux"))


@pytest.fixture
def broken(wan, tmp_path):
    """A copy of Wan's transformer whose tensors a test may change."""
    shutil.copytree(wan / "transformer", tmp_path / "wan" / "transformer")
    return tmp_path / "wan"


def wan_file(folder):
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def build(wan, tangoflux, task="t2av"):
    video, audio = read_tower_configs(wan, tangoflux)
    return AVFullDiT(AVFullDiTConfig(task=task, video=video, audio=audio, num_joint_blocks=2))


def test_configs_come_from_the_folders(wan, tangoflux):
    video, audio = read_tower_configs(wan, tangoflux)
    assert video == towers.VIDEO
    assert (audio.num_single_layers, audio.audio_seq_len, audio.max_duration) == (2, 40, 30.0)


@pytest.mark.parametrize("task", ["t2av", "t2v"])
def test_round_trip_is_bit_equal(wan, tangoflux, tmp_path, task):
    model = build(wan, tangoflux, task)
    load_pretrained(model, wan, tangoflux if task == "t2av" else None)
    state = model.state_dict()
    export_wan(state, model.config, tmp_path)
    assert_same_tensors(wan_file(wan), wan_file(tmp_path))
    config = WanTransformer3DModel.load_config(tmp_path / "transformer")
    WanTransformer3DModel.from_config(config).load_state_dict(load_file(wan_file(tmp_path)))
    if task == "t2av":
        released = load_file(tangoflux / "tangoflux.safetensors")
        text_encoder = {k: v for k, v in released.items() if k.startswith("text_encoder.")}
        export_tangoflux(state, model.config, tmp_path, text_encoder, {"vae": tiny.AUDIO_VAE})
        assert_same_tensors(tangoflux / "tangoflux.safetensors", tmp_path / "tangoflux.safetensors")
        assert read_tower_configs(tmp_path, tmp_path) == (model.config.video, model.config.audio)


def assert_same_tensors(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_load_like_one_file(wan, tangoflux, tmp_path):
    sharded = tiny.write_wan(tmp_path / "wan", shards=True)
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    config = build(wan, tangoflux).config
    one, many = (dict(iter_pretrained(config, folder, tangoflux)) for folder in (wan, sharded))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    removed = sorted((sharded / "transformer").glob("*.safetensors"))[0]
    removed.unlink()
    with pytest.raises(PretrainedError, match=f"names {removed.name}, which is not there"):
        next(iter_pretrained(config, sharded, tangoflux))


def test_every_parameter_is_either_released_or_new(wan, tangoflux):
    model = build(wan, tangoflux)
    loaded = {name for name, _ in iter_pretrained(model.config, wan, tangoflux)}
    new = new_parameter_names(model)
    assert loaded | new == dict(model.named_parameters()).keys() and not loaded & new
    assert new == {
        f"joint_blocks.{i}.audio.{name}" for i in range(2) for name in (
            "attn.to_q.new_weight", "attn.to_q.new_bias", "attn.to_k.new_weight",
            "attn.to_k.new_bias", "attn.to_v.new_weight", "attn.to_v.new_bias",
            "proj_out.new_weight")
    }


def test_new_weights_keep_their_own_start(wan, tangoflux):
    torch.manual_seed(0)
    model = build(wan, tangoflux)
    before = {name: model.get_parameter(name).clone() for name in new_parameter_names(model)}
    load_pretrained(model, wan, tangoflux)
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in before)


def test_files_are_read_one_tensor_at_a_time(wan, tangoflux, monkeypatch):
    """Each is read when the one before it is written, and gone when the next comes."""
    reads, earlier = [], []

    class Counted:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            reads.append(name)
            return self.file.get_tensor(name)

    @contextmanager
    def open_counted(path):
        with open_weights(path) as file:
            yield Counted(file)

    def write(parameter, tensor):
        assert len(reads) == len(earlier) + 1
        assert sum(tensor() is not None for tensor in earlier) <= 1
        earlier.append(weakref.ref(tensor))

    monkeypatch.setattr("model.weights.released.open_weights", open_counted)
    load_pretrained(build(wan, tangoflux), wan, tangoflux, write=write)
    assert len(earlier) > 100


@torch.no_grad()
def test_velocity_equals_tangoflux_loaded_from_its_file(wan, tangoflux):
    """From the released file through the names of both sides; tau is 1."""
    video, audio = read_tower_configs(wan, tangoflux)
    model = AVFullDiT(replace(towers.CONFIG, video=video, audio=audio))
    load_pretrained(model, wan, tangoflux)
    tensors = load_file(tangoflux / "tangoflux.safetensors")
    released = towers.TangoFlux().eval()
    released.load_state_dict(
        {name: value for name, value in tensors.items() if not name.startswith("text_encoder.")})
    inputs = towers.joint_inputs()
    expected = released(*(inputs[key] for key in (
        "noisy_audio", "t", "audio_text", "audio_text_mask", "duration")))
    velocity = model(**inputs, cross_modal=False)[1]
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


def test_one_error_lists_missing_extra_and_misshapen(broken, wan, tangoflux):
    tensors = load_file(wan_file(broken))
    tensors.pop("proj_out.bias")
    tensors["blocks.0.attn1.to_q.weight"] = torch.zeros(64, 63)
    tensors["blocks.9.surprise"] = torch.zeros(3)
    save_file(tensors, wan_file(broken))
    model = build(wan, tangoflux)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PretrainedError) as caught:
        load_pretrained(model, broken, tangoflux)
    message = str(caught.value)
    assert message.startswith("3 tensors of wan=") and "\n" not in message
    assert "wan: proj_out.bias: model (192,), file has none" in message
    assert "wan: blocks.0.attn1.to_q.weight: model (64, 64), file (64, 63)" in message
    assert "wan: blocks.9.surprise: model has none, file (3,)" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_the_first_ten_are_listed(broken, wan, tangoflux):
    save_file({"other": torch.zeros(1)}, wan_file(broken))
    with pytest.raises(PretrainedError) as caught:
        load_pretrained(build(wan, tangoflux), broken, tangoflux)
    message = str(caught.value)
    assert len(message.splitlines()) == 1  # what a terminal and a log line can show
    total = int(message.split()[0])
    assert message.count("; wan: ") == 9 and message.count(": model ") == 10
    assert message.endswith(f"; and {total - 10} more")


def test_a_file_that_is_cut_short(broken, wan, tangoflux):
    wan_file(broken).write_bytes(wan_file(broken).read_bytes()[:100])
    with pytest.raises(PretrainedError, match="is not a readable safetensors file"):
        load_pretrained(build(wan, tangoflux), broken, tangoflux)


def test_an_index_that_names_no_shards(wan, tangoflux, tmp_path):
    sharded = tiny.write_wan(tmp_path / "wan", shards=True)
    [index] = (sharded / "transformer").glob("*.index.json")
    index.write_text("{}")
    with pytest.raises(PretrainedError, match="index.json has no 'weight_map'; download"):
        load_pretrained(build(wan, tangoflux), sharded, tangoflux)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qk_norm", "layer_norm", "qk_norm must be 'rms_norm_across_heads'"),
        ("image_dim", 1280, "image_dim must be None"),
        ("num_blocks", 3, "num_blocks is not a known key"),
        ("ffn_dim", "128", "ffn_dim='128' is a str"),
        ("ffn_dim", None, "ffn_dim=None is a NoneType"),
    ],
)
def test_configs_that_do_not_fit(broken, tangoflux, key, value, message):
    path = broken / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(PretrainedError, match=message):
        read_tower_configs(broken, tangoflux)


def test_folders_that_are_not_there(wan, tmp_path):
    with pytest.raises(PretrainedError, match="wan=.*no such folder"):
        read_tower_configs(tmp_path / "absent", wan)
    with pytest.raises(PretrainedError, match="tangoflux.safetensors"):
        read_tower_configs(wan, wan)


def test_export_needs_the_whole_state(wan, tangoflux, tmp_path):
    model = build(wan, tangoflux, "t2v")
    with pytest.raises(PretrainedError, match="wan cannot be exported without .* tensors"):
        export_wan({}, model.config, tmp_path)
