"""The files of `data.captions`: one of each kind that grows, and one that joins them.

A line is written whole or not at all as far as a reader can tell: a half-written last line, a
killed run's, is cut off before the next one is appended.
"""

import collections
import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.files import mend_last_line, read_lines, write_lines
from data.clips.decode import CutSpec
from data.schema import DataError

KINDS = ("video", "audio")
Record = dict[str, Any]


@dataclass(frozen=True)
class CaptionJob:
    """One kind of caption: who makes it, from what, and where it goes."""

    kind: str  # of KINDS
    part: Path
    rejects: Path
    spec: CutSpec
    model: str
    prompt: str
    sampling: str

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for two captions to stand in one file."""
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:12]
        return {"model": self.model, "prompt": digest, "sampling": self.sampling}


def read_part(job: CaptionJob) -> dict[str, Record]:
    """id -> line of the captions that are there; a half-written last line does not count.

    DataError if another model, prompt or sampling made them, or if a line is damaged.
    """
    try:
        lines = read_lines(job.part)
    except ValueError as error:
        raise DataError(f"{error}; delete the line to caption it again") from error
    found: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        try:
            name, made = line["id"], {key: line[key] for key in job.identity}
        except KeyError as error:
            raise DataError(
                f"{job.part}:{number}: {error} is missing; delete the line to caption it again"
            ) from error
        for key, value in job.identity.items():
            if made[key] != value:
                raise DataError(
                    f"{job.part}:{number}: made with {key} {made[key]!r}, this run has {value!r}; "
                    "captions of both do not mix: give another --out, or delete the file"
                )
        found[name] = line
    return found


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """The file without a half-written last line, locked; DataError if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"out={path}: another process is writing it; wait, or give each its own --out"
            ) from error
        mend_last_line(path)
        yield file


def join(out: Path, parts: list[Path]) -> collections.Counter[str]:
    """Write `out` whole from the files of both kinds; counts of captions per kind."""
    merged: dict[str, Record] = {}
    counts: collections.Counter[str] = collections.Counter()
    for kind, path in zip(KINDS, parts, strict=True):
        for line in read_lines(path):
            found = {f"{kind}_{key}": line[key] for key in ("caption", "model", "prompt")}
            merged.setdefault(line["id"], {"id": line["id"]}).update(found)
            counts[kind] += 1
    write_lines(out, list(merged.values()))
    counts["both"] = sum(len(line) == 7 for line in merged.values())
    return counts
