"""Files that are there whole or not at all, and lines of JSON that a kill may have cut."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False, default=str))


def write_text(path: Path, text: str) -> None:
    """Atomic: the file is there whole or not at all, also after a power cut."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; none yet: no records. A last line that a kill cut is left out.

    Raises:
        ValueError: a line that is no JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_torn_line(path: Path) -> None:
    """Take off what a kill left of a JSON-lines file's last line: the next would be glued to it.

    `read_lines` skips such a line until then.
    """
    text = path.read_bytes() if path.exists() else b"\n"
    if not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def keep_lines_before(path: Path, first_step: int) -> None:
    """Drop a JSON-lines file's records from `first_step` on: a resumed run does them again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines()
            if _is_before(line, first_step)]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(aside, path)


def _is_before(line: str, first_step: int) -> bool:
    try:
        return json.loads(line)["step"] < first_step
    except ValueError:  # the last line of a killed run may be cut
        return False
