"""Files that are there whole or not at all, lines of JSON that a kill may have cut, and sha256."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LOCK_SECONDS = 5.0


@contextmanager
def whole_file(path: Path, mode: str = "w", aside: Path | None = None) -> Iterator[IO[Any]]:
    """A file to write that takes its name when it is whole, also after a power cut.

    Args:
        mode: "w" (UTF-8; half a character becomes "?") or "wb".
        aside: its name until then, where a reader of the folder would take `path`.tmp for its own.

    Raises:
        OSError: disk full, no permission, ...; whatever is raised before the file has its name,
            `path` is as it was and nothing is left next to it.
    """
    aside = aside or path.with_name(path.name + ".tmp")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "errors": "replace"}
    try:
        with open(aside, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, values: Any) -> None:
    """Indented JSON; what JSON does not know becomes a string."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """JSON lines, all of the file."""
    with whole_file(path) as file:
        file.writelines(map(json_line, records))


def json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def read_lines(
    path: Path, skip_damaged: bool = False, whole: bool = False
) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; none where there is no such file yet.

    A torn last line is left out: a kill cut it, or another process is writing it.

    Args:
        skip_damaged: any other line that is not a JSON object is left out, with a warning.
        whole: the file was written by `write_lines`: it must exist, and a torn last line is damage.

    Raises:
        ValueError: for such a line otherwise, by file and number.
        FileNotFoundError: under ``whole``.
    """
    found = []
    lines = path.read_bytes().split(b"\n") if whole or path.is_file() else [b""]
    for number, line in enumerate(lines, start=1):
        record = _json_object(line)
        if record is not None:
            found.append(record)
        elif number < len(lines) or (whole and line):
            told = f"{path}:{number}: not a JSON object: {ascii(line.decode(errors='replace')):.60}"
            if not skip_damaged:
                raise ValueError(told)
            print(f"warning: {told}; it is left out", file=sys.stderr, flush=True)
    return found


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Add to a JSON-lines file, which is made if need be: all records, on the disk, or none.

    A torn last line is mended first. Processes that append at the same time take turns.

    Raises:
        OSError: disk full, no permission, ...; nothing was added.
    """
    text = memoryview("".join(map(json_line, records)).encode(errors="replace"))
    with open(path, "ab+", buffering=0) as file, _locked(file):
        _mend_last_line(file)
        size = file.seek(0, os.SEEK_END)
        try:
            while text:  # a disk that is nearly full takes a part
                text = text[file.write(text):]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def mend_last_line(path: Path) -> None:
    """Take off a last line that a kill has torn, or end it: the next would be glued to it."""
    if path.is_file():
        with open(path, "rb+", buffering=0) as file:
            _mend_last_line(file)


def _mend_last_line(file: IO[bytes]) -> None:
    if not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read() == b"\n":
        return
    file.seek(0)
    data = file.read()
    begin = data.rfind(b"\n") + 1
    if _json_object(data[begin:]) is None:
        file.truncate(begin)
    else:
        file.write(b"\n")


@contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Alone in a file, where its file system has locks and nobody holds one for LOCK_SECONDS."""
    until = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < until:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # no locks there
            break
    yield  # closing the file gives the lock back


def keep_lines_before(path: Path, first_step: int) -> None:
    """Drop a JSON-lines file's records from `first_step` on: a resumed run writes them again.

    Records without a step go, too, and, with a warning, what is not a JSON object.
    """
    if path.is_file():
        records = read_lines(path, skip_damaged=True)
        write_lines(path, [record for record in records
                           if isinstance(record.get("step"), int) and record["step"] < first_step])


def file_sha256(path: Path) -> str:
    """Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(values: Mapping[str, Any]) -> str:
    """Of JSON values in one order: what a file carries that checks itself."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
