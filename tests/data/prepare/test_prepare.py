"""From mp4 files and a manifest to shards that read back what the encoders gave."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.clips.decode import CutSpec, read_cut
from data.clips.mux import write_clip
from data.loading.loader import DataConfig, ValidationSet, build_loader
from data.prepare import AUDIO_NEGATIVE, VIDEO_NEGATIVE, Encoders, prepare
from data.prepare.__main__ import main
from data.schema import DataError, load_metadata, load_text_states
from tests.support.models import tiny

SPEC = CutSpec(frames=9, height=32, width=64, sample_rate=tiny.SAMPLE_RATE, hop=tiny.HOP)
GEOMETRY = ["--frames", "9", "--height", "32", "--width", "64", "--video-text-length", "40"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return tiny.write_wan(root / "wan"), tiny.write_tangoflux(root / "tangoflux")


@pytest.fixture(scope="module")
def encoders(weights):
    return Encoders.load(*map(str, weights), "cpu", 40)


def record(name: str, **more) -> dict:
    return {
        "id": name,
        "path": f"clips/{name}.mp4",
        "video_caption": f"{tiny.CAPTIONS[0]} &amp; {name}",
        "audio_caption": tiny.CAPTIONS[2],
    } | more


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Five good clips (one held out), and one of several kinds of bad ones."""
    root = tmp_path_factory.mktemp("source")
    (root / "clips").mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c", "d", "held", "quiet"):
        frames = generator.integers(0, 255, (24, 8, 12, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        level = 0 if name == "quiet" else 0.1
        audio = level * generator.standard_normal((16000, 2)).astype(np.float32)
        write_clip(root / "clips" / f"{name}.mp4", frames, 24, audio, 16000)
    write_clip(root / "clips" / "mute.mp4", frames, 24, None, 16000)
    (root / "clips" / "junk.mp4").write_bytes(b"junk")
    lines = [json.dumps(record(name)) for name in "abcd"]
    lines += [
        json.dumps(record("held", split="validation", t0=0.25, **{"class": "tight"})),
        "",
        json.dumps(record("quiet")),
        json.dumps(record("mute")),
        json.dumps(record("junk")),
        json.dumps(record("gone")),
        json.dumps(record("late", path="clips/a.mp4", t0=30)),
        json.dumps(record("a", path="clips/b.mp4")),
        "{not json",
        "[1]",
        json.dumps({"id": "poor", "path": "clips/a.mp4"}),
        json.dumps(record("odd", split="../up")),
        json.dumps(record("timeless", t0="soon")),
        json.dumps(record("nan", t0=float("nan"))),
        json.dumps(record("far", t0=10**400)),
        json.dumps(record("half_emoji", video_caption="a ball \ud83d")),
        json.dumps(record("half_path", path="clips/\ud83d.mp4")),
        json.dumps(record("half_tags", tags=["tight", {"why": "\ud83d"}])),
        json.dumps(record("half_id\ud83d")),
        json.dumps(record("zero", path="clips/a\0.mp4")),
        "[" * 100_000,
    ]
    path = root / "manifest.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def prepared(manifest, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "shards"
    wan, tangoflux = map(str, weights)
    arguments = [str(manifest), str(out), "--wan", wan, "--tangoflux", tangoflux, *GEOMETRY]
    assert main(arguments) == 0
    return out


def test_nothing_disappears(prepared):
    rejects = [json.loads(line) for line in (prepared / "rejects.jsonl").read_text().splitlines()]
    assert {r["id"]: r["reason"] for r in rejects} == {
        "quiet": "silent",
        "mute": "no_audio",
        "junk": "undecodable",
        "gone": "undecodable",
        "late": "too_short",
        "a": "duplicate_id",
        "line 13": "invalid_record",
        "line 14": "invalid_record",
        "poor": "invalid_record",
        "odd": "invalid_record",
        "timeless": "invalid_record",
        "nan": "invalid_record",
        "far": "invalid_record",
        "half_emoji": "invalid_record",
        "half_path": "invalid_record",
        "half_tags": "invalid_record",
        "half_id?": "invalid_record",
        "zero": "invalid_record",
        "line 25": "invalid_record",
    }
    details = {r["id"]: r["detail"] for r in rejects}
    assert "key 'video_caption' holds a lone surrogate" in details["half_emoji"]
    assert "key 'tags' holds a lone surrogate" in details["half_tags"]
    assert details["nan"] == "t0=nan: must be a finite number of seconds"
    assert all(r["detail"] for r in rejects)
    metadata = load_metadata(prepared)
    assert metadata.counts == {"train": 4, "validation": 1}
    assert sum(metadata.rejected.values()) == len(rejects) == 19


def test_dataset_json_says_how_it_was_made(prepared, encoders):
    metadata = load_metadata(prepared)
    assert (metadata.fps, metadata.frames, metadata.height, metadata.width) == (24, 9, 32, 64)
    assert (metadata.sample_rate, metadata.audio_hop) == (tiny.SAMPLE_RATE, tiny.HOP)
    assert (metadata.video_temporal_stride, metadata.video_spatial_stride) == (4, 16)
    assert metadata.latents_mean == tiny.VIDEO_VAE["latents_mean"]
    assert metadata.latents_std == tiny.VIDEO_VAE["latents_std"]
    assert metadata.video_latent_shape == [48, 3, 2, 4]
    assert metadata.audio_latent_shape == [12, 6]  # ceil(9 / 24 * 16000 / 512)
    assert metadata.fingerprints == encoders.fingerprints
    assert metadata.duration == 0.375
    names = {path.name for path in prepared.iterdir() if not path.name.startswith("data_card")}
    assert names == {"dataset.json", "rejects.jsonl", "samples.jsonl", "text.safetensors",
                     "train", "validation"}


def test_a_sample_is_what_the_encoders_give(prepared, manifest, encoders):
    held_out = ValidationSet(DataConfig(str(prepared)))
    assert len(held_out) == 1
    batch = held_out.batch([0])
    cut = read_cut(manifest.parent / "clips/held.mp4", SPEC, t0=0.25)
    frames = torch.from_numpy(cut.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    raw = encoders.video_vae.encode(frames)
    expected = encoders.video_vae.normalize(raw.half().float())  # stored raw, as float16
    torch.testing.assert_close(batch.video_latents, expected)
    mean, std = encoders.audio_vae.encode(torch.from_numpy(cut.audio).T[None])
    assert torch.equal(batch.audio_mean, mean.half().float())
    assert torch.equal(batch.audio_std, std.half().float())
    [states] = encoders.video_text.encode([record("held")["video_caption"]])
    assert batch.video_text.shape == (1, 32, tiny.WIDTH)  # one of padding at least, of 40
    assert batch.padded_video_text.shape == (1, 40, tiny.WIDTH)
    assert torch.equal(batch.video_text[0, : len(states)], states.bfloat16())
    assert batch.video_text[0, len(states) :].abs().max() == 0
    states, mask = encoders.audio_text.encode([tiny.CAPTIONS[2]])
    assert torch.equal(batch.audio_text, states.bfloat16())
    assert torch.equal(batch.audio_text_mask, mask)
    assert batch.duration.tolist() == [0.375] and batch.sample_ids == ["held"]
    [facts] = held_out.records([0])
    assert facts["class"] == "tight" and facts["t0"] == 0.25 and facts["source_fps"] == 24


def test_trainer_reads_what_was_written(prepared):
    loader = build_loader(DataConfig(str(prepared), num_workers=0), 2, 0, 1, seed=0)
    epochs = [next(loader) for _ in range(4)]
    assert [epoch for epoch, _ in epochs] == [0, 0, 1, 1]
    for begin in (0, 2):
        ids = [name for _, batch in epochs[begin : begin + 2] for name in batch.sample_ids]
        assert sorted(ids) == ["a", "b", "c", "d"]


def test_empty_and_negative_prompts_are_stored(prepared, encoders):
    states = load_text_states(prepared)
    empty, negative = encoders.video_text.encode(["", VIDEO_NEGATIVE])
    assert torch.equal(states["video_empty"], empty.bfloat16())
    assert torch.equal(states["video_negative"], negative.bfloat16())
    audio, mask = encoders.audio_text.encode([AUDIO_NEGATIVE])
    for name in ("empty", "negative"):
        assert torch.equal(states[f"audio_{name}"], audio[0].bfloat16())
        assert torch.equal(states[f"audio_{name}_mask"], mask[0])


def test_negative_prompt_is_wans_own():
    assert VIDEO_NEGATIVE.startswith("色调艳丽，过曝，静态，") and VIDEO_NEGATIVE.endswith("倒着走")
    assert len(VIDEO_NEGATIVE.split("，")) == 28 and "JPEG压缩残留" in VIDEO_NEGATIVE


def run_main(capsys, *arguments: object) -> str:
    """The one line of error that `main` prints; it must not return 0."""
    assert main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ")
    return error[0]


def test_bad_input_is_one_clear_line(tmp_path, manifest, weights, prepared, capsys):
    wan, tangoflux = weights
    towers = ["--wan", wan, "--tangoflux", tangoflux]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    out = tmp_path / "out"
    assert "no such file" in run_main(capsys, tmp_path / "gone.jsonl", out, *towers)
    assert f"manifest={empty}: empty" in run_main(capsys, empty, out, *towers)
    assert f"out={prepared}: not empty" in run_main(capsys, manifest, prepared, *towers)
    line = run_main(capsys, manifest, out, "--wan", tmp_path / "x", "--tangoflux", tangoflux)
    assert f"wan={tmp_path / 'x'}" in line and "Wan-AI/Wan2.2-TI2V-5B-Diffusers" in line
    line = run_main(capsys, manifest, out, "--wan", wan, "--tangoflux", tmp_path)
    assert "tangoflux.safetensors" in line or "vae.safetensors" in line
    line = run_main(capsys, manifest, out, *towers, "--frames", 48)
    assert "frames=48" in line and "4k+1" in line and "45 or 49" in line
    line = run_main(capsys, manifest, out, *towers, "--frames", 9, "--height", 40)
    assert "height=40" in line and "multiple of 32" in line
    for flag, value in (("--fps", 0), ("--fps", "nan"), ("--decoders", 0), ("--worker", -1)):
        with pytest.raises(SystemExit):
            run_main(capsys, manifest, out, *towers, flag, value)
        assert f"argument {flag}: {value}: must be" in capsys.readouterr().err
    longer = tmp_path / "longer.jsonl"
    longer.write_text(json.dumps(record("x", t0=0.0, t1=2.0)) + "\n")
    line = run_main(capsys, longer, out, *towers, "--frames", 9, "--fps", 24)
    assert "frames=9, fps=24, but the manifest cuts x to 2.000 s" in line
    (tmp_path / "longer.rejects.jsonl").write_text('{"id": "x", "why": "mine"}\n')
    line = run_main(capsys, longer, out, *towers, "--frames", 49, "--fps", 24.5)
    assert "longer.rejects.jsonl: damaged (line 1 has no 'reason')" in line
    assert not out.exists() and not list(tmp_path.glob(".out.partial*"))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def not_utf8(path):
    path.write_bytes(b"\xff\xfe")


def of_other_width(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_model": 16}))


def no_object(path):
    path.write_text("{}")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("wan/vae/diffusion_pytorch_model.safetensors", cut_short),
        ("wan/text_encoder/model.safetensors", cut_short),
        ("tangoflux/vae.safetensors", cut_short),
        ("tangoflux/tangoflux.safetensors", cut_short),
        ("wan/vae/config.json", cut_short),
        ("wan/text_encoder/config.json", of_other_width),
        ("wan/tokenizer/tokenizer_config.json", cut_short),
        ("wan/tokenizer/tokenizer.json", cut_short),
        ("wan/tokenizer/tokenizer.json", no_object),
        ("wan/tokenizer/tokenizer.json", Path.unlink),
        ("tangoflux/config.json", not_utf8),
        ("tangoflux/text_encoder/config.json", cut_short),
        ("tangoflux/text_encoder/tokenizer.json", not_utf8),
    ],
)
def test_damaged_weights_are_one_clear_line(tmp_path, manifest, weights, capsys, name, damage):
    for folder in weights:
        shutil.copytree(folder, tmp_path / folder.name)
    damage(tmp_path / name)
    towers = ["--wan", tmp_path / "wan", "--tangoflux", tmp_path / "tangoflux"]
    capsys.readouterr()
    line = run_main(capsys, manifest, tmp_path / "out", *towers)
    assert str((tmp_path / name).parent) in line
    assert "download" in line or "do not belong together" in line
    assert not (tmp_path / "out").exists()


def test_no_usable_clip_is_an_error_that_keeps_the_reasons(tmp_path, encoders):
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps(record("gone")) + "\n")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="none of 1 clips is usable .undecodable 1."):
        prepare(manifest, out, encoders, SPEC)
    assert not out.exists()
    assert json.loads((tmp_path / "out.rejects.jsonl").read_text())["reason"] == "undecodable"


def test_latents_that_are_not_finite_are_rejected(tmp_path, manifest, encoders, monkeypatch):
    encode = encoders.video_vae.encode
    bad = iter([False, True, False, False, False])  # clip b

    def sometimes_infinite(frames):
        return encode(frames) + (float("inf") if next(bad) else 0.0)

    monkeypatch.setattr(encoders.video_vae, "encode", sometimes_infinite)
    metadata = prepare(manifest, tmp_path / "out", encoders, SPEC)
    assert metadata.rejected["not_finite"] == 1 and metadata.counts["train"] == 3


def test_an_error_leaves_no_half_data_set(tmp_path, manifest, encoders, monkeypatch):
    def fail(cut, record):
        raise RuntimeError("out of memory")

    (tmp_path / "out").mkdir()  # an empty folder may be there already
    with monkeypatch.context() as patch:
        patch.setattr(Encoders, "encode", lambda self, cut, record: fail(cut, record))
        with pytest.raises(RuntimeError, match="out of memory"):
            prepare(manifest, tmp_path / "out", encoders, SPEC)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]
    assert not any((tmp_path / "out").iterdir())
    prepare(manifest, tmp_path / "out", encoders, SPEC)
    assert load_metadata(tmp_path / "out").counts == {"train": 4, "validation": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_has_rate_and_eta(tmp_path, manifest, encoders, capsys):
    prepare(manifest, tmp_path / "out", encoders, SPEC)
    assert "clip/s" in (shown := capsys.readouterr().err) and "10/10" in shown and "<" in shown
