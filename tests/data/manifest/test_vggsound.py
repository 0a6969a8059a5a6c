"""VGGSound in miniature: both file-name conventions, odd ids, quoted labels, splits, duplicates."""

import collections
import json

import pytest

from data.manifest.__main__ import hold_out_tests, main, parse
from data.manifest.importers import load_subsets, parse_name
from data.schema import DataError
from tests.support.inputs.trees import FACTS, build_vggsound, reasons, run, take


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """One clip of ten seconds, to be copied."""
    return take(tmp_path_factory.mktemp("source") / "ten.mp4")


@pytest.mark.parametrize(("options", "second"), [
    (("--held-out", 1), "train"), (("--held-out", 0, 0, 1), "train"),
    (("--held-out", 0, 0, 2), "validation"),
    (("--held-out", 1, "--official-test", "test"), "test")])
def test_vggsound(tmp_path, ten, options, second):
    root = build_vggsound(tmp_path / "VGGSound", ten)
    records, rejects = run("vggsound", root, out=tmp_path / "v.jsonl", options=options)
    bee = records["-0abcDEFghi_000030"]
    assert bee == bee | FACTS | {
        "source": "vggsound", "class": "bee, wasp, etc. buzzing", "split": "train",
        "subset": "AV-Loose", "path": "VGGSound/vggsound_00/-0abcDEFghi_000030.mp4",
        "origin": "-0abcDEFghi", "origin_start": 30.0, "t0": 2.5, "t1": 2.5 + 121 / 24}
    assert records["aaaaaaaaaaa_000001"]["subset"] == "AV-Tight"
    splits = {name: r["split"] for name, r in records.items()}
    assert splits.pop("under_scor__000000") == "validation"
    assert splits.pop("ccccccccccc_000005") == second
    leak = {} if second == "train" else {"ccccccccccc_000100": "leak"}
    if not leak:
        assert splits.pop("ccccccccccc_000100") == "train"
    assert splits == dict.fromkeys(
        ("-0abcDEFghi_000030", "aaaaaaaaaaa_000001", "aaaaaaaaaaa_000040"), "train")
    assert reasons(rejects) == {
        "aaaaaaaaaaa_000001": "duplicate",
        "aaaaaaaaaaa_000046": "overlap",
        "fffffffffff_000100": "unlisted",
        "my holiday": "unlisted",
        "ddddddddddd_000007": "missing_file",
        "eeeeeeeeeee": "invalid_record",
    } | leak


@pytest.mark.parametrize(("mode", "left"), [("exact", 3), ("overlap", 2), ("id", 1)])
def test_what_counts_as_a_duplicate_is_a_setting(tmp_path, ten, mode, left):
    root = build_vggsound(tmp_path / "VGGSound", ten)
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


def test_held_out_clips_per_subset(tmp_path, capsys):
    """By default the paper's: 138 AV-Tight, 554 AV-Loose, 39 in neither."""
    sizes = {"AV-Tight": 200, "AV-Loose": 700, "": 50}
    records = [{"id": f"{subset}{index}", "subset": subset, "class": f"c{index % 7}",
                "split": "test" if index < size else "train", "origin": f"{subset}{index}"}
               for subset, size in sizes.items() for index in range(size + 9)]
    args = parse(["vggsound", str(tmp_path)])
    found = hold_out_tests(records, args)
    assert len(found) == len(records)
    held = [r for r in found if r["split"] == "validation"]
    assert collections.Counter(r["subset"] for r in held) == {
        "AV-Tight": 138, "AV-Loose": 554, "": 39}
    assert {r["split"] for r in found} == {"train", "validation"}
    assert all(int(r["id"].removeprefix(r["subset"])) < sizes[r["subset"]] for r in held)
    args.held_out, args.official_test = [731], "test"
    found = hold_out_tests(records, args)
    assert collections.Counter(r["split"] for r in found) == {
        "train": 27, "validation": 731, "test": 950 - 731}
    args.held_out = [200, 701, 0]
    with pytest.raises(DataError, match="held_out=701: .* only 700 .*AV-Loose.*--held-out 200 700"):
        hold_out_tests(records, args)
    for flags in (["--held-out", "1", "2"], ["--held-out=-1"]):
        with pytest.raises(SystemExit):
            parse(["vggsound", str(tmp_path), *flags])
    with pytest.raises(SystemExit):
        parse(["folder", str(tmp_path), "--official-test", "test"])


def test_held_out_clips_are_drawn_from_what_the_doctor_left(tmp_path, ten, capsys):
    raw = tmp_path / "raw.jsonl"
    records, _ = run("vggsound", build_vggsound(tmp_path / "VGGSound", ten), out=raw,
                     options=("--leaks", "keep"))
    tests = {"under_scor__000000", "ccccccccccc_000005"}
    assert {name for name, record in records.items() if record["split"] == "test"} == tests
    clean = tmp_path / "clean" / "v.jsonl"  # without the one that a draw at the import would take
    kept = [record | {"path": f"../{record['path']}"} for name, record in records.items()
            if name != "under_scor__000000"]
    clean.parent.mkdir()
    clean.write_text("\n".join(map(json.dumps, kept)))
    clean.with_name("v.rejects.jsonl").write_text(
        json.dumps({"id": "under_scor__000000", "reason": "silent", "detail": "-90 dBFS"}) + "\n")
    out = tmp_path / "final.jsonl"
    assert main(["hold_out", str(clean), "--out", str(out), "--held-out", "1"]) == 0
    held, rejects = (
        {line["id"]: line for line in map(json.loads, path.read_text().splitlines())}
        for path in (out, tmp_path / "final.rejects.jsonl"))
    assert {name for name, r in held.items() if r["split"] != "train"} == {"ccccccccccc_000005"}
    assert (tmp_path / held["ccccccccccc_000005"]["path"]).is_file()
    assert reasons(rejects) == {"under_scor__000000": "silent", "ccccccccccc_000100": "leak"}
    assert main(["hold_out", str(clean), "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "held_out=138" in capsys.readouterr().err


def test_av_tight_and_loose_are_the_papers():
    subsets = load_subsets()
    tight, loose = set(subsets["AV-Tight"]), set(subsets["AV-Loose"])
    assert (len(tight), len(loose), len(tight & loose)) == (37, 146, 0)
    assert {"ripping paper", "eletric blender running"} <= tight  # stat.csv's own spelling
    assert {"police car (siren)", "bee, wasp, etc. buzzing"} <= loose


def test_held_out_recordings_of_another_set_are_not_trained_on(tmp_path, ten, capsys):
    root = build_vggsound(tmp_path / "VGGSound", ten)
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
