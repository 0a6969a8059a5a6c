"""Many workers on one data set: slices, settings that must not change, status, views, silence."""

import json
import time

import numpy as np
import pytest

from data.clips.cut import CutSpec
from data.clips.mux import write_clip
from data.loading.index import read_index
from data.prepare import Encoders, prepare
from data.prepare.__main__ import main, place
from data.prepare.job import clips_per_shard
from data.schema import DataError, load_metadata
from data.stored import iter_samples
from tests.support.inputs.media import noise, numbered, write_media
from tests.support.kills import prepare_kills
from tests.support.models import tiny

SPEC = prepare_kills.SPEC


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return [str(f) for f in (tiny.write_wan(root / "wan"), tiny.write_tangoflux(root / "tango"))]


@pytest.fixture(scope="module")
def encoders(folders):
    return Encoders.load(*folders, "cpu", prepare_kills.TEXT_LENGTH)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """14 clips, two of them too short; train and validation."""
    return prepare_kills.write_source(tmp_path_factory.mktemp("source"), 14)


def arguments(manifest, out, folders, *more):
    wan, tangoflux = folders
    return [str(manifest), str(out), "--wan", wan, "--tangoflux", tangoflux, *prepare_kills.FLAGS,
            "--device", "cpu", "--clips-per-shard", "2", *map(str, more)]


def record(name, path, **more):
    return {"id": name, "path": str(path), "video_caption": tiny.CAPTIONS[0],
            "audio_caption": tiny.CAPTIONS[1]} | more


def write_manifest(path, *records):
    path.write_text("\n".join(json.dumps(one) for one in records))
    return path


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, (None, None), (0, 1)),
        ({}, (2, 5), (2, 5)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"},
         (None, None), (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "20", "SLURM_ARRAY_TASK_COUNT": "3",
          "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_STEP": "10"}, (None, None), (2, 3)),
        ({"RANK": "5", "WORLD_SIZE": "8"}, (None, None), (5, 8)),
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_ARRAY_TASK_ID": "2",
          "SLURM_ARRAY_TASK_COUNT": "3"}, (None, None), (9, 12)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (0, 1), (0, 1)),
    ],
)
def test_place_among_the_workers(environment, given, expected):
    assert place(environment, *given) == expected


@pytest.mark.parametrize(
    ("environment", "given"),
    [({}, (4, 4)), ({}, (-1, 2)), ({}, (1, None)),
     ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3"},
      (None, None))],
)
def test_an_impossible_place_is_refused(environment, given):
    with pytest.raises(DataError, match="worker"):
        place(environment, *given)


def test_the_files_do_not_depend_on_the_number_of_workers(tmp_path, manifest, encoders):
    results = []
    for workers in (1, 3):
        out = tmp_path / f"by{workers}"
        for worker in reversed(range(workers)):
            done = prepare(manifest, out, encoders, SPEC, worker=worker, workers=workers,
                           shard_clips=2)
            assert (done is None) == out.with_name(f".{out.name}.partial").exists()
        results.append(prepare_kills.contents(out))
    assert results[0] == results[1]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    stored = [s for split in ("validation", "train") for s in iter_samples(out, split)]
    assert [s["record"] for s in stored] == samples  # every record, with what was found out
    assert samples[0]["t0"] == 0 and samples[0]["source_fps"] == 24 and samples[0]["has_audio"]
    assert [s["samples"] for s in read_index(out, "train")] == [2, 1, 2, 2, 2, 1]
    assert sorted(p.name for p in (out / "train").glob("*.zstd")) == [
        f"shard.{number:05d}.mds.zstd" for number in range(6)
    ]


def test_a_worker_alone_leaves_the_rest_and_says_so(tmp_path, manifest, folders, capsys):
    out = tmp_path / "out"
    assert main(arguments(manifest, out, folders, "--worker", 1, "--workers", 2)) == 0
    shown = capsys.readouterr()
    assert "not complete yet" in shown.out and "are left to others" in shown.err
    assert not out.exists()
    assert main([str(manifest), str(out), "--merge"]) == 1  # without weights
    assert "shards are not encoded yet (first: validation-00000)" in capsys.readouterr().err
    assert main(arguments(manifest, out, folders, "--worker", 0, "--workers", 2)) == 0
    assert main([str(manifest), str(out), "--merge"]) == 0
    assert "complete; train 10, validation 2; rejected: too_short 2" in capsys.readouterr().out
    # A late worker of the same array finds the work done.
    assert main(arguments(manifest, out, folders, "--worker", 1, "--workers", 2)) == 0


def test_status_sums_all_workers_from_files(tmp_path, manifest, folders, encoders, capsys):
    out = tmp_path / "out"
    command = [str(manifest), str(out), "--status"]
    assert main(command) == 0
    assert "nothing yet" in capsys.readouterr().out
    for worker in (1, 3):
        prepare(manifest, out, encoders, SPEC, worker=worker, workers=4, shard_clips=2)
    reports = tmp_path / ".out.partial" / "workers"
    # Two workers that are still at it, one of which has not been heard of for long.
    report = {"host": "n1", "pid": 1, "began": time.time() - 10, "time": time.time(), "clips": 5,
              "left": 3, "rejected": {}}
    (reports / "0-of-4.json").write_text(json.dumps(report))
    (reports / "2-of-4.json").write_text(json.dumps(report | {"time": time.time() - 600}))
    capsys.readouterr()
    assert main(command) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("worker 0 of 4 on n1: 5 clips, 3 left, 0.50 clip/s, ETA 6 s")
    assert "no sign for 10 min" in lines[1]
    assert "4 of 8 shards, 4 samples, 8 of 14 clips left; 0.50 clip/s by 1 running" in lines[2]
    assert "ETA 16 s; rejected: too_short 2" in lines[2]
    assert main([str(tmp_path / "gone.jsonl"), *command[1:]]) == 1
    assert "gone.jsonl: cannot be read (No such file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def begun(tmp_path_factory, manifest, encoders):
    """(a folder that one of two workers has finished with, a complete one)."""
    root = tmp_path_factory.mktemp("begun")
    prepare(manifest, root / "half", encoders, SPEC, worker=1, workers=2, shard_clips=2)
    prepare(manifest, root / "whole", encoders, SPEC, shard_clips=2)
    return root / "half", root / "whole"


@pytest.mark.parametrize(
    ("more", "field", "first", "now"),
    [
        (["--silence-dbfs", "-50"], "silence_dbfs", "-60.0", "-50.0"),
        (["--frames", "13"], "frames", "9", "13"),
        (["--keep-silent"], "keep_silent", "False", "True"),
        (["--offsets", "2"], "offsets", "1", "2"),
        (["--clips-per-shard", "3"], "clips_per_shard", "2", "3"),
        (["--video-text-length", "48"], "video_text_length", "40", "48"),
    ],
)
def test_settings_cannot_change_on_the_way(
    manifest, folders, begun, capsys, more, field, first, now
):
    for out, word in zip(begun, ("begun", "not empty, made"), strict=True):
        assert main(arguments(manifest, out, folders, *more)) == 1
        [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert f"{field}={first}, now {field}={now}" in line and "delete" in line
        assert f"out={out}: {word}" in line


def test_inputs_and_encoders_cannot_change_on_the_way(tmp_path, manifest, folders, begun, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(manifest.read_text() + "\n")
    assert main(arguments(other, begun[0], folders)) == 1
    assert "manifest=" in capsys.readouterr().err
    wan = tiny.write_wan(tmp_path / "wan", seed=1)
    assert main(arguments(manifest, begun[0], [str(wan), folders[1]])) == 1
    assert "fingerprints.video_vae=" in capsys.readouterr().err


def test_captions_come_from_a_file_by_id(tmp_path, encoders):
    clip = write_media(tmp_path / "a.mkv", numbered(24), np.arange(24) / 24, noise(1))
    bare = {"id": "a", "path": str(clip)}
    manifest = write_manifest(tmp_path / "m.jsonl", bare, bare | {"id": "b"})
    captions = write_manifest(
        tmp_path / "c.jsonl",
        {"id": "a", "video_caption": tiny.CAPTIONS[0], "audio_caption": tiny.CAPTIONS[1]},
    )
    metadata = prepare(manifest, tmp_path / "out", encoders, SPEC, captions=captions)
    assert metadata.counts == {"train": 1} and metadata.rejected == {"no_caption": 1}
    [sample] = iter_samples(tmp_path / "out", "train")
    assert sample["record"]["audio_caption"] == tiny.CAPTIONS[1]
    assert len(load_metadata(tmp_path / "out").settings["captions"]) == 64


def test_silent_clips_stay_on_request(tmp_path, encoders):
    times = np.arange(24) / 24
    write_media(tmp_path / "loud.mkv", numbered(24), times, noise(1))
    write_media(tmp_path / "quiet.mkv", numbered(24), times, np.zeros((48000, 2)))
    write_clip(tmp_path / "mute.mp4", numbered(24), 24, None, 16000)
    manifest = write_manifest(
        tmp_path / "m.jsonl", record("loud", tmp_path / "loud.mkv"),
        record("quiet", tmp_path / "quiet.mkv"), record("mute", tmp_path / "mute.mp4"),
    )
    strict = prepare(manifest, tmp_path / "strict", encoders, SPEC)
    assert strict.counts == {"train": 1} and strict.rejected == {"silent": 1, "no_audio": 1}
    spec = CutSpec(**(vars(SPEC) | {"keep_silent": True}))
    captions = write_manifest(tmp_path / "c.jsonl", *(  # as data.captions says it: "" is no sound
        {"id": name, "video_caption": tiny.CAPTIONS[0], "audio_caption": heard}
        for name, heard in (("loud", tiny.CAPTIONS[1]), ("quiet", ""), ("mute", ""))))
    kept = prepare(manifest, tmp_path / "kept", encoders, spec, captions=captions)
    assert kept.counts == {"train": 3} and kept.rejected == {}
    samples = {s["id"]: s for s in iter_samples(tmp_path / "kept", "train")}
    assert {name: s["has_audio"] for name, s in samples.items()} == {
        "loud": 1, "quiet": 0, "mute": 0
    }
    for name in ("quiet", "mute"):
        assert not samples[name]["audio_mean"].any() and not samples[name]["audio_std"].any()
        assert samples[name]["video_latents"].any()
        assert samples[name]["record"]["audio_caption"] == ""
        assert samples[name]["record"]["mean_dbfs"] is None
        assert samples[name]["record"]["has_audio"] is False
    assert samples["quiet"]["record"]["sound_seconds"] == pytest.approx(0.375)
    assert samples["mute"]["record"]["sound_seconds"] == 0
    [loud] = iter_samples(tmp_path / "strict", "train")
    assert (loud["audio_mean"] == samples["loud"]["audio_mean"]).all()


def test_several_cuts_of_one_clip(tmp_path, encoders):
    """Two offsets and two crops: four samples, each another part of the clip."""
    frames = np.zeros((96, 48, 160, 3), np.uint8)  # 4 s; brighter with time, redder to the right
    frames[..., 1] = np.arange(96)[:, None, None]
    frames[..., 0] = np.arange(160)
    clip = write_media(tmp_path / "a.mkv", frames, np.arange(96) / 24, noise(4))
    short = write_media(tmp_path / "s.mkv", numbered(10), np.arange(10) / 24, noise(0.5))
    manifest = write_manifest(
        tmp_path / "m.jsonl", record("a", clip, t0=3.0, t1=3.375, marks=[[0.1, "wood"]]),
        record("s", short, t0=0.0),
    )
    spec = CutSpec(**(vars(SPEC) | {"offsets": 2, "crops": 2}))
    metadata = prepare(manifest, tmp_path / "out", encoders, spec)
    samples = [s["record"] for s in iter_samples(tmp_path / "out", "train")]
    assert [s["id"] for s in samples] == ["a@0", "a@1", "a@2", "a@3", "s@0", "s@1"]
    room = 4 - 9 / 24
    assert [s["t0"] for s in samples[:2]] == [3.0, 3.0]  # the record's own comes first
    assert samples[2]["t0"] == pytest.approx((3 + room / 2) % room, abs=0.022)
    assert [s["t1"] - s["t0"] for s in samples[:4]] == pytest.approx([9 / 24] * 4)
    # Marks are those of the record's own cut: of the others nothing is known.
    assert [s.get("marks") for s in samples[:4]] == [[[0.1, "wood"]]] * 2 + [None] * 2
    assert "t1" not in samples[4]
    rejects = [json.loads(line) for line in
               (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {r["id"]: r["reason"] for r in rejects} == dict.fromkeys(["s@2", "s@3"], "no_room")
    assert metadata.settings["offsets"] == metadata.settings["crops"] == 2
    latents = [s["video_latents"] for s in iter_samples(tmp_path / "out", "train")]
    assert all(np.abs(one - other).max() > 0.01 for i, one in enumerate(latents[:4])
               for other in latents[:i])


def test_shards_hold_about_64_mb(begun):
    metadata = load_metadata(begun[1])
    assert clips_per_shard(metadata) == 64  # tiny samples: the cap
    real = CutSpec(frames=121)
    large = metadata.__class__(**(vars(metadata) | {
        "video_latent_shape": [48, 31, 12, 20], "audio_latent_shape": [real.num_latents, 64],
        "video_text_width": 4096, "audio_text_width": 1024}))
    assert clips_per_shard(large) == 34  # 1.9 MB each
