"""model/encoder_headers.py: damage to any encoder is found from its headers, absence is said."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from model.encoder_headers import check_encoders
from model.released import PretrainedError
from tests import tiny


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


def test_absence_is_said_and_no_fault(folders):
    shutil.rmtree(folders[0] / "vae")
    fits, lines = check_encoders("t2av", *folders)
    assert fits and lines[0].startswith("wan vae: not there; train.py does without")


def test_a_damaged_config_is_one_line(folders):
    (folders[0] / "vae/config.json").write_text(json.dumps({"base_dim": "three"}))
    with pytest.raises(PretrainedError, match="wan vae: .*download it again") as caught:
        check_encoders("t2av", *folders)
    assert "\n" not in str(caught.value)
