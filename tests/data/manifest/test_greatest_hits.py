"""The Greatest Hits in miniature: takes, their versions and marks, and where the cut is taken."""

from pathlib import Path

import pytest

from tests.support.inputs.trees import CUT, place, reasons, run, take


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """One clip of ten seconds, to be copied."""
    return take(tmp_path_factory.mktemp("source") / "ten.mp4")


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


def test_greatest_hits_in_linked_folders_and_in_two_sizes(tmp_path, ten):
    """The set on another disk, its small copy beside it: marks are found, no take is lost."""
    name, disk, root = "2015-02-16-16-49-06", tmp_path / "disk", tmp_path / "sets"
    place(ten, disk / f"{name}_denoised.mp4", root / f"vis-data-256/{name}_denoised.mp4")
    (disk / f"{name}_times.txt").write_text("3.0 metal hit deform\n")
    (root / "vis-data").symlink_to(disk)
    records, rejects = run("greatest_hits", root, out=tmp_path / "g.jsonl")
    [record] = records.values()
    assert record["path"] == f"disk/{name}_denoised.mp4" and len(record["marks"]) == 1
    [line] = rejects.values()
    assert line["reason"] == "duplicate" and "vis-data-256" in line["path"]


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
