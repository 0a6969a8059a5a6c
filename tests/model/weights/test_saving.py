"""save_pretrained / from_pretrained: bit-equal, strict, and with torch and safetensors alone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import AVFullDiT
from model.weights.saving import SavedModelError
from tests.model.test_ablations import combinations
from tests.support.models import towers

ROOT = Path(__file__).parents[3]


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000])
def test_round_trip_is_bit_equal(tmp_path, dtype, max_shard_bytes):
    model = AVFullDiT(towers.CONFIG).to(dtype)
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    shards = sorted(tmp_path.glob("model*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 10**9) == (
        tmp_path / "model.safetensors.index.json").is_file()
    assert all(path.stat().st_size < max_shard_bytes + 50_000 for path in shards)
    again = AVFullDiT.from_pretrained(tmp_path)
    assert again.config == model.config and same(model, again)
    assert all(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        pairs = zip(model(**towers.joint_inputs()), again(**towers.joint_inputs()), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("fusion", ["full", "cross"])
def test_every_pair_of_switches_survives(tmp_path, fusion):
    """Every seventh combination of full fusion still has each pair of values of two switches."""
    for config in list(combinations(fusion))[:: 7 if fusion == "full" else 1]:
        model = AVFullDiT(config)
        model.save_pretrained(tmp_path)
        again = AVFullDiT.from_pretrained(tmp_path)
        assert again.config == config and same(model, again)


def test_t2v_state_and_dtype(tmp_path):
    model = AVFullDiT(towers.T2V)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state=state)
    again = AVFullDiT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.config.task == "t2v" and again.recompute == "none"
    assert all(torch.equal(value, state[name].bfloat16())
               for name, value in again.state_dict().items())


def test_a_smaller_save_leaves_no_stale_shard(tmp_path):
    AVFullDiT(towers.CONFIG).save_pretrained(tmp_path, max_shard_bytes=200_000)
    model = AVFullDiT(towers.CONFIG)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert same(model, AVFullDiT.from_pretrained(tmp_path))


def test_a_save_over_another_keeps_strangers_and_no_config_until_it_is_whole(
    tmp_path, monkeypatch
):
    model = AVFullDiT(towers.CONFIG)
    model.save_pretrained(tmp_path, max_shard_bytes=200_000)
    (tmp_path / "model_ema.safetensors").write_bytes(b"another's")
    written = []

    def full_disk(*arguments, **more):
        if written:
            raise OSError("No space left on device")
        written.append(save_file(*arguments, **more))

    monkeypatch.setattr("model.weights.saving.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path, max_shard_bytes=300_000)
    assert (tmp_path / "model_ema.safetensors").read_bytes() == b"another's"
    with pytest.raises(SavedModelError, match="config.json is not there"):
        AVFullDiT.from_pretrained(tmp_path)


def test_torch_and_safetensors_are_enough(tmp_path):
    AVFullDiT(towers.CONFIG).save_pretrained(tmp_path)
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"diffusers", "transformers", "huggingface_hub", "einops",
                                   "deepspeed", "streaming", "pydantic", "yaml", "av"}}:
            raise ImportError("only torch and safetensors: " + name)
sys.meta_path.insert(0, Refuse())
from model import AVFullDiT
model = AVFullDiT.from_pretrained({str(tmp_path)!r})
model.save_pretrained({str(tmp_path / "again")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)
    first, second = (load_file(folder / "model.safetensors")
                     for folder in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_does_not_fit_is_named(tmp_path):
    AVFullDiT(replace(towers.CONFIG, num_joint_blocks=1)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("video.proj_out.bias")
    tensors["surprise"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SavedModelError) as caught:
        AVFullDiT.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "surprise: model has none, file (3,)" in message
    assert "video.proj_out.bias: model (192,), file has none" in message
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(SavedModelError, match="unreadable safetensors file"):
        AVFullDiT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SavedModelError, match="has no model.safetensors"):
        AVFullDiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    with pytest.raises(SavedModelError, match="not of model_type 'avfulldit'"):
        AVFullDiT.from_pretrained(tmp_path)
    with pytest.raises(SavedModelError, match="config.json is not there"):
        AVFullDiT.from_pretrained(tmp_path / "absent")
