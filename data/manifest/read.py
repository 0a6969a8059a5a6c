"""Reading a manifest: faulty lines are reported, never fatal. Captions may come from a file.

Captions by clip id, from a file of their own, are JSONL or CSV, by hand or by `data.captions`.
Lines may give one caption each; "audio_caption": "" in JSONL says that a clip has no sound. A line
that ends in the middle (a killed writer's last) is an error that names it, as is a second,
different caption of the same clip.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.clips.cut import CutSpec
from data.reasons import reject
from data.schema import DataError

REQUIRED = ("id", "path", "split")
# Not needed, but of these kinds where they are given.
SECONDS = ("t0", "t1", "origin_start")
TEXTS = ("source", "class", "subset", "origin", "origin_part", "sha256")
LONGEST = 1e9  # seconds; beyond it t0 is a mistake, and an integer may not even fit a float
CAPTIONS = ("video_caption", "audio_caption")


@dataclass(frozen=True)
class Fault:
    """A line that describes no usable clip."""

    clip_id: str
    reason: str  # of data.reasons.REASONS
    detail: str
    line: int

    def as_reject(self) -> dict[str, Any]:
        return reject({"id": self.clip_id}, self.reason, self.detail) | {"line": self.line}


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


def read_captions(path: Path) -> dict[str, dict[str, str]]:
    """id -> {"video_caption", "audio_caption"}, those of the two that the file gives.

    JSONL: {"id", "video_caption", "audio_caption"} a line; CSV (by its ending): the same names as
    header, an empty cell gives nothing. Other keys are left alone. DataError, in one line, for
    anything else.
    """
    captions: dict[str, dict[str, str]] = {}
    for number, row in _rows(path):
        clip_id = row.get("id")
        if not isinstance(clip_id, str) or not clip_id:
            raise DataError(f"captions={path}: line {number} has no 'id'; give the clip's id")
        known = captions.setdefault(clip_id, {})
        for key in CAPTIONS:
            text = row.get(key)
            if text == "" and key == "audio_caption" and path.suffix.lower() != ".csv":
                known.setdefault(key, "")  # without sound, unless another line gives a text
            if text is None or text == "":  # given by another line, or not at all
                continue
            if not isinstance(text, str):
                raise DataError(f"captions={path}: line {number}: '{key}' is not a string")
            try:
                check_text({key: text})
            except ValueError as error:
                raise DataError(f"captions={path}: line {number}: {error}") from error
            if known.get(key) == "":
                known[key] = text
            if known.setdefault(key, text) != text:
                raise DataError(
                    f"captions={path}: line {number} gives {clip_id!r} another '{key}' than an "
                    f"earlier line; keep one"
                )
    if not captions:
        raise DataError(f"captions={path}: empty; 'id', {' and '.join(CAPTIONS)} are needed")
    return captions


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of every line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                rows = csv.DictReader(file)
                missing = {"id"} - set(rows.fieldnames or ())
                if missing or not set(CAPTIONS) & set(rows.fieldnames or ()):
                    raise DataError(
                        f"captions={path}: header {rows.fieldnames}; it must name 'id' and "
                        f"{' or '.join(CAPTIONS)}"
                    )
                for row in rows:
                    yield rows.line_num, row
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(path, number, line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"captions={path}: cannot be read as UTF-8 text ({error})") from error


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"captions={path}: line {number} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"captions={path}: line {number} is not a JSON object")
    return row


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
