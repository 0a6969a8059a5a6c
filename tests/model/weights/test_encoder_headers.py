"""encoder_headers.py: damage to any encoder is found from its headers, absence is said."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from model.weights import encoder_headers
from model.weights.encoder_headers import check_encoders
from model.weights.hub import FLAN_T5_HUB_ID
from model.weights.released import PretrainedError
from tests.support.models import tiny


@pytest.fixture
def folders(tmp_path):
    return tiny.write_wan(tmp_path / "wan"), tiny.write_tangoflux(tmp_path / "tangoflux")


def test_whole_downloads_fit(folders):
    fits, lines = check_encoders("t2av", *folders)
    assert fits and len(lines) == 4 and all("parameters in" in line for line in lines)


def test_t2v_looks_at_wan_alone(folders):
    fits, lines = check_encoders("t2v", folders[0], "/nowhere")
    assert fits and [line.split(":")[0] for line in lines] == ["wan vae", "wan text_encoder"]


@pytest.mark.parametrize(
    ("file", "name", "encoder"),
    [
        ("wan/vae/diffusion_pytorch_model.safetensors", "quant_conv.bias", "wan vae"),
        ("wan/text_encoder/model.safetensors", "encoder.final_layer_norm.weight",
         "wan text_encoder"),
        ("tangoflux/vae.safetensors", "encoder.conv1.bias", "tangoflux vae"),
        ("tangoflux/tangoflux.safetensors", "text_encoder.encoder.final_layer_norm.weight",
         "tangoflux text_encoder"),
    ],
)
def test_a_missing_and_a_misshapen_tensor_are_named(folders, tmp_path, file, name, encoder):
    path = tmp_path / file
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    fits, lines = check_encoders("t2av", *folders)
    short = name.removeprefix("text_encoder.")
    shape = tuple(tensors[name].shape)
    assert not fits and f"  {encoder}: {short}: model {shape}, file has none" in lines
    save_file(tensors | {name: tensors[name][:1]}, path)
    fits, lines = check_encoders("t2av", *folders)
    assert not fits and f"  {encoder}: {short}: model {shape}, file (1,)" in lines


@pytest.fixture
def as_released(folders, monkeypatch):
    """config.json names Flan-T5 on the hub, which is not on this machine."""
    path = folders[1] / "config.json"
    config = json.loads(path.read_text()) | {"text_encoder_name": FLAN_T5_HUB_ID}
    path.write_text(json.dumps(config))
    values = json.loads((folders[1] / "text_encoder/config.json").read_text())
    monkeypatch.setattr(encoder_headers, "FLAN_T5_LARGE", values)
    shutil.rmtree(folders[1] / "text_encoder")

    def absent(source, allow_patterns, local_files_only):
        assert local_files_only  # a check of what is here downloads nothing
        raise OSError("not here")

    monkeypatch.setattr("model.weights.hub.snapshot_download", absent)
    return folders


def test_the_released_text_encoder_is_looked_at_without_the_hub(as_released):
    fits, lines = check_encoders("t2av", *as_released)
    assert fits and "parameters in" in lines[3] and "its tokenizer is not there" in lines[3]
    path = as_released[1] / "tangoflux.safetensors"
    tensors, name = load_file(path), "text_encoder.encoder.final_layer_norm.weight"
    save_file(tensors | {name: tensors[name][:1]}, path)
    fits, lines = check_encoders("t2av", *as_released)
    assert not fits and lines[4].endswith("final_layer_norm.weight: model (32,), file (1,)")


def test_flan_t5_large_has_its_published_size():
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**encoder_headers.FLAN_T5_LARGE))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 341_231_104


def test_absence_is_said_and_no_fault(folders):
    shutil.rmtree(folders[0] / "vae")
    fits, lines = check_encoders("t2av", *folders)
    assert fits and lines[0].startswith("wan vae: not there; train.py does without")


def test_a_damaged_config_is_one_line(folders):
    (folders[0] / "vae/config.json").write_text(json.dumps({"base_dim": "three"}))
    with pytest.raises(PretrainedError, match="wan vae: .*download it again") as caught:
        check_encoders("t2av", *folders)
    assert "\n" not in str(caught.value)
