"""data/inspect.py and data/verify.py on good and damaged data sets."""

import dataclasses
import json
import shutil

import av
import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter

from data.clips.decode import CutSpec, read_cut
from data.inspect import main as inspect
from data.prepare import Encoders, prepare
from data.schema import HASH, DataError, columns, load_metadata, save_metadata
from data.stored import iter_samples
from data.verify import main as verify
from tests.support.inputs import prepared
from tests.support.kills import prepare_kills
from tests.support.models import tiny


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return str(tiny.write_wan(root / "wan")), str(tiny.write_tangoflux(root / "tangoflux"))


@pytest.fixture(scope="module")
def good(tmp_path_factory, weights):
    """A data set that `data.prepare` wrote: 10 train, 2 validation, in shards of 4 clips."""
    root = tmp_path_factory.mktemp("good")
    manifest = prepare_kills.write_source(root, 14)
    encoders = Encoders.load(*weights, "cpu", prepare_kills.TEXT_LENGTH)
    prepare(manifest, root / "out", encoders, prepare_kills.SPEC, shard_clips=4)
    return root / "out"


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "out")


def test_a_good_data_set_is_verified(good, capsys):
    assert verify([str(good)]) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "every file is what was written" in shown.err


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_damage_is_one_line(copy, capsys):
    flip(copy / "train" / "shard.00000.mds.zstd")
    cut = copy / "train" / "shard.00001.mds.zstd"
    cut.write_bytes(cut.read_bytes()[:-5])
    (copy / "train" / "shard.00002.mds.zstd").unlink()
    flip(copy / "text.safetensors")
    flip(copy / "samples.jsonl")
    (copy / "rejects.jsonl").unlink()
    assert verify([str(copy)]) == 1
    lines = capsys.readouterr().out.strip().splitlines()
    found = {line.split(": ")[0].removeprefix(f"{copy}/"): line.split(": ")[1] for line in lines}
    assert found.keys() == {
        "train/shard.00000.mds.zstd", "train/shard.00001.mds.zstd", "train/shard.00002.mds.zstd",
        "text.safetensors", "samples.jsonl", "rejects.jsonl",
    }
    assert found["train/shard.00002.mds.zstd"] == found["rejects.jsonl"] == "missing"
    assert found["train/shard.00000.mds.zstd"].startswith(HASH) and "bytes, not" in found[
        "train/shard.00001.mds.zstd"]


def test_an_index_that_does_not_fit_is_one_line(copy, capsys):
    index = copy / "train" / "index.json"
    value = json.loads(index.read_text())
    del value["shards"][0]
    index.write_text(json.dumps(value))
    for _ in range(2):
        assert verify([str(copy)]) == 1
        [line] = capsys.readouterr().out.strip().splitlines()
        assert line.startswith(f"{index}: xxh64")
        index.write_text("{")
    # Data sets that list no hashes of their small files are judged by what can be read.
    save_metadata(copy, dataclasses.replace(load_metadata(copy), files={}))
    assert verify([str(copy)]) == 1
    assert f"{index}: damaged" in capsys.readouterr().out
    index.write_text(json.dumps(value))
    assert verify([str(copy)]) == 1
    assert "7 samples, dataset.json says 10" in capsys.readouterr().out
    (copy / "dataset.json").unlink()
    assert verify([str(copy)]) == 1
    assert len(capsys.readouterr().out.strip().splitlines()) == 1


def test_what_a_reader_unpacked_is_verified_too(copy, capsys):
    from streaming.base.compression import decompress

    packed = copy / "train" / "shard.00000.mds.zstd"
    raw = copy / "train" / "shard.00000.mds"
    raw.write_bytes(decompress("zstd", packed.read_bytes()))
    assert verify([str(copy)]) == 0
    packed.unlink()
    assert verify([str(copy)]) == 0
    flip(raw)
    assert verify([str(copy)]) == 1
    assert "shard.00000.mds: xxh64" in capsys.readouterr().out
    with pytest.raises(DataError, match="shard.00000.mds: xxh64"):
        list(iter_samples(copy, "train"))


def test_a_good_data_set_is_shown(good, weights, tmp_path, capsys):
    wan, tangoflux = weights
    arguments = [str(good), "--decode", "3", "--wan", wan, "--tangoflux", tangoflux]
    assert inspect([*arguments, "--to", str(tmp_path), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "picture 0.3750 s, sound 0.3840 s: +9.0 ms (a latent is 32.0 ms)" in shown
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert rows["train"][1:3] == ["10", "3"] and rows["validation"][1:3] == ["2", "1"]
    assert rows["train"][4:6] == ["10", "10"] and rows["train"][-1] == "0"
    videos = sorted(tmp_path.glob("*.mp4"))
    assert [v.name for v in videos] == ["train-000003.mp4", "train-000009.mp4",
                                        "validation-000000.mp4"]
    with av.open(str(videos[0])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] > 3 * 150 and sheet.std() > 20


def test_statistics_are_those_of_the_samples(good, capsys):
    inspect([str(good)])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train"))
    metadata = load_metadata(good)
    latents = np.stack([s["video_latents"] for s in iter_samples(good, "train")]).astype(float)
    mean, std = (np.array(v)[:, None, None, None]
                 for v in (metadata.latents_mean, metadata.latents_std))
    values = (latents - mean) / std
    assert f"{values.mean():+.3f} +- {values.std():.3f}" in row
    means = np.stack([s["audio_mean"] for s in iter_samples(good, "train")]).astype(float)
    assert f"{means.mean():+.3f} +- {means.std():.3f}" in row


def test_other_vaes_are_refused(good, weights, tmp_path, capsys):
    other = tiny.write_wan(tmp_path / "wan", seed=3)
    arguments = [str(good), "--decode", "1", "--wan", str(other), "--tangoflux", weights[1]]
    assert inspect(arguments) == 1
    assert "fingerprints.video_vae=" in capsys.readouterr().err


def rewrite(root, edit):
    """The training split again, every sample through `edit`."""
    metadata = load_metadata(root)
    samples = list(iter_samples(root, "train"))
    shutil.rmtree(root / "train")
    with MDSWriter(out=str(root / "train"), columns=columns(metadata), compression="zstd",
                   hashes=[HASH]) as writer:
        for index, sample in enumerate(samples):
            edit(index, sample)
            writer.write(sample)


def test_samples_that_stand_out_are_flagged(copy, capsys):
    def edit(index, sample):
        for name in ("video_latents", "audio_mean", "audio_std"):
            sample[name] = sample[name].copy()
        if index == 0:
            sample["video_latents"][3, 1] = np.nan
        if index == 1:
            sample["audio_mean"][:] = 0.5
        if index == 2:
            sample["video_latents"][:, 1:] = sample["video_latents"][:, 1:2]
        if index == 3:
            sample["record"]["sound_seconds"] = 0.2
        if index == 4:  # without sound there is nothing to be constant
            sample["audio_mean"][:] = 0
            sample["has_audio"] = 0

    rewrite(copy, edit)
    assert inspect([str(copy)]) == 1
    flags = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FLAG")]
    names = [s["id"] for s in iter_samples(copy, "train")]
    assert flags == [
        f"FLAG train {names[0]}: video latents: not finite",
        f"FLAG train {names[1]}: audio mean: constant",
        f"FLAG train {names[2]}: the picture stands still",
        f"FLAG train {names[3]}: 0.17 s of the cut are without sound",
    ]


def test_lengths_that_cannot_belong_together_are_refused(copy, capsys):
    metadata = load_metadata(copy)
    save_metadata(copy, dataclasses.replace(metadata, audio_latent_shape=[11, 6]))
    assert inspect([str(copy)]) == 1
    assert "audio_latent_shape=[11, 6] 0.352 s" in capsys.readouterr().err


def test_data_of_the_tests_themselves_can_be_inspected(tmp_path, capsys):
    root = prepared.write_shards(tmp_path / "out", train=3, validation=1)
    assert inspect([str(root)]) == 0 and verify([str(root)]) == 0
    assert inspect([str(root), "--decode", "1"]) == 1
    assert "--decode needs --wan and --tangoflux" in capsys.readouterr().err
    for flag in ("--decode", "--samples"):
        with pytest.raises(SystemExit):
            inspect([str(root), flag, "-1"])
        assert f"argument {flag}: -1: must be" in capsys.readouterr().err
    assert inspect([str(root)]) == 0
    assert "train" in capsys.readouterr().out


def test_a_decoded_clip_is_a_clip(good, tmp_path):
    """What inspect writes can be read as any clip: frames, sound, one length."""
    inspect([str(good), "--decode", "1", "--to", str(tmp_path), "--device", "cpu"])
    spec = CutSpec(frames=9, height=32, width=64, sample_rate=16000, hop=512, silence_dbfs=-120)
    cut = read_cut(next(tmp_path.glob("*.mp4")), spec)
    assert cut.facts.source_width == 64 and cut.facts.sound_seconds > 0.3
