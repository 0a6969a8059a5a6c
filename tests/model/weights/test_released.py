"""Wan under its authors' names and in every arrangement of files, against diffusers' converter."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

import train
from model import AVFullDiT, AVFullDiTConfig, JointConfig
from model.weights.load import (
    PretrainedError,
    check_weights,
    iter_pretrained,
    load_pretrained,
    read_tower_configs,
)
from model.weights.names import diffusers_name
from tests.support.models import tiny, towers

ORIGINAL_CONFIG = {  # as in Wan-AI/Wan2.2-TI2V-5B; text_dim is left out there and is 4096
    "_class_name": "WanModel", "_diffusers_version": "0.33.0", "dim": 64, "eps": 1e-06,
    "ffn_dim": 128, "freq_dim": 256, "in_dim": 48, "model_type": "ti2v", "num_heads": 4,
    "num_layers": 4, "out_dim": 48, "text_len": 512, "text_dim": tiny.WIDTH,
}
INNER = {  # diffusers -> the authors' names inside a block
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "o", "norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
OUTER = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head", "scale_shift_table": "head.modulation",
}


def original(name):
    for ours, theirs in (INNER if name.startswith("blocks.") else OUTER).items():
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return tiny.write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def tangoflux(tmp_path_factory):
    return tiny.write_tangoflux(tmp_path_factory.mktemp("tangoflux"))


@pytest.fixture(scope="module")
def tensors(wan):
    return load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def authors(tensors, tmp_path):
    """The authors' folder: config.json, two shards and their index."""
    renamed = {original(name): tensor for name, tensor in tensors.items()}
    half = len(renamed) // 2
    weight_map = {}
    for number, names in enumerate((list(renamed)[:half], list(renamed)[half:]), start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: renamed[name] for name in names}, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    return tmp_path


def config_of(wan, tangoflux, task="t2av"):
    video, audio = read_tower_configs(wan, tangoflux)
    return AVFullDiTConfig(task=task, video=video, audio=audio, num_joint_blocks=2)


def test_names_agree_with_diffusers_own_converter(tensors):
    renamed = {original(name): tensor for name, tensor in tensors.items()}
    assert {diffusers_name(name) for name in renamed} == tensors.keys()
    converted = convert_wan_transformer_to_diffusers(dict(renamed))
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[diffusers_name(name)], tensor)
               for name, tensor in renamed.items())


def test_the_authors_folder_loads_like_diffusers(authors, wan, tangoflux):
    config = config_of(authors, tangoflux)
    # rope_max_seq_len is fixed in the authors' code and absent from their config.json.
    assert config.video.rope_max_seq_len == 1024 and config.video.attention_head_dim == 16
    theirs = dict(iter_pretrained(config, authors, tangoflux))
    ours = dict(iter_pretrained(config_of(wan, tangoflux), wan, tangoflux))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["diffusers", "transformer", "authors", "file", "single"])
def test_every_layout_equals_the_public_class(wan, authors, tensors, tangoflux, tmp_path, layout):
    """The same forward as WanTransformer3DModel's, whichever way the weights came."""
    single = tmp_path / "elsewhere"
    single.mkdir()
    renamed = {original(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, single / "wan2.2_ti2v_5B.safetensors")
    (single / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    source = {
        "diffusers": wan, "transformer": wan / "transformer", "authors": authors,
        "file": single / "wan2.2_ti2v_5B.safetensors", "single": single,
    }[layout]
    model = AVFullDiT(config_of(source, tangoflux, "t2v"))
    load_pretrained(model, source, None)
    inputs = towers.video_inputs()
    public = WanTransformer3DModel(**tiny.VIDEO_DIT).eval()
    public.load_state_dict(tensors)
    expected = public(inputs["noisy_video"], 1000 * inputs["t"], inputs["video_text"],
                      return_dict=False)[0]
    torch.testing.assert_close(model(**inputs)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"qk_norm": False}, "qk_norm must be true"), ({"num_heads": 5}, "dim=64 over num_heads"),
     ({"depth": 3}, "key depth is not understood")],
)
def test_authors_configs_that_do_not_fit(authors, tangoflux, change, message):
    (authors / "config.json").write_text(json.dumps(ORIGINAL_CONFIG | change))
    with pytest.raises(PretrainedError, match=message):
        read_tower_configs(authors, tangoflux)


def test_a_tensor_under_both_names_is_refused(authors, tangoflux):
    config = config_of(authors, tangoflux)
    path = authors / "diffusion_pytorch_model-00001-of-00002.safetensors"
    extra = {"head.head.bias": torch.zeros(192), "proj_out.bias": torch.zeros(192)}
    save_file(load_file(path) | extra, path)
    with pytest.raises(PretrainedError, match="wan: .* is in .* and "):
        next(iter_pretrained(config, authors, tangoflux))


def test_check_weights_reports_layout_and_every_difference(authors, tangoflux):
    joint = JointConfig(num_joint_blocks=2)
    fits, report = check_weights("t2av", joint, authors, tangoflux)
    assert fits and "2 shards in" in report and "names of the authors" in report
    assert "279,296 parameters" in report and "every name and shape fits the model" in report
    path = authors / "diffusion_pytorch_model-00001-of-00002.safetensors"
    tensors = {name: tensor[:1] for name, tensor in load_file(path).items()}
    save_file(tensors | {"surprise": torch.zeros(2)}, path)
    fits, report = check_weights("t2av", joint, authors, tangoflux)
    assert not fits and "wan: surprise: model has none, file (2,)" in report
    assert len(report.splitlines()) > 20  # all of them, not ten


def test_train_checks_weights_before_anything_else(authors, tangoflux, tmp_path, capsys):
    """No shards, no engine, no GPU: `python train.py CONFIG check=weights`."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\nwan: {authors}\ntangoflux: {tangoflux}\n"
        "data: {root: /nowhere}\nmodel: {num_joint_blocks: 3}\n"
    )
    assert train.main([str(path), "check=weights"]) == 0
    assert "every name and shape fits the model" in capsys.readouterr().out
    shard = authors / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file({"surprise": torch.zeros(2)}, shard)
    assert train.main([str(path), "check=weights"]) == 78
    assert "surprise: model has none, file (2,)" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
