"""Captions by clip id, from a file of their own: JSONL or CSV, by hand or by `data.captions`.

Lines may give one caption each; "audio_caption": "" in JSONL says that a clip has no sound. A line
that ends in the middle (a killed writer's last) is an error that names it, as is a second,
different caption of the same clip.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.schema import DataError

CAPTIONS = ("video_caption", "audio_caption")


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
                raise DataError(f"captions={path}: line {number}: '{key}' is no string")
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
        raise DataError(f"captions={path}: line {number} is no JSON object")
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
