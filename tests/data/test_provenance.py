"""data/provenance.py: fingerprints follow the weights, and a mix-up is refused in one line."""

import dataclasses
import json
import shutil

import pytest
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from data.provenance import check_provenance, encoder_fingerprints
from data.schema import DataError, load_metadata
from model.weights.hub import SAMPLED
from tests.support.inputs import prepared
from tests.support.models import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return tiny.write_wan(root / "wan"), tiny.write_tangoflux(root / "tangoflux")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory, folders):
    """dataset.json of a data set that was encoded with `folders`."""
    root = prepared.write_shards(tmp_path_factory.mktemp("data"), train=1, validation=1)
    settings = {"audio_pad_seconds": 0.0, "silence_dbfs": -60.0, "encoding_version": 1,
                "manifest": "1"}
    return dataclasses.replace(
        load_metadata(root), fingerprints=encoder_fingerprints(*map(str, folders)),
        settings=settings,
    )


def change(path, name, where=0):
    """Add 1 to one number of one tensor."""
    tensors = load_file(path)
    tensors[name].view(-1)[where] += 1
    save_file(tensors, path)


def test_fingerprints_follow_the_weights_not_the_files(folders, tmp_path):
    before = encoder_fingerprints(*map(str, folders))
    wan, tangoflux = (shutil.copytree(folder, tmp_path / folder.name) for folder in folders)
    sharded = AutoencoderKLWan.from_pretrained(wan / "vae")
    (wan / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    sharded.save_pretrained(wan / "vae", max_shard_size="100KB")
    assert len(list((wan / "vae").glob("*.safetensors"))) > 1
    assert encoder_fingerprints(wan, tangoflux) == before
    change(tangoflux / "tangoflux.safetensors", "fc.0.bias")  # not part of the text encoder
    assert encoder_fingerprints(wan, tangoflux) == before


@pytest.mark.parametrize(
    ("encoder", "name", "edit"),
    [
        ("video_vae", "wan/vae/config.json", {"latents_mean": [0.0] * 48}),
        ("audio_vae", "tangoflux/vae.safetensors", "encoder.conv1.bias"),
        ("audio_text", "tangoflux/tangoflux.safetensors", "text_encoder.shared.weight"),
        ("video_text", "wan/text_encoder/model.safetensors", "shared.weight"),
        ("video_text", "wan/tokenizer/tokenizer_config.json", {"extra": 1}),
    ],
)
def test_each_encoder_has_its_own_fingerprint(folders, tmp_path, encoder, name, edit):
    before = encoder_fingerprints(*map(str, folders))
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
    path = tmp_path / name
    if isinstance(edit, str):
        change(path, edit, where=-1)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    after = encoder_fingerprints(str(tmp_path / "wan"), str(tmp_path / "tangoflux"))
    assert {key for key in before if before[key] != after[key]} == {encoder}


def test_the_middle_of_a_large_tensor_is_sampled(folders, tmp_path):
    wan, tangoflux = (shutil.copytree(folder, tmp_path / folder.name) for folder in folders)
    path = wan / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name, tensor = max(tensors.items(), key=lambda item: item[1].numel())
    assert tensor.numel() * 4 > 3 * SAMPLED  # so that not all of it is read
    before = encoder_fingerprints(wan, tangoflux)
    change(path, name, where=tensor.numel() // 2)
    assert encoder_fingerprints(wan, tangoflux)["video_vae"] != before["video_vae"]


def test_the_right_folders_pass_in_silence(folders, metadata):
    assert check_provenance({"a": metadata, "b": metadata}, *map(str, folders)) == []


@pytest.mark.parametrize("name", ["video_vae", "audio_vae", "video_text", "audio_text"])
def test_another_encoder_is_refused(folders, metadata, name):
    other = dataclasses.replace(metadata, fingerprints=metadata.fingerprints | {name: "0" * 64})
    with pytest.raises(DataError) as error:
        check_provenance({"shards": other}, *map(str, folders))
    line = str(error.value)
    key = "wan" if name.startswith("video") else "tangoflux"
    assert f"data.root=shards: fingerprints.{name}=000000000000, but {key}=" in line
    assert metadata.fingerprints[name][:12] in line and "\n" not in line
    assert "data.prepare again" in line


def test_encoders_that_are_not_here_are_said_not_skipped(folders, metadata, tmp_path):
    wan = tmp_path / "wan"
    shutil.copytree(folders[0] / "transformer", wan / "transformer")
    notes = check_provenance({"shards": metadata}, str(wan), "declare-lab/TangoFlux")
    assert len(notes) == 4
    assert any("no vae on this machine; that video_vae encoded" in note for note in notes)
    assert any("declare-lab/TangoFlux: not on this machine; that audio_vae" in n for n in notes)
    assert check_provenance({"shards": metadata}, str(folders[0]), None) == []  # task t2v


def test_a_damaged_encoder_is_one_line(folders, metadata, tmp_path):
    wan = shutil.copytree(folders[0], tmp_path / "wan")
    path = wan / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="wan.*vae.*download it again") as error:
        check_provenance({"shards": metadata}, str(wan), str(folders[1]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"), [("fps", 25.0), ("sample_rate", 44100), ("latents_mean", [0.0] * 48),
                         ("video_text_length", 512)],
)
def test_roots_of_one_run_must_agree(folders, metadata, field, value):
    other = dataclasses.replace(metadata, **{field: value})
    with pytest.raises(DataError) as error:
        check_provenance({"one": metadata, "two": other}, *map(str, folders))
    assert f"{field}=" in str(error.value) and "in one" in str(error.value)
    assert "in two" in str(error.value) and "\n" not in str(error.value)


def test_shapes_may_differ_and_filters_are_said(folders, metadata):
    other = dataclasses.replace(
        metadata, frames=121, settings=metadata.settings | {"silence_dbfs": -50.0, "manifest": "2"}
    )
    notes = check_provenance({"one": metadata, "two": other}, *map(str, folders))
    assert notes == ["data.root: silence_dbfs=-60.0 in one, -50.0 in two"]
    padded = dataclasses.replace(
        metadata, settings=metadata.settings | {"audio_pad_seconds": 30.0}
    )
    with pytest.raises(DataError, match="audio_pad_seconds=0.0 in one, 30.0 in two"):
        check_provenance({"one": metadata, "two": padded}, *map(str, folders))


def test_data_without_fingerprints_are_said(folders, metadata):
    bare = dataclasses.replace(metadata, fingerprints={})
    notes = check_provenance({"shards": bare}, *map(str, folders))
    assert len(notes) == 4 and all("has no fingerprint" in note for note in notes)
