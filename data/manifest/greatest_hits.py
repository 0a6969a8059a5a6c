"""The Greatest Hits: takes of a drumstick, each with the times and kinds of its marks.

Files of a take `YYYY-MM-DD-HH-MM-SS[-n]`: `<id>_denoised.mp4`, `<id>_denoised_thumb.mp4` (small),
`<id>_mic.mp4`, and `<id>_times.txt` with lines `seconds material action reaction`. Hits and
scratches are kept as ground truth of the cut, [seconds from t0, material, action, reaction].
"""

import collections
import math
import os
import re
from pathlib import Path

from data.manifest.records import Listing, Record, find_media, reject
from data.schema import DataError

VERSIONS = ("denoised", "denoised_thumb", "mic")
TAKE = re.compile(r"(?P<id>\d{4}(?:-\d\d){5}(?:-\d+)?)_(?P<version>denoised|denoised_thumb|mic)")
MARKS = ("hit", "scratch")


def list_greatest_hits(root: Path, version: str = "denoised") -> Listing:
    """One candidate per take that has the file of `version`; class = its most frequent marks."""
    done = Listing([], [])
    takes: dict[str, dict[str, Path]] = collections.defaultdict(dict)
    for path in find_media(root):
        if found := TAKE.fullmatch(path.stem):
            first = takes[found["id"]].setdefault(found["version"], path)
            if first is not path:
                line = _candidate(found["id"], path)
                done.rejects.append(reject(line, "duplicate", f"{first} is the same of this take"))
        else:
            done.rejects.append(
                reject({"id": path.stem, "path": path}, "unlisted", "not the name of a take")
            )
    if not takes:
        raise DataError(f"root={root}: no file <YYYY-MM-DD-HH-MM-SS>_{version}.mp4 below it")
    times = _find_times(root)
    for take, versions in sorted(takes.items()):
        record = _candidate(take, versions.get(version))
        if version not in versions:
            detail = f"no {take}_{version}.mp4, only {' and '.join(sorted(versions))}"
            done.rejects.append(reject(record, "missing_file", detail))
            continue
        try:
            record["marks"] = _read_marks(times.get(f"{take}_times.txt"), take)
        except ValueError as error:
            done.rejects.append(reject(record, "bad_marks", str(error)))
            continue
        kinds = collections.Counter(f"{mark[1]} {mark[2]}" for mark in record["marks"])
        record["class"] = kinds.most_common(1)[0][0] if kinds else ""
        done.records.append(record)
    return done


def _find_times(root: Path) -> dict[str, Path]:
    """Name -> file with marks, below linked folders too, as the clips are found."""
    return {name: Path(at) / name for at, _, names in os.walk(root, followlinks=True)
            for name in names if name.endswith("_times.txt")}


def _candidate(take: str, path: Path | None) -> Record:
    return {
        "id": f"greatest_hits_{take}",
        "source": "greatest_hits",
        "class": "",
        "split": "train",
        "subset": "Greatest Hits",
        "path": str(path or ""),
        "origin": take,
        "origin_start": 0.0,
    }


def _read_marks(path: Path | None, take: str) -> list[list]:
    """Hits and scratches of a take; ValueError if its file is absent or a line is odd."""
    if path is None:
        raise ValueError(f"no {take}_times.txt")
    marks: list[list] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            stamp, material, action, reaction = line.split()
            time = float(stamp)
        except ValueError:
            raise ValueError(
                f"{path.name} line {number}: {line[:60]!r} is not `seconds material action "
                "reaction`"
            ) from None
        if not math.isfinite(time):
            raise ValueError(f"{path.name} line {number}: {stamp} is no time")
        if action in MARKS:
            marks.append([time, material, action, reaction])
    return marks
