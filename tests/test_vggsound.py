"""VGGSound in miniature: both file-name conventions, odd ids, quoted labels, splits, duplicates."""

import json

import pytest

from data.manifest.__main__ import main
from data.manifest.vggsound import load_subsets, parse_name
from tests.trees import FACTS, build_vggsound, reasons, run, take


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """One clip of ten seconds, to be copied."""
    return take(tmp_path_factory.mktemp("source") / "ten.mp4")


def test_vggsound(tmp_path, ten):
    root = build_vggsound(tmp_path / "VGGSound", ten)
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
