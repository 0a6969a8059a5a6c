"""Each set as it is downloaded, in miniature, and what its manifest says, field by field."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from data.clips.decode import CutSpec, read_cut
from data.manifest.records import write_manifest
from data.schema import DataError
from playground.world.__main__ import write_clips
from tests.support.inputs.trees import (
    CUT,
    FACTS,
    build_vggsound,
    error_of,
    place,
    reasons,
    run,
    take,
)


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """One clip of ten seconds, to be copied."""
    return take(tmp_path_factory.mktemp("source") / "ten.mp4")


def test_avsync15(tmp_path, ten):
    root, out = tmp_path / "AVSync15", tmp_path / "manifests" / "a.jsonl"
    crying = "baby_babbling_crying/5Uodeo_Ln84_000014_000024_6.5_9.5.mp4"
    dash = "dog_barking/-0abc_DE-fg_000030_000040_0.0_10.0.mp4"
    same = "dog_barking/5Uodeo_Ln84_000100_000110_0.0_3.0.mp4"
    pinned = "toilet_flushing/abcdefghijk_000000_000010_1_4.mp4"
    place(ten, *(root / "videos" / name for name in (crying, dash, same, pinned)))
    place(ten, root / "videos/toilet_flushing/zzzzzzzzzzz_000000_000010_1_4.mp4")
    gone = "dog_barking/gone_______000000_000010_0_3.mp4"
    (root / "train.txt").write_text(f"{dash}\n{same}\n\n{pinned},2.5,4.5\n{gone}\n{dash}\n")
    (root / "test.txt").write_text(f"{crying}\n")
    (root / "class_mapping.json").write_text('{"baby_babbling_crying": "baby babbling, crying"}')
    records, rejects = run("avsync15", root, out=out)
    assert records["avsync15_5Uodeo_Ln84_000014_000024_6.5_9.5"] == FACTS | {
        "id": "avsync15_5Uodeo_Ln84_000014_000024_6.5_9.5",
        "source": "avsync15",
        "class": "baby babbling, crying",
        "split": "validation",
        "subset": "AVSync15",
        "path": f"../AVSync15/videos/{crying}",
        "origin": "5Uodeo_Ln84",
        "origin_start": 20.5,
        "t0": 4.0,  # the centre begins on a picture
        "t1": 4.0 + CUT,
        "sha256": hashlib.sha256(ten.read_bytes()).hexdigest(),
    }
    dog = records["avsync15_-0abc_DE-fg_000030_000040_0.0_10.0"]
    assert (dog["origin"], dog["origin_start"]) == ("-0abc_DE-fg", 30)
    assert (dog["class"], dog["split"]) == ("dog barking", "train")
    assert records["avsync15_abcdefghijk_000000_000010_1_4"]["t0"] == 2.5
    assert reasons(rejects) == {
        "avsync15_gone_______000000_000010_0_3": "missing_file",
        "avsync15_-0abc_DE-fg_000030_000040_0.0_10.0": "duplicate",
        "avsync15_zzzzzzzzzzz_000000_000010_1_4": "unlisted",
        "avsync15_5Uodeo_Ln84_000100_000110_0.0_3.0": "leak",
    }
    assert len(records) == 3
    kept, _ = run("avsync15", root, out=out, options=("--leaks", "keep"))
    assert len(kept) == 4


def test_cut_of_the_importer_is_the_cut_that_is_decoded(tmp_path, ten):
    root = tmp_path / "clips"
    place(ten, root / "a.mp4")
    records, _ = run("folder", root, out=tmp_path / "m.jsonl")
    spec = CutSpec(height=16, width=24, min_source_fps=1)
    record = records["a.mp4"]
    default = read_cut(ten, spec)
    assert read_cut(tmp_path / record["path"], spec, record["t0"]).facts == default.facts
    assert record["t0"] == default.facts.t0


@pytest.mark.parametrize("parts", ["videos/", ""])
def test_landscape(tmp_path, ten, parts):
    root = tmp_path / "Landscapes"
    place(ten, root / f"{parts}train/fire_crackling/AbCdEfGhI-k_12.mp4",
          root / f"{parts}train/thunder/odd name.mp4", root / f"{parts}test/thunder/deep/x.mp4")
    records, rejects = run("landscape", root, out=tmp_path / "l.jsonl")
    assert {name: (r["split"], r["class"], r["origin"], r["origin_start"], r["subset"])
            for name, r in records.items()} == {
        "landscape_AbCdEfGhI-k_12": ("train", "fire crackling", "AbCdEfGhI-k", 12, "Landscape"),
        "landscape_x": ("validation", "thunder/deep", "", 0, "Landscape"),
    }
    assert reasons(rejects) == {"landscape_odd name": "duplicate"}  # the same bytes, as x


def test_clips_of_one_name_in_several_folders_all_stay(tmp_path):
    root, out = tmp_path / "Landscapes", tmp_path / "l.jsonl"
    names = ("train/fire/x.mp4", "train/fire/x.webm", "train/thunder/x.mp4", "test/thunder/x.mp4",
             "test/thunder/y.mp4")
    for index, name in enumerate(names):
        take(root / name, 3 + index)
    records, rejects = run("landscape", root, out=out)
    assert set(records) == {*(f"landscape_{name}" for name in names[:-1]), "landscape_y"}
    assert len(out.read_text().splitlines()) == 5 and not rejects
    folders = [root / name for name in names[2:]]  # AVSync15: both lists share one folder
    place(folders[0], root / "videos/fire/x.mp4")
    place(folders[1], root / "videos/thunder/x.mp4")
    (root / "train.txt").write_text("fire/x.mp4\n")
    (root / "test.txt").write_text("thunder/x.mp4\n")
    records, _ = run("avsync15", root, out=out)
    assert set(records) == {"avsync15_fire/x.mp4", "avsync15_thunder/x.mp4"}


def test_pieces_of_a_recording_are_no_duplicates(tmp_path):
    root, out = tmp_path / "Landscapes", tmp_path / "l.jsonl"
    for index in range(2):
        take(root / f"train/fire/AbCdEfGhI-k_12_{index}.mp4", 3 + index)
    place(root / "train/fire/AbCdEfGhI-k_12_0.mp4", root / "train/fire/AbCdEfGhI-k_12_9.mp4")
    records, rejects = run("landscape", root, out=out)
    assert {name: r["origin_part"] for name, r in records.items()} == {
        "landscape_AbCdEfGhI-k_12_0": "_0", "landscape_AbCdEfGhI-k_12_1": "_1"}
    assert reasons(rejects) == {"landscape_AbCdEfGhI-k_12_9": "duplicate"}


def test_no_id_is_written_twice(tmp_path):
    records = [{"id": "x", "path": str(tmp_path / name)} for name in ("a.mp4", "b.mp4")]
    with pytest.raises(DataError, match=r"id='x': .*a\.mp4 and .*b\.mp4"):
        write_manifest(tmp_path / "m.jsonl", records, [])
    assert not (tmp_path / "m.jsonl").exists()


def test_landscape_lists_are_relative_to_their_part(tmp_path, ten):
    root = tmp_path / "Landscapes"
    place(ten, root / "videos/train/thunder/a.mp4")
    take(root / "videos/test/thunder/b.mp4", 3)
    (root / "train.txt").write_text("thunder/a.mp4\n")
    (root / "test.txt").write_text("thunder/b.mp4\nthunder/c.mp4\n")
    records, rejects = run("landscape", root, out=tmp_path / "l.jsonl")
    assert {name: r["split"] for name, r in records.items()} == {
        "landscape_a": "train", "landscape_b": "validation"}
    assert reasons(rejects) == {"landscape_c": "missing_file"}


def test_folder_and_captions(tmp_path, ten, capsys):
    root = tmp_path / "clips"
    place(ten, root / "a b.mp4", root / ".hidden.mp4")
    take(root / "-dogs/-x.webm", 3)
    take(root / "short.mp4", 1)
    (root / "junk.mp4").write_bytes(b"junk")
    (root / "empty.mkv").touch()
    (root / "notes.txt").write_text("no clip")
    captions = tmp_path / "captions.csv"
    captions.write_text('id,video_caption,audio_caption\n"-dogs/-x.webm","a dog, small",barks\n'
                        "nobody,v,a\n")
    records, rejects = run("folder", root, out=tmp_path / "m" / "f.jsonl",
                           options=("--captions", captions))
    assert set(records) == {"-dogs/-x.webm", "a b.mp4", "short.mp4"}
    dog = records["-dogs/-x.webm"]
    assert (dog["class"], dog["path"]) == ("-dogs", "../clips/-dogs/-x.webm")
    assert (dog["video_caption"], dog["audio_caption"]) == ("a dog, small", "barks")
    assert "t0" not in records["short.mp4"] and "video_caption" not in records["a b.mp4"]
    assert reasons(rejects) == {"junk.mp4": "undecodable", "empty.mkv": "undecodable"}
    assert "1 ids of" in capsys.readouterr().err


def test_odd_file_names(tmp_path, ten, monkeypatch):
    """Names that options, protocols and UTF-8 stumble over; links to files of no name."""
    for name in ("-i.mp4", "a:b.mp4", "http:x.mp4", "üñ 'q'.mp4"):
        place(ten, tmp_path / name)
    (tmp_path / "blob").write_bytes(ten.read_bytes())
    (tmp_path / "link.mp4").symlink_to(tmp_path / "blob")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "gone")
    (tmp_path / "folder.mp4").mkdir()
    place(ten, Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")))
    monkeypatch.chdir(tmp_path)
    records, rejects = run("folder", Path("."), out=Path("m.jsonl"))
    found = {name: line["reason"] for name, line in rejects.items()}
    assert found.pop("?.mp4") == "invalid_record" and found.pop("dangling.mp4") == "undecodable"
    assert [r["path"] for r in records.values()] == ["-i.mp4"]  # the first of the same bytes
    assert found == dict.fromkeys(("a:b.mp4", "http:x.mp4", "link.mp4", "üñ 'q'.mp4"), "duplicate")


def test_playground_keeps_its_impacts_as_marks(tmp_path):
    write_clips(tmp_path / "world", clips=2, validation=1, seed=0)
    records, rejects = run("playground", tmp_path / "world", out=tmp_path / "p.jsonl",
                           options=("--frames", 25))
    assert not rejects and [r["split"] for r in records.values()] == ["train", "train",
                                                                      "validation"]
    truth = map(json.loads, (tmp_path / "world/events.jsonl").read_text().splitlines())
    for facts in truth:
        record = records[facts["id"]]
        times = [event["time"] - record["t0"] for event in facts["events"]]
        inside = [time for time in times if 0 <= time < 25 / 24]
        assert [mark[0] for mark in record["marks"]] == pytest.approx(inside, abs=1e-6)
        assert not inside or record["subset"] == "tight"
        assert (tmp_path / record["path"]).is_file() and record["video_caption"]


def test_a_damaged_playground_is_one_line(tmp_path, capsys):
    root = tmp_path / "world"
    write_clips(root, clips=2, validation=0, seed=0)
    lines = (root / "manifest.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    del first["class"]
    (root / "manifest.jsonl").write_text(f"{json.dumps(first)}\n{lines[1]}\n")
    records, _ = run("playground", root, out=tmp_path / "p.jsonl", options=("--frames", 25))
    assert records[first["id"]]["subset"] == ""
    truth = (root / "events.jsonl").read_text().splitlines()
    for damaged in (truth[1][:-9], "[]", '{"id": "x", "material": 1, "events": [{}]}'):
        (root / "events.jsonl").write_text(f"{truth[0]}\n{damaged}\n")
        assert "events.jsonl: line 2 is damaged" in error_of(capsys, "playground", root)


def test_a_list_names_nothing_outside_its_set(tmp_path, ten):
    root = tmp_path / "AVSync15"
    place(ten, root / "videos/a/x.mp4", tmp_path / "y.mp4")
    (root / "train.txt").write_text(f"a/x.mp4\n{tmp_path}/y.mp4\n../../y.mp4\n")
    (root / "test.txt").write_text("")
    records, rejects = run("avsync15", root, out=tmp_path / "m.jsonl")
    assert list(records) == ["avsync15_x"]
    assert reasons(rejects) == {"avsync15_y": "invalid_record"}


def broken_lists(root: Path, ten: Path) -> str:
    (root / "videos").mkdir()
    return "train.txt: no such file"


def nothing_unpacked(root: Path, ten: Path) -> str:
    (root / "videos").mkdir()
    for name in ("train.txt", "test.txt"):
        (root / name).write_bytes(b"a/\xff.mp4\nb,1,x\n")
    return "none of the 2 listed clips"


def odd_mapping(root: Path, ten: Path) -> str:
    (root / "class_mapping.json").write_text("[1]")
    return "class_mapping.json"


@pytest.mark.parametrize("make", [broken_lists, nothing_unpacked, odd_mapping])
def test_odd_avsync15_trees_are_one_line(tmp_path, ten, capsys, make):
    message = make(tmp_path, ten)
    assert message in error_of(capsys, "avsync15", tmp_path)


def test_odd_roots_are_one_line(tmp_path, ten, capsys):
    gone = tmp_path / "gone"
    for name in ("avsync15", "landscape", "greatest_hits", "vggsound", "folder", "playground"):
        assert str(gone) in error_of(capsys, name, gone)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no file <YYYY" in error_of(capsys, "greatest_hits", empty)
    assert "not one clip is left" in error_of(capsys, "folder", empty)
    (empty / "vggsound.csv").write_bytes(b"\xff\xfe,1,x,train\n")
    assert "no UTF-8 csv" in error_of(capsys, "vggsound", empty)
    (empty / "vggsound.csv").write_text("aaaaaaaaaaa,1,x,train\n")
    assert "unpack the archives" in error_of(capsys, "vggsound", empty)
    root = build_vggsound(tmp_path / "VGGSound", ten)
    assert "held_out=138" in error_of(capsys, "vggsound", root)
    (tmp_path / "file").touch()
    assert "cannot be written" in error_of(capsys, "vggsound", root, "--held-out", 2, "--out",
                                           tmp_path / "file" / "m.jsonl")
