"""Reading a manifest: faulty lines are reported, never fatal. Captions may come from a file."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.clips.cut import CutSpec
from data.manifest.captions import CAPTIONS, check_text
from data.schema import DataError

REQUIRED = ("id", "path", "split")
# Not needed, but of these kinds where they are given.
SECONDS = ("t0", "t1", "origin_start")
TEXTS = ("source", "class", "subset", "origin", "origin_part", "sha256")
LONGEST = 1e9  # seconds; beyond it t0 is a mistake, and an integer may not even fit a float


@dataclass(frozen=True)
class Fault:
    """A line that describes no usable clip."""

    clip_id: str
    reason: str  # "invalid_record", "duplicate_id" or "no_caption"
    detail: str
    line: int


Captions = dict[str, dict[str, str]]  # id -> those of CAPTIONS that are known


def read_manifest(
    path: Path, default_split: str, captions: Captions | None = None
) -> tuple[list[dict[str, Any]], list[Fault]]:
    """(records with `split` and both captions, faults), in the order of the file.

    Args:
        captions: what `read_captions` gave; it wins over the record's own. A record that then
            lacks one is a Fault "no_caption". Without it every record must bring its own.

    DataError if the file is missing or holds no line at all.
    """
    found, faults, lines = _read(path, default_split)
    records = []
    for record, number in zip(found, lines, strict=True):
        lacking = find_lacking(record, captions)
        if lacking is None:
            records.append(record)
        else:
            faults.append(Fault(record["id"], *lacking, number))
    return records, sorted(faults, key=lambda fault: fault.line)


def find_lacking(record: dict[str, Any], captions: Captions | None) -> tuple[str, str] | None:
    """Joins the record with its captions; (reason, detail) if it then lacks one."""
    if captions is not None:
        record |= captions.get(record["id"], {})
    missing = next((k for k in CAPTIONS if not isinstance(record.get(k), str)), None)
    if missing is None:
        return None
    if captions is None:
        return "invalid_record", f"key '{missing}' is missing or no string"
    detail = f"no '{missing}', neither in the manifest nor in the captions file"
    if missing == "audio_caption":
        detail += '; a clip without sound takes "" (in JSONL)'
    return "no_caption", detail


def read_records(path: Path, default_split: str) -> tuple[list[dict[str, Any]], list[Fault]]:
    """As `read_manifest`, for who needs no captions: the records may lack them."""
    records, faults, _ = _read(path, default_split)
    return records, faults


def check_lengths(records: list[dict[str, Any]], spec: CutSpec) -> None:
    """DataError if the manifest was cut to another length than is asked for: its captions, marks
    and filters are those of its own cuts.
    """
    for record in records:
        if not all(isinstance(record.get(key), int | float) for key in ("t0", "t1")):
            continue
        length = record["t1"] - record["t0"]
        if abs(length * spec.fps - spec.frames) > 0.5:
            raise DataError(
                f"frames={spec.frames}, fps={spec.fps:g}, but the manifest cuts {record['id']} to "
                f"{length:.3f} s (t0 to t1); give the same --frames and --fps to both"
            )


def _read(
    path: Path, default_split: str
) -> tuple[list[dict[str, Any]], list[Fault], list[int]]:
    """(records, faults, the line of each record)."""
    if not path.is_file():
        raise DataError(f"manifest={path}: no such file; one JSON object a line is needed")
    records: list[dict[str, Any]] = []
    faults: list[Fault] = []
    numbers: list[int] = []
    seen: dict[str, int] = {}  # id -> line
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _parse(line, default_split)
        except ValueError as error:
            faults.append(Fault(_id_in(line, number), "invalid_record", str(error), number))
            continue
        first = seen.setdefault(record["id"], number)
        if first != number:
            detail = f"line {first} has this id already"
            faults.append(Fault(record["id"], "duplicate_id", detail, number))
            continue
        records.append(record)
        numbers.append(number)
    if not records and not faults:
        raise DataError(f"manifest={path}: empty; one JSON object a line is needed")
    return records, faults, numbers


def _parse(line: str, default_split: str) -> dict[str, Any]:
    """One record; ValueError says what is wrong with it."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    record.setdefault("split", default_split)
    for key in REQUIRED:
        if not isinstance(record.get(key), str):
            raise ValueError(f"key '{key}' is missing or no string")
    if not record["id"] or not record["path"]:
        raise ValueError("key 'id' or 'path' is empty")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", record["split"]):
        raise ValueError(f"split={record['split']!r}: letters, digits, '-' and '_' only")
    for key in SECONDS:
        _check_seconds(key, record.get(key))
    for key in TEXTS:
        if not isinstance(record.get(key, ""), str):
            raise ValueError(f"{key}={str(record[key]):.40}: must be a string")
    if "\0" in record["path"]:
        raise ValueError("key 'path' holds a zero byte: no file name can")
    check_text(record)
    return record


def _check_seconds(key: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}={value!r}: must be a number of seconds")
    if not abs(value) < LONGEST:  # JSON parses NaN, Infinity and any integer
        raise ValueError(f"{key}={value!s:.40}: must be a finite number of seconds")


def _id_in(line: str, number: int) -> str:
    """The id of a faulty line, or its line number: nothing disappears without a name."""
    try:
        clip_id = json.loads(line)["id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        clip_id = None
    return clip_id if isinstance(clip_id, str) and clip_id else f"line {number}"
