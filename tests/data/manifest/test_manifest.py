"""What is made of manifests without looking into a clip: windows, splits, captions."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data.clips.probe import Probe
from data.manifest import read_captions, read_manifest, read_records
from data.manifest.__main__ import main
from data.manifest.records import CutRule, densest_window
from data.manifest.splits import ALT_MERGE, hold_out, merge_alt
from data.schema import DataError

CUT = 49 / 24


@pytest.mark.parametrize("fps", [10, 15, 29.97])
def test_no_window_holds_more_marks(fps):
    """And they are in its middle, where neither the take's ends nor other marks forbid it."""
    generator, rule = np.random.default_rng(0), CutRule(49, 24.0, "marks")
    for trial in range(200):
        times = np.arange(round(8 * fps)) / fps
        found = Probe(0, 0, 0.0, 1.0, times, times[-1] + 1 / fps, 0.0, 8.0)
        marks = np.sort(generator.uniform(0, found.end, generator.integers(1, 30)))
        start = densest_window(marks.tolist(), found, rule, random.Random(trial))
        assert start in times and start + CUT <= found.end + 0.003
        fits = times[times + CUT <= found.end + 0.002]
        counts = [np.sum((marks >= s) & (marks < s + CUT)) for s in fits]
        inside = marks[(marks >= start) & (marks < start + CUT)]
        assert len(inside) == max(counts)
        centred = fits[np.abs(fits - (inside[0] + inside[-1] - CUT) / 2).argmin()]
        assert start == centred or np.sum((marks >= centred) & (marks < centred + CUT)) != len(
            inside) or not np.all((inside >= centred) & (inside < centred + CUT))


def synthetic(root: Path, source: str, count: int, classes: int, test: int = 0) -> Path:
    path = root / f"{source}.jsonl"
    lines = [{"id": f"{source}_{index}", "path": "x.mp4", "source": source,
              "class": f"c{index % classes}", "origin": f"{source}{index // 2}",
              "split": "validation" if index < test else "train"} for index in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_alt_merge_holds_out_300_of_3254(tmp_path, capsys):
    sizes = {"avsync15": (1499, 15, 150), "landscape": (778, 9, 102), "greatest_hits": (977, 20, 0)}
    manifests = [synthetic(tmp_path, source, *size) for source, size in sizes.items()]
    out = tmp_path / "sub" / "alt.jsonl"
    assert main(["alt_merge", *map(str, manifests), "--out", str(out)]) == 0
    records, faults = read_records(out, "train")
    assert not faults
    held = [record for record in records if record["split"] == "validation"]
    assert {s: sum(r["source"] == s for r in held) for s in ALT_MERGE} == ALT_MERGE
    assert all(int(r["id"].rpartition("_")[2]) < sizes[r["source"]][2]
               for r in held if r["source"] != "greatest_hits")  # of the sets' own lists
    per_class = [sum(r["class"] == f"c{k}" for r in held if r["source"] == "avsync15")
                 for k in range(15)]
    assert per_class == [8] * 15
    ledger = out.with_name("alt.rejects.jsonl").read_text().splitlines()
    assert len(records) + len(ledger) == 3254
    assert {json.loads(line)["reason"] for line in ledger} == {"leak"}
    origins = {r["origin"] for r in held}
    assert not any(r["origin"] in origins for r in records if r["split"] == "train")
    assert records[0]["path"] == "../x.mp4"
    first = out.read_bytes()
    assert main(["alt_merge", *map(str, reversed(manifests)), "--out", str(out)]) == 0
    assert out.read_bytes() == first
    assert main(["alt_merge", *map(str, manifests), "--out", str(out), "--seed", "1"]) == 0
    assert out.read_bytes() != first


def test_alt_merge_wants_its_three_sets(tmp_path):
    manifests = [synthetic(tmp_path, source, 10, 2) for source in ("avsync15", "landscape")]
    with pytest.raises(DataError, match="no clip of greatest_hits"):
        merge_alt(manifests, ALT_MERGE, 0)
    with pytest.raises(DataError, match="source='vggsound'"):
        merge_alt([synthetic(tmp_path, "vggsound", 10, 2)], ALT_MERGE, 0)
    manifests.append(synthetic(tmp_path, "greatest_hits", 10, 2))
    again = tmp_path / "l2.jsonl"
    again.write_bytes(manifests[1].read_bytes())
    with pytest.raises(DataError, match=r"id=.landscape_0.: both .*landscape.jsonl and .*l2.jsonl"):
        merge_alt([*manifests, again], ALT_MERGE, 0)
    with pytest.raises(DataError, match="held_out=10: there are 10 clips"):
        hold_out(read_records(manifests[0], "train")[0], 10, 0)


def test_alt_merge_keeps_the_ledgers_of_its_sets(tmp_path, capsys):
    """Or the data card could not say what became of the clips that the sets were given."""
    manifests = [synthetic(tmp_path, source, 20, 2) for source in ALT_MERGE]
    for source, reason in (("avsync15", "silent"), ("landscape", "portrait")):
        line = {"id": f"{source}_gone", "reason": reason, "detail": "so"}
        manifest_of(tmp_path / f"{source}.rejects.jsonl", line)
    out = tmp_path / "alt.jsonl"
    assert main(["alt_merge", *map(str, manifests), "--held-out", "2", "2", "2", "--out",
                 str(out)]) == 0
    ledger = map(json.loads, (tmp_path / "alt.rejects.jsonl").read_text().splitlines())
    assert {line["id"]: line["reason"] for line in ledger if line["reason"] != "leak"} == {
        "avsync15_gone": "silent", "landscape_gone": "portrait"}
    assert "portrait 1, silent 1" in capsys.readouterr().out


def test_alt_merge_keeps_out_what_others_hold_out(tmp_path, capsys):
    manifests = [str(synthetic(tmp_path, source, 20, 2)) for source in ALT_MERGE]
    other = manifest_of(tmp_path / "v.jsonl", *(
        {"id": f"{index}", "path": "x", "split": "validation", "origin": f"landscape{index}"}
        for index in range(10)))
    out = str(tmp_path / "alt.jsonl")
    command = ["alt_merge", *manifests, "--out", out, "--held-out", "2", "2", "2"]
    assert main(command) == 0 and main(["check", out, str(other)]) == 1
    assert "--keep-out" in capsys.readouterr().err
    assert main([*command, "--keep-out", str(other)]) == 0
    assert main(["check", out, str(other)]) == 0


@pytest.mark.parametrize("flag", [
    ("--frames", "9"), ("--fps", "25"), ("--cut", "marks"), ("--duplicates", "id"),
    ("--leaks", "keep"), ("--version", "mic"), ("--table", "t.csv"), ("--workers", "77")])
def test_flags_without_a_use_are_refused(tmp_path, capsys, flag):
    for command in (["alt_merge", "m.jsonl", "--out", "o.jsonl"], ["check", "m.jsonl"]):
        with pytest.raises(SystemExit):
            main([*command, *flag])
        assert f"{flag[0]}: {command[0]} does not use it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["check", "m.jsonl", "--keep-out", "o.jsonl"])


@pytest.mark.parametrize("flag", [
    ("--frames", "0"), ("--frames", "-5"), ("--fps", "0"), ("--fps", "nan"), ("--fps", "inf"),
    ("--workers", "0"), ("--held-out", "-3")])
def test_numbers_that_cannot_be_are_refused(tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        main(["folder", str(tmp_path), *flag])
    assert stop.value.code == 2
    assert f"argument {flag[0]}: {flag[1]}: must be" in capsys.readouterr().err


@pytest.mark.parametrize("odd", [
    {"t1": 10**400}, {"t1": "2"}, {"t0": True}, {"origin": ["tube"]}, {"source": []},
    {"class": 1}, {"sha256": {}}, {"origin_start": float("nan")}])
def test_a_field_of_another_kind_is_a_fault(tmp_path, odd):
    good = {"id": "a", "path": "x", "split": "train"}
    path = manifest_of(tmp_path / "m.jsonl", good, good | {"id": "b"} | odd)
    records, [fault] = read_records(path, "train")
    assert [record["id"] for record in records] == ["a"]
    assert (fault.clip_id, fault.reason) == ("b", "invalid_record")
    assert fault.detail.startswith(f"{next(iter(odd))}=") and len(fault.detail) < 120


def test_check_says_what_it_cannot_judge(tmp_path, capsys):
    good = {"id": "a", "path": "x", "origin": "tube"}
    whole = manifest_of(tmp_path / "whole.jsonl", good, {"id": "b", "path": "x", "origin": ""})
    assert main(["check", str(whole)]) == 0
    assert f"{whole}: the recording of 1 clips is unknown" in capsys.readouterr().err
    torn = tmp_path / "torn.jsonl"
    torn.write_text(json.dumps(good) + '\n{"id": "b", "pa\n[1]\n')
    merge = ["alt_merge", *(str(synthetic(tmp_path, source, 9, 2)) for source in ALT_MERGE),
             "--held-out", "1", "1", "1", "--out", str(tmp_path / "o.jsonl"), "--keep-out"]
    for command in (["check", str(whole)], merge):
        assert main([*command, str(torn)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"error: {torn}: line 2: not JSON" in error and "(2 such lines)" in error


def manifest_of(path: Path, *lines: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_captions_join_by_id_and_faults_name_what_is_missing(tmp_path):
    manifest = manifest_of(
        tmp_path / "m.jsonl",
        {"id": "own", "path": "x", "video_caption": "v", "audio_caption": "a"},
        {"id": "both", "path": "x"},
        {"id": "half", "path": "x"},
        {"id": "none", "path": "x"},
    )
    file = tmp_path / "captions.jsonl"
    manifest_of(file, {"id": "both", "video_caption": "V", "video_model": "m"},
                {"id": "both", "audio_caption": "A"}, {"id": "half", "audio_caption": "A"},
                {"id": "own", "audio_caption": "new"})
    captions = read_captions(file)
    assert captions["both"] == {"video_caption": "V", "audio_caption": "A"}
    records, faults = read_manifest(manifest, "train", captions)
    assert {r["id"]: (r["video_caption"], r["audio_caption"]) for r in records} == {
        "own": ("v", "new"), "both": ("V", "A")}
    assert [(f.clip_id, f.reason, f.line) for f in faults] == [
        ("half", "no_caption", 3), ("none", "no_caption", 4)]
    assert "'video_caption'" in faults[0].detail
    records, faults = read_manifest(manifest, "train")
    assert [r["id"] for r in records] == ["own"]
    assert {f.reason for f in faults} == {"invalid_record"}
    assert len(read_records(manifest, "train")[0]) == 4


def test_no_sound_is_a_caption_that_is_known(tmp_path):
    manifest = manifest_of(tmp_path / "m.jsonl", *({"id": name, "path": "x"} for name in "abcd"))
    file = manifest_of(
        tmp_path / "c.jsonl", {"id": "a", "video_caption": "v", "audio_caption": ""},
        {"id": "b", "video_caption": "v", "audio_caption": ""}, {"id": "b", "audio_caption": "A"},
        {"id": "b", "audio_caption": ""}, {"id": "c", "video_caption": "", "audio_caption": ""},
        {"id": "d", "video_caption": "v"})
    records, faults = read_manifest(manifest, "train", read_captions(file))
    assert {r["id"]: r["audio_caption"] for r in records} == {"a": "", "b": "A"}
    assert [f.clip_id for f in faults] == ["c", "d"] and "without sound" in faults[1].detail
    file = tmp_path / "c.csv"
    file.write_text("id,video_caption,audio_caption\na,v,\n")
    assert read_captions(file) == {"a": {"video_caption": "v"}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", "", "empty"),
        ("c.jsonl", '{"id": "a", "video_cap', "line 1 is not JSON"),
        ("c.jsonl", "[1]", "line 1 is not a JSON object"),
        ("c.jsonl", '{"video_caption": "x"}', "line 1 has no 'id'"),
        ("c.jsonl", '{"id": "a", "video_caption": 3}', "is not a string"),
        ("c.jsonl", '{"id": "a", "video_caption": "\\ud83d"}', "lone surrogate"),
        ("c.jsonl", '{"id": "a", "video_caption": "x"}\n{"id": "a", "video_caption": "y"}',
         "line 2 gives 'a' another 'video_caption'"),
        ("c.csv", "name,text\na,b\n", "it must name 'id'"),
        ("c.csv", "id,audio_caption\n,b\n", "line 2 has no 'id'"),
    ],
)
def test_odd_captions_files_are_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_captions(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_captions(tmp_path / "gone.jsonl")
