"""What the doctor says of made-up and of the real clips, and what it leaves behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import MDSWriter

from data.clips.cut import CutSpec
from data.clips.mux import write_clip
from data.manifest.doctor import main, sample_bytes
from data.schema import Metadata, columns, pack
from tests.support.inputs.media import noise

CLIPS = Path(__file__).parents[4] / "shared" / "clips"
FAST = ("--frames", "9", "--workers", "1")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three good clips, two of them the same in other files, a silent and a broken one."""
    root = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    for index, name in enumerate(("one", "two", "quiet")):
        small = generator.integers(0, 255, (24, 6, 10, 3), np.uint8)
        level = np.repeat(generator.random(20) > 0.5, 800)[:, None] + 0.01
        sound = 0.1 * level * noise(1, 16000) * (name != "quiet")
        frames = small.repeat(16, axis=1).repeat(16, axis=2)
        write_clip(root / f"{name}.mp4", frames, 24, sound.astype(np.float32), 16000)
        if index == 0:
            again = frames[:, ::2, ::2]
            write_clip(root / "z_again.mp4", again, 24, 0.5 * sound.astype(np.float32), 16000)
    (root / "junk.mp4").write_bytes(b"junk")
    return root


def run(capsys, *arguments, expect: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == expect
    captured = capsys.readouterr()
    return captured.out if expect == 0 else captured.err.strip().splitlines()[-1]


def lines(path: Path) -> dict[str, dict]:
    return {line["id"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_folder(clips, tmp_path, capsys):
    out = tmp_path / "m" / "clean.jsonl"
    said = run(capsys, clips, *FAST, "--out", out, "--gpus", 4, "--encode-seconds", 7200)
    assert "usable   3 of 5 clips, 1 s of cuts" in said
    assert "1 silent" in said and "1 undecodable" in said
    assert "encode   90 min on 4 GPUs at 7200.000 s a clip" in said
    kept, ledger = lines(out), lines(out.with_name("clean.rejects.jsonl"))
    assert set(kept) == {"one.mp4", "two.mp4", "z_again.mp4"}
    assert {name: line["reason"] for name, line in ledger.items()} == {
        "quiet.mp4": "silent", "junk.mp4": "undecodable"}
    assert all(set(line) == {"id", "reason", "detail", "path"} for line in ledger.values())
    one = kept["one.mp4"]
    assert (out.parent / one["path"]).samefile(clips / "one.mp4")
    assert one["source_fps"] == 24 and -50 < one["mean_dbfs"] < -40 and one["sha256"]
    card = json.loads((tmp_path / "m" / "clean.card" / "data_card.json").read_text())
    assert card["kept"] == 3 and card["reasons"] == {"undecodable": 1, "silent": 1}


def test_near_duplicates_and_a_manifests_own_ledger(clips, tmp_path, capsys):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    run(capsys, clips, *FAST, "--out", first)
    said = run(capsys, first, *FAST, "--near-duplicates", "--out", second)
    assert "usable   2 of 3 clips" in said
    ledger = lines(tmp_path / "second.rejects.jsonl")
    assert {name: line["reason"] for name, line in ledger.items()} == {
        "quiet.mp4": "silent", "junk.mp4": "undecodable", "z_again.mp4": "near_duplicate"}
    assert "like one.mp4: " in ledger["z_again.mp4"]["detail"]
    assert set(lines(second)) == {"one.mp4", "two.mp4"}


def test_of_near_duplicates_the_held_out_one_stays(clips, tmp_path, capsys):
    manifest, out = tmp_path / "m.jsonl", tmp_path / "o.jsonl"
    manifest.write_text("\n".join(
        json.dumps({"id": name, "path": str(clips / f"{name}.mp4"), "split": split})
        for name, split in (("one", "train"), ("two", "train"), ("z_again", "validation"))))
    run(capsys, manifest, *FAST, "--near-duplicates", "--out", out)
    assert list(lines(out)) == ["two", "z_again"]
    assert "like z_again" in lines(tmp_path / "o.rejects.jsonl")["one"]["detail"]


def test_workers_and_order_change_nothing(clips, tmp_path, capsys):
    run(capsys, clips, *FAST, "--near-duplicates", "--out", tmp_path / "1.jsonl")
    run(capsys, clips, *FAST, "--workers", 2, "--near-duplicates", "--out", tmp_path / "2.jsonl")
    for name in ("jsonl", "rejects.jsonl", "card/data_card.json"):
        assert (tmp_path / f"1.{name}").read_bytes() == (tmp_path / f"2.{name}").read_bytes()


def test_a_sample_is_scaled_up(clips, tmp_path, capsys):
    manifest = tmp_path / "many.jsonl"
    records = [{"id": f"{index}", "path": str(clips / ("quiet.mp4" if index % 4 == 0 else
                                                       "one.mp4"))} for index in range(400)]
    manifest.write_text("\n".join(map(json.dumps, records)))
    said = run(capsys, manifest, *FAST, "--sample", 40)
    words = said.split()
    usable, margin = int(words[1]), int(words[3])
    assert "of 400 clips (from a sample of 40)" in said
    assert 20 < margin < 60 and abs(usable - 300) < 1.5 * margin


def test_captions_are_asked_for_where_their_file_is_given(clips, tmp_path, capsys):
    manifest, captions = tmp_path / "m.jsonl", tmp_path / "c.jsonl"
    manifest.write_text("\n".join(json.dumps({"id": n, "path": str(clips / f"{n}.mp4")})
                                  for n in ("one", "two")))
    captions.write_text(json.dumps({"id": "one", "video_caption": "v", "audio_caption": "a"}))
    assert "usable   2 of 2" in run(capsys, manifest, *FAST)
    said = run(capsys, manifest, *FAST, "--captions", captions, "--out", tmp_path / "o.jsonl")
    assert "usable   1 of 1" in said and "1 no_caption" in said
    assert lines(tmp_path / "o.jsonl")["one"]["video_caption"] == "v"
    captions.write_text(captions.read_text().replace("one", "one.mp4"))
    said = run(capsys, clips, *FAST, "--captions", captions, "--out", tmp_path / "f.jsonl")
    assert "usable   1 of 1" in said and "no_caption" in said
    assert list(lines(tmp_path / "f.jsonl")) == ["one.mp4"]
    gone = tmp_path / "gone.csv"
    assert f"captions={gone}" in run(capsys, clips, *FAST, "--captions", gone, expect=1)


def test_errors_are_one_line(clips, tmp_path, capsys):
    assert "no such file" in run(capsys, tmp_path / "gone.jsonl", expect=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no usable line or media file" in run(capsys, empty, expect=1)
    out = tmp_path / "clean.jsonl"
    run(capsys, clips, *FAST, "--out", out)
    line = run(capsys, out, "--frames", 13, "--workers", 1, expect=1)
    assert "frames=13" in line and "cuts one.mp4 to 0.375 s" in line
    (tmp_path / "clean.rejects.jsonl").write_text("{")
    assert "damaged" in run(capsys, out, *FAST, expect=1)
    shutil.rmtree(empty)
    with pytest.raises(SystemExit):
        main([str(clips), "--sample", "2", "--out", str(out)])
    for flag, value in (("gpus", "0"), ("fps", "nan"), ("fps", "inf"), ("frames", "-1"),
                        ("silence-dbfs", "nan"), ("encode-seconds", "0"), ("workers", "0")):
        with pytest.raises(SystemExit):
            main([str(clips), f"--{flag}", value])
        assert f"argument --{flag}: {value}: must be" in capsys.readouterr().err


@pytest.mark.parametrize("frames", [49, 121])
def test_bytes_are_what_a_stored_sample_takes(tmp_path, frames):
    """A sample of the released models' geometry, really written, without compression."""
    spec, rows = CutSpec(frames=frames), 37
    video, sound = [48, 1 + (frames - 1) // 4, 12, 20], [spec.num_latents, 64]
    metadata = Metadata(24.0, frames, 192, 320, 44100, 2048, 4, 16, [], [], video, sound, 512, 4096,
                        64, 1024)
    latents = torch.zeros(sound), torch.zeros(sound)
    text = torch.zeros(64, 1024), torch.ones(64, dtype=torch.bool)
    record = {"id": "a" * 18, "video_caption": "v" * 500, "audio_caption": "a" * 200}
    sample = pack(record, torch.zeros(video), latents, torch.zeros(rows, 4096), text, sound)
    with MDSWriter(out=str(tmp_path), columns=columns(metadata)) as writer:
        for _ in range(4):
            writer.write(sample)
    index = json.loads((tmp_path / "index.json").read_text())
    stored = index["shards"][0]["raw_data"]["bytes"] / 4
    assert 0 < stored - sample_bytes(spec, rows) < 2000


def test_33_real_clips_end_as_expected(tmp_path, capsys):
    if not CLIPS.is_dir():
        pytest.skip(f"REAL CLIPS NOT TESTED: {CLIPS} is absent")
    expected = {clip["file"]: clip["expected"] for clip in
                map(json.loads, (CLIPS / "clips.jsonl").read_text().splitlines())}
    assert len(expected) == 33
    off, on = tmp_path / "off.jsonl", tmp_path / "on.jsonl"
    run(capsys, CLIPS, "--workers", 1, "--out", off)
    assert outcome(off) == expected
    run(capsys, off, "--workers", 1, "--near-duplicates", "--out", on)
    # Of the real pair the first stays, in the order of the names.
    assert outcome(on) == expected | {
        "vggsound_ZYc410CE4Rg_0_10000_25fps256.mp4": "near_duplicate"}


def outcome(manifest: Path) -> dict[str, str]:
    rejects = lines(manifest.with_name(f"{manifest.stem}.rejects.jsonl"))
    return dict.fromkeys(lines(manifest), "accept") | {
        name: line["reason"] for name, line in rejects.items()}
