"""The manifest: one JSON object a line, one clip each. Faulty lines are reported, never fatal."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.schema import DataError

REQUIRED = ("id", "path", "video_caption", "audio_caption")
LONGEST = 1e9  # seconds; beyond it t0 is a mistake, and an integer may not even fit a float


@dataclass(frozen=True)
class Fault:
    """A line that describes no usable clip."""

    clip_id: str
    reason: str  # "invalid_record" or "duplicate_id"
    detail: str
    line: int


def read_manifest(path: Path, default_split: str) -> tuple[list[dict[str, Any]], list[Fault]]:
    """(records with `split` filled in, faults), in the order of the file.

    DataError if the file is missing or holds no line at all.
    """
    if not path.is_file():
        raise DataError(f"manifest={path}: no such file; one JSON object a line is needed")
    records: list[dict[str, Any]] = []
    faults: list[Fault] = []
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
    if not records and not faults:
        raise DataError(f"manifest={path}: empty; one JSON object a line is needed")
    return records, faults


def _parse(line: str, default_split: str) -> dict[str, Any]:
    """One record; ValueError says what is wrong with it."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    record.setdefault("split", default_split)
    for key in (*REQUIRED, "split"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"key '{key}' is missing or no string")
    if not record["id"] or not record["path"]:
        raise ValueError("key 'id' or 'path' is empty")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", record["split"]):
        raise ValueError(f"split={record['split']!r}: letters, digits, '-' and '_' only")
    t0 = record.get("t0")
    if t0 is not None and (isinstance(t0, bool) or not isinstance(t0, int | float)):
        raise ValueError(f"t0={t0!r}: must be a number of seconds")
    if t0 is not None and not abs(t0) < LONGEST:  # JSON parses NaN, Infinity and any integer
        raise ValueError(f"t0={t0!s:.40}: must be a finite number of seconds")
    if "\0" in record["path"]:
        raise ValueError("key 'path' holds a zero byte: no file name can")
    check_text(record)
    return record


def check_text(record: dict[str, Any]) -> None:
    """ValueError naming a key whose text no tokenizer, file name or UTF-8 file can hold."""
    for key, value in record.items():
        try:
            json.dumps({key: value}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"key {ascii(key)[1:-1]!r} holds a lone surrogate (half of a character, such as "
                f"\\ud83d): write the whole character or drop it"
            ) from error


def _id_in(line: str, number: int) -> str:
    """The id of a faulty line, or its line number: nothing disappears without a name."""
    try:
        clip_id = json.loads(line)["id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        clip_id = None
    return clip_id if isinstance(clip_id, str) and clip_id else f"line {number}"
