"""The sets as they lie on disk: AVSync15, Landscape, The Greatest Hits, VGGSound, any folder.

Layouts are those of the downloads (AVSync15 and the lists: lzhangbj/ASVA; Landscape: the copy by
researchmm/MM-Diffusion). What is listed and absent, or present and not listed, goes to the ledger.
`origin` is the recording a clip is cut from (a YouTube id, "" where the name does not say) and
`origin_start` where in it the file begins: what duplicates and leaks are found by; `origin_part`
is the rest of a name whose pieces start nowhere known (`<id>_<first s>_<piece>`). The id is the
file's name, or its path where several folders hold a file of that name.

The Greatest Hits are takes of a drumstick. Files of a take `YYYY-MM-DD-HH-MM-SS[-n]`:
`<id>_denoised.mp4`, `<id>_denoised_thumb.mp4` (small), `<id>_mic.mp4`, and `<id>_times.txt` with
lines `seconds material action reaction`. Hits and scratches are kept as ground truth of the cut,
[seconds from t0, material, action, reaction].

VGGSound is `vggsound.csv` (no header: id, start, label, split) and clips of ten seconds, called
`<id>_<start, 6 digits>.mp4` in seconds, or `<id>_<start>_<end>.mp4` in milliseconds (or seconds). A
YouTube id has 11 characters, may begin with `-` and hold `_`; labels that hold commas are quoted.
Ours: id `<id>_<start, 6 digits>`, whatever the file is called.
"""

import collections
import csv
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from data.manifest.read import read_records
from data.manifest.records import Listing, Record, find_media
from data.reasons import reject
from data.schema import DataError

SPLITS = {"train": "train", "test": "validation"}  # the sets' own names -> ours
# <id>_<first s>_<last s>_<from>_<to>: VGGSound's ten seconds and the part of them that was kept.
AVSYNC15 = re.compile(r"(?P<id>.{11})_(?P<first>\d{6})_\d{6}_(?P<part>\d+(\.\d+)?)_\d+(\.\d+)?")
YOUTUBE = re.compile(r"(?P<id>[\w-]{11})_(?P<first>\d{1,6})(?P<part>_.*)?")
VERSIONS = ("denoised", "denoised_thumb", "mic")
TAKE = re.compile(r"(?P<id>\d{4}(?:-\d\d){5}(?:-\d+)?)_(?P<version>denoised|denoised_thumb|mic)")
MARKS = ("hit", "scratch")
NAME = re.compile(r"(?P<id>.{11})_(?P<start>\d+)(?:_(?P<end>\d+))?", re.ASCII)
SUBSETS = Path(__file__).with_name("vggsound_subsets.json")  # Table 6, in stat.csv's spelling


def list_avsync15(root: Path) -> Listing:
    """root/{train,test}.txt with lines `<class>/<clip>.mp4[,start,end]`, root/videos/<class>/."""
    return _by_lists(root, {split: root / "videos" for split in SPLITS}, "avsync15", "AVSync15")


def list_landscape(root: Path) -> Listing:
    """root/[videos/]{train,test}/<class>/...; its lists, if there, are relative to that part."""
    videos = root / "videos" if (root / "videos").is_dir() else root
    parts = {split: videos / split for split in SPLITS}
    if not parts["train"].is_dir():
        raise DataError(
            f"root={root}: neither {root / 'videos/train'} nor {root / 'train'} is a folder; give "
            "the one that holds them"
        )
    if (root / "train.txt").is_file():
        return _by_lists(root, parts, "landscape", "Landscape")
    words = _class_names(root)
    clips = {split: _scan(folder) for split, folder in parts.items() if folder.is_dir()}
    names = [(split, name, None) for split in clips for name in clips[split]]
    records = [_clip(parts, "landscape", "Landscape", words, *entry) for entry in names]
    _tell_apart(records, parts)
    return Listing(records, [])


def list_folder(root: Path) -> Listing:
    """Any tree of media files: id = path below root, class = the folder it lies in."""
    records = [
        {
            "id": path.relative_to(root).as_posix(),
            "source": "folder",
            "class": path.parent.relative_to(root).as_posix() if path.parent != root else "",
            "split": "train",
            "subset": "",
            "path": str(path),
            "origin": "",
            "origin_start": 0.0,
        }
        for path in find_media(root)
    ]
    return Listing(records, [])


def list_playground(root: Path) -> Listing:
    """What `python -m playground.world` wrote: its manifest, and impacts from events.jsonl."""
    found, faults = read_records(root / "manifest.jsonl", "train")
    path = root / "events.jsonl"
    if not path.is_file():
        raise DataError(f"root={root}: no events.jsonl; write it with `python -m playground.world`")
    marks_of: dict[str, list] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            truth = json.loads(line)
            marks_of[truth["id"]] = [[float(event["time"]), truth["material"], "impact"]
                                     for event in truth["events"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: line {number} is damaged ({error!r}); write the clips again "
                            "with `python -m playground.world`") from error
    records = []
    for record in found:
        marks = marks_of.get(record["id"], [])
        record |= {"subset": record.get("class", ""), "origin": record["id"], "origin_start": 0.0}
        records.append(record | {"path": str(root / record["path"]), "marks": marks})
    rejects = [fault.as_reject() for fault in faults]
    return Listing(records, rejects)


def _by_lists(root: Path, parts: dict[str, Path], source: str, subset: str) -> Listing:
    """The clips that train.txt and test.txt name, below the folder of each."""
    words, done = _class_names(root), Listing([], [])
    seen: dict[Path, str] = {}
    for split in parts:
        for number, name, t0 in _read_list(root / f"{split}.txt"):
            where = f"{split}.txt line {number}"
            if Path(name).is_absolute() or ".." in Path(name).parts:
                line = {"id": f"{source}_{Path(name).stem}", "path": name}
                done.rejects.append(reject(line, "invalid_record", f"{where}: outside the set"))
                continue
            record = _clip(parts, source, subset, words, split, name, t0)
            path = Path(record["path"])
            first = seen.setdefault(path, where)
            if first != where:
                done.rejects.append(reject(record, "duplicate", f"{where}: {first} has it too"))
            elif not path.is_file():
                done.rejects.append(reject(record, "missing_file", f"{where} names it"))
            else:
                done.records.append(record)
    for split in sorted({folder: split for split, folder in parts.items()}.values()):
        for name in _scan(parts[split]):
            record = _clip(parts, source, subset, words, split, name, None)
            if Path(record["path"]) not in seen:
                done.rejects.append(reject(record, "unlisted", "neither train.txt nor test.txt"))
    if not done.records:
        raise DataError(
            f"root={root}: none of the {len(seen)} listed clips lies below {parts['train']}; "
            "unpack videos.tar.gz there"
        )
    _tell_apart(done.records, parts)
    return done


def _tell_apart(records: list[Record], parts: dict[str, Path]) -> None:
    """Ids of whole paths for those whose file name alone is not theirs."""
    base = os.path.commonpath(list(parts.values()))
    counts = collections.Counter(record["id"] for record in records)
    for record in records:
        if counts[record["id"]] > 1:
            path = Path(record["path"]).relative_to(base).as_posix()
            record["id"] = f"{record['source']}_{path}"


def _read_list(path: Path) -> list[tuple[int, str, float | None]]:
    """(line number, name, start of the cut or None) of every line `name` or `name,start,end`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; the set's own list is needed")
    entries: list[tuple[int, str, float | None]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(map(str.strip, lines), start=1):
        pinned = re.fullmatch(r"(.+),(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", line)
        if pinned:
            entries.append((number, pinned[1], float(pinned[2])))
        elif line:
            entries.append((number, line, None))
    return entries


def _scan(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_media(folder)]


def _class_names(root: Path) -> dict[str, str]:
    """class_mapping.json: folder -> words. Not every copy has it."""
    path = root / "class_mapping.json"
    if not path.is_file():
        return {}
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in words.items()}
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: no JSON object of names ({error}); fetch it again") from error


def _clip(
    parts: dict[str, Path],
    source: str,
    subset: str,
    words: dict[str, str],
    split: str,
    name: str,
    t0: float | None,
) -> Record:
    """The candidate for the clip `name` below the folder of `split`."""
    path = parts[split] / name
    folder = path.parent.relative_to(parts[split]).as_posix()
    origin, start, part = parse_origin(path.stem)
    record: dict[str, Any] = {
        "id": f"{source}_{path.stem}",
        "source": source,
        "class": words.get(folder, folder.replace("_", " ")) if folder != "." else "",
        "split": SPLITS[split],
        "subset": subset,
        "path": str(path),
        "origin": origin,
        "origin_start": start,
    }
    if part:
        record["origin_part"] = part
    return record if t0 is None else record | {"t0": t0}


def parse_origin(stem: str) -> tuple[str, float, str]:
    """(YouTube id, second of it where the file begins, what else names the piece).

    ("", 0, "") if the name does not say.
    """
    if found := AVSYNC15.fullmatch(stem):
        return found["id"], int(found["first"]) + float(found["part"]), ""
    if found := YOUTUBE.fullmatch(stem):
        return found["id"], float(found["first"]), found["part"] or ""
    return "", 0.0, ""


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
            raise ValueError(f"{path.name} line {number}: {stamp} is not a time")
        if action in MARKS:
            marks.append([time, material, action, reaction])
    return marks


class Entry(NamedTuple):
    label: str
    split: str  # the csv's: train or test


def list_vggsound(root: Path, table: Path | None = None) -> Listing:
    """Every clip below root that the table names; `table` is root/vggsound.csv by default.

    The official test clips get split "test"; which of them are held out is chosen later.
    """
    table = table or next((p for p in (root / "vggsound.csv", root / "data/vggsound.csv")
                           if p.is_file()), root / "vggsound.csv")
    rows, rejects = read_table(table)
    subsets = {label: name for name, labels in load_subsets().items() for label in labels}
    records: dict[str, Record] = {}
    for path in find_media(root):
        record: Record = {"id": path.stem, "path": str(path)}
        parsed = parse_name(path.stem)
        row = rows.get(parsed) if parsed else None
        if parsed is None or row is None:
            detail = "no VGGSound file name" if parsed is None else f"not in {table.name}"
            rejects.append(reject(record, "unlisted", detail))
            continue
        clip_id = f"{parsed[0]}_{parsed[1]:06d}"
        record |= {
            "id": clip_id,
            "source": "vggsound",
            "class": row.label,
            "split": row.split,
            "subset": subsets.get(row.label, ""),
            "origin": parsed[0],
            "origin_start": float(parsed[1]),
        }
        first = records.setdefault(clip_id, record)
        if first is not record:
            rejects.append(reject(record, "duplicate", f"same id and start as {first['path']}"))
    for origin, start in sorted(set(rows) - {(r["origin"], r["origin_start"])
                                             for r in records.values()}):
        absent = {"id": f"{origin}_{start:06d}"}
        rejects.append(reject(absent, "missing_file", f"{table.name} names it; no file has it"))
    if not records:
        raise DataError(f"root={root}: no file of {table} lies below it; unpack the archives there")
    return Listing(list(records.values()), rejects)


def read_table(path: Path) -> tuple[dict[tuple[str, int], Entry], list[Record]]:
    """(id, start) -> label and split; odd lines as ledger lines."""
    if not path.is_file():
        raise DataError(f"table={path}: no such file; give VGGSound's csv with --table")
    rows: dict[tuple[str, int], Entry] = {}
    rejects = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True)
        try:
            for cells in reader:
                line = reader.line_num
                if len(cells) == 4 and cells[1].isdecimal() and cells[3] in ("train", "test"):
                    clip = cells[0], int(cells[1])
                    entry = Entry(cells[2], cells[3])
                    if rows.setdefault(clip, entry) != entry:
                        detail = f"{path.name} line {line}: another label or split than before"
                        rejects.append(reject({"id": cells[0]}, "duplicate", detail))
                elif cells:
                    detail = f"{path.name} line {line}: not `id,start,label,train|test`"
                    rejects.append(reject({"id": cells[0]}, "invalid_record", detail))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"table={path}: no UTF-8 csv ({error}); fetch it again") from error
    return rows, rejects


def parse_name(stem: str) -> tuple[str, int] | None:
    """(id, start in whole seconds) of a file name of either convention."""
    found = NAME.fullmatch(stem)
    if found is None:
        return None
    start = int(found["start"])
    # Ten seconds are 10 or 10,000 between both numbers: that gives the unit away.
    milliseconds = found["end"] is not None and int(found["end"]) - start >= 1000
    return found["id"], start // 1000 if milliseconds else start


def load_subsets() -> dict[str, list[str]]:
    """{"AV-Tight": labels, "AV-Loose": labels}."""
    return json.loads(SUBSETS.read_text(encoding="utf-8"))
