"""Each set as it is downloaded, in miniature, and what its manifest says, field by field."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.decode import CutSpec, read_cut
from data.manifest.__main__ import main
from data.manifest.vggsound import load_subsets, parse_name
from data.playground.__main__ import write_clips
from tests.media import noise, numbered, write_media

RATE = 10  # pictures a second: cheap, and times that are easy to read
CUT = 49 / 24


def take(path: Path, seconds: float = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = numbered(round(seconds * RATE), 16, 24)
    return write_media(path, frames, np.arange(len(frames)) / RATE, noise(seconds, 8000), 8000)


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """One clip of ten seconds, to be copied."""
    return take(tmp_path_factory.mktemp("source") / "ten.mp4")


def place(clip: Path, *paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, path)


def run(name: str, *roots: Path, out: Path, options: tuple = ()) -> tuple[dict, dict]:
    """(records, ledger lines) by id of what the command writes."""
    arguments = [name, *roots, "--out", out, "--workers", 1, *options]
    assert main([str(argument) for argument in arguments]) == 0
    ledger = out.with_name(f"{out.stem}.rejects.jsonl")
    return tuple({line["id"]: line for line in map(json.loads, path.read_text().splitlines())}
                 for path in (out, ledger))


def reasons(rejects: dict) -> dict[str, str]:
    return {name: line["reason"] for name, line in rejects.items()}


FACTS = {"width": 24, "height": 16, "rotation": 0, "fps": 10.0, "vfr": False, "frames": 100,
         "seconds": 10.0, "audio_rate": 8000, "channels": 2}


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


def greatest_hits(root: Path, ten: Path) -> Path:
    names = ("2015-02-16-16-49-06", "2015-02-16-16-49-06-1", "2015-03-01-00-00-00",
             "2015-03-02-00-00-00", "2015-03-03-00-00-00", "2015-03-04-00-00-00")
    for name in names[:-1]:
        place(ten, root / f"vis-data/{name}_denoised.mp4")
    place(ten, *(root / f"vis-data/{names[0]}_{version}.mp4"
                 for version in ("denoised_thumb", "mic")),
          root / f"vis-data/{names[-1]}_mic.mp4", root / "vis-data/readme_clip.mp4")
    marks = {
        names[0]: "0.5 wood hit static\n3.0 metal hit deform\n3.5 metal scratch static\n"
                  "4.0 None None None\n4.2 metal hit static\n9.0 wood scratch static\n\n",
        names[1]: "1.0 leaf hit static\n6.0 leaf hit static\n",
        names[2]: "4.0 None None None\n",
        names[3]: "1.0 leaf hit\n",
        names[5]: "",
    }
    for name, text in marks.items():
        (root / f"vis-data/{name}_times.txt").write_text(text)
    return root


def test_greatest_hits_takes_the_window_with_the_most_marks(tmp_path, ten):
    root = greatest_hits(tmp_path, ten)
    out = tmp_path / "g.jsonl"
    records, rejects = run("greatest_hits", root, out=out, options=("--duplicates", "exact"))
    first = records["greatest_hits_2015-02-16-16-49-06"]
    # Three marks from 3.0 to 4.2 s, in the middle of the cut: 3.6 - CUT / 2 = 2.579.
    assert first["t0"] == pytest.approx(2.6) and first["t1"] == pytest.approx(2.6 + CUT)
    assert first["marks"] == [[0.4, "metal", "hit", "deform"], [0.9, "metal", "scratch", "static"],
                              [1.6, "metal", "hit", "static"]]
    assert (first["class"], first["origin"]) == ("metal hit", "2015-02-16-16-49-06")
    assert first["path"] == "vis-data/2015-02-16-16-49-06_denoised.mp4"
    quiet = records["greatest_hits_2015-03-01-00-00-00"]
    assert (quiet["t0"], quiet["marks"], quiet["class"]) == (4.0, [], "")  # the centre
    assert reasons(rejects) == {
        "readme_clip": "unlisted",
        "greatest_hits_2015-03-02-00-00-00": "bad_marks",
        "greatest_hits_2015-03-03-00-00-00": "bad_marks",
        "greatest_hits_2015-03-04-00-00-00": "missing_file",
    }
    assert "line 1" in rejects["greatest_hits_2015-03-02-00-00-00"]["detail"]
    assert "only mic" in rejects["greatest_hits_2015-03-04-00-00-00"]["detail"]


def test_greatest_hits_ties_are_drawn_by_seed(tmp_path, ten):
    root, tied = greatest_hits(tmp_path, ten), "greatest_hits_2015-02-16-16-49-06-1"
    starts = []
    for seed in range(8):
        records, _ = run("greatest_hits", root, out=tmp_path / "g.jsonl",
                         options=("--seed", seed))
        again, _ = run("greatest_hits", root, out=tmp_path / "g.jsonl", options=("--seed", seed))
        assert records == again
        starts.append(round(records[tied]["t0"], 3))
        assert len(records[tied]["marks"]) == 1
    # 6.0 s can be in the middle of a cut, 1.0 s only where the take begins.
    assert set(starts) == {0.0, 5.0}


def test_greatest_hits_of_another_version_or_cut(tmp_path, ten):
    root = greatest_hits(tmp_path, ten)
    records, _ = run("greatest_hits", root, out=tmp_path / "g.jsonl",
                     options=("--version", "denoised_thumb", "--cut", "centre"))
    [record] = records.values()
    assert record["path"].endswith("06_denoised_thumb.mp4") and record["t0"] == 4.0
    assert record["marks"] == [[0.2, "metal", "hit", "static"]]  # 4.2 s; None at 4.0 is no mark


TABLE = '''-0abcDEFghi,30,"bee, wasp, etc. buzzing",train
aaaaaaaaaaa,1,ripping paper,train
aaaaaaaaaaa,40,ripping paper,train
aaaaaaaaaaa,46,ripping paper,train
under_scor_,0,playing cello,test
ccccccccccc,5,playing cello,test
ccccccccccc,100,playing cello,train
ddddddddddd,7,dog barking,train
eeeeeeeeeee,7,dog barking
'''


def vggsound(root: Path, ten: Path) -> Path:
    place(
        ten,
        root / "vggsound_00/-0abcDEFghi_000030.mp4",  # seconds, six digits
        root / "vggsound_01/aaaaaaaaaaa_1000_11000.mp4",  # milliseconds
        root / "vggsound_02/aaaaaaaaaaa_000001.mp4",  # the same clip again
        root / "vggsound_01/aaaaaaaaaaa_40000_50000.mp4",
        root / "vggsound_01/aaaaaaaaaaa_000046_000056.mp4",  # overlaps the one before
        root / "vggsound_01/under_scor__000000.mp4",
        root / "vggsound_01/ccccccccccc_5000_15000.mp4",
        root / "vggsound_01/ccccccccccc_000100.mp4",  # of a recording in the test list
        root / "vggsound_01/fffffffffff_000100.mp4",
        root / "vggsound_01/my holiday.mp4",
    )
    (root / "vggsound.csv").write_text(TABLE)
    return root


def test_vggsound(tmp_path, ten):
    root = vggsound(tmp_path / "VGGSound", ten)
    records, rejects = run("vggsound", root, out=tmp_path / "v.jsonl", options=("--held-out", 1))
    bee = records["-0abcDEFghi_000030"]
    assert bee == bee | FACTS | {
        "source": "vggsound", "class": "bee, wasp, etc. buzzing", "split": "train",
        "subset": "AV-Loose", "path": "VGGSound/vggsound_00/-0abcDEFghi_000030.mp4",
        "origin": "-0abcDEFghi", "origin_start": 30.0, "t0": 2.5, "t1": 2.5 + 121 / 24}
    assert records["aaaaaaaaaaa_000001"]["subset"] == "AV-Tight"
    splits = {name: r["split"] for name, r in records.items()}
    assert sorted(splits.pop(name) for name in ("under_scor__000000", "ccccccccccc_000005")) == [
        "test", "validation"]
    assert splits == dict.fromkeys(
        ("-0abcDEFghi_000030", "aaaaaaaaaaa_000001", "aaaaaaaaaaa_000040"), "train")
    assert reasons(rejects) == {
        "aaaaaaaaaaa_000001": "duplicate",
        "aaaaaaaaaaa_000046": "overlap",
        "ccccccccccc_000100": "leak",
        "fffffffffff_000100": "unlisted",
        "my holiday": "unlisted",
        "ddddddddddd_000007": "missing_file",
        "eeeeeeeeeee": "invalid_record",
    }


@pytest.mark.parametrize(("mode", "left"), [("exact", 3), ("overlap", 2), ("id", 1)])
def test_what_counts_as_a_duplicate_is_a_setting(tmp_path, ten, mode, left):
    root = vggsound(tmp_path / "VGGSound", ten)
    records, _ = run("vggsound", root, out=tmp_path / "v.jsonl",
                     options=("--held-out", 1, "--duplicates", mode))
    assert sum(name.startswith("aaaaaaaaaaa") for name in records) == left


@pytest.mark.parametrize(
    ("stem", "parsed"),
    [
        ("-0abcDEFghi_000030", ("-0abcDEFghi", 30)),
        ("_-_-_-_-_-__000030", ("_-_-_-_-_-_", 30)),
        ("53UdZyM9MyE_252000_262000", ("53UdZyM9MyE", 252)),
        ("a1_000030_b_0_10000", ("a1_000030_b", 0)),
        ("53UdZyM9MyE_100000_110000", ("53UdZyM9MyE", 100)),
        ("53UdZyM9MyE_000014_000024", ("53UdZyM9MyE", 14)),
        ("53UdZyM9MyE", None),
        ("53UdZyM9MyE_12a", None),
    ],
)
def test_vggsound_file_names(stem, parsed):
    assert parse_name(stem) == parsed


def test_av_tight_and_loose_are_the_papers():
    subsets = load_subsets()
    tight, loose = set(subsets["AV-Tight"]), set(subsets["AV-Loose"])
    assert (len(tight), len(loose), len(tight & loose)) == (37, 146, 0)
    assert {"ripping paper", "eletric blender running"} <= tight  # stat.csv's own spelling
    assert {"police car (siren)", "bee, wasp, etc. buzzing"} <= loose


def test_held_out_recordings_of_another_set_are_not_trained_on(tmp_path, ten, capsys):
    root = vggsound(tmp_path / "VGGSound", ten)
    other, out = tmp_path / "avsync15.jsonl", tmp_path / "v.jsonl"
    lines = [{"id": "x", "path": "x.mp4", "split": split, "source": "avsync15", "origin": origin}
             for split, origin in (("validation", "aaaaaaaaaaa"), ("train", "-0abcDEFghi"))]
    other.write_text("\n".join(json.dumps(line | {"id": line["origin"]}) for line in lines))
    run("vggsound", root, out=out, options=("--held-out", 1))
    assert main(["check", str(out), str(other)]) == 1
    error = capsys.readouterr().err
    assert f"{out} trains on 1 recordings that {other} holds out, such as aaaaaaaaaaa" in error
    _, rejects = run("vggsound", root, out=out,
                     options=("--held-out", 1, "--keep-out", other))
    assert reasons(rejects)["aaaaaaaaaaa_000040"] == "leak"
    assert main(["check", str(out), str(other)]) == 0


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


def error_of(capsys, *arguments) -> str:
    assert main([str(a) for a in (*arguments, "--workers", 1)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


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
    root = vggsound(tmp_path / "VGGSound", ten)
    assert "held_out=731" in error_of(capsys, "vggsound", root)
    (tmp_path / "file").touch()
    assert "cannot be written" in error_of(capsys, "vggsound", root, "--held-out", 2, "--out",
                                           tmp_path / "file" / "m.jsonl")
