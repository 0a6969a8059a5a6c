"""Which checkpoints a run has, which one it resumes from, and which ones go.

A tag is a folder RUN/checkpoints/stepXXXXXXXX. It counts when manifest.json is there and every file
has the size that it says; it is resumed only when every byte has the hash, too.
"""

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from common.files import file_sha256
from common.ranks import World, broadcast_object, gather_objects
from training.checkpoint.contents import MANIFEST, Contents, FormatError, read_contents, wrong_size
from training.checkpoint.run_dir import CheckpointError, step_of, tags_in

PROTECTED = "PROTECTED"  # a file of this name in a tag keeps it


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last `last`, every `every` steps, and the protected ones."""

    last: int = 2
    every: int | None = None


class Found(NamedTuple):
    """A checkpoint whose every byte was checked, and the newer ones that were passed over."""

    tag: Path
    contents: Contents
    damaged: dict[Path, str]  # tag -> what is wrong with it
    unread: dict[Path, str]  # tag -> the error that kept it from being read; it may be whole


class Problem(NamedTuple):
    words: str
    # unread: the disk's fault, which may pass; foreign: of another version of the code.
    state: Literal["unfinished", "damaged", "unread", "foreign"]


def tag_of(step: int) -> str:
    return f"step{step:08d}"


def remove(tag: Path) -> None:
    """Manifest first: a half-deleted tag must not count. What cannot be deleted is a warning."""
    try:
        (tag / MANIFEST).unlink(missing_ok=True)
        if tag.exists():
            shutil.rmtree(tag)
    except OSError as error:
        print(f"warning: {tag} could not be deleted: {error}", file=sys.stderr, flush=True)


def prune(run_dir: Path, retention: Retention) -> None:
    """Delete what is not retained, after a save; also what killed saves left, and damaged ones.

    What only cannot be read now, or by this code, stays: it may be whole.
    """
    problems = {tag: _problem(tag) for tag in tags_in(run_dir)}
    whole = [tag for tag, problem in problems.items() if problem is None]
    keep = set(whole[-retention.last:])
    if retention.every:
        keep |= {tag for tag in whole if step_of(tag) % retention.every == 0}
    keep |= {tag for tag, problem in problems.items()
             if problem and problem.state in ("unread", "foreign")}
    for tag in problems:
        if tag not in keep and not _is_protected(tag):
            remove(tag)


def _is_protected(tag: Path) -> bool:
    try:
        return (tag / PROTECTED).exists()
    except OSError:
        return True  # it may be


def set_aside(found: Found) -> None:
    """The newer tags that a resume has passed over stop counting: the run leaves them behind.

    A damaged one keeps its manifest.json under another name, to be looked into; the next save
    deletes it. One that could not be read may be whole, and is itself given another name: under its
    own, a later start would go on from it, without the records that this start writes again.
    """
    for tag in found.damaged:
        os.replace(tag / MANIFEST, tag / f"damaged_{MANIFEST}")
    for tag in found.unread:
        aside = tag.with_name(f"{tag.name}.unread-{time.strftime('%Y%m%dT%H%M%S')}")
        try:
            os.rename(tag, aside)
        except OSError as error:
            print(f"warning: {tag} cannot be renamed ({error}): move it away, or a later start "
                  "may go on from it", file=sys.stderr, flush=True)


def complete_tags(run_dir: Path) -> list[Path]:
    """Tags with manifest.json and all files in their right sizes, oldest first."""
    return [tag for tag in tags_in(run_dir) if _problem(tag) is None]


def _problem(tag: Path) -> Problem | None:
    contents, problem = _read(tag)
    return problem if contents is None else _check(tag, [], contents)


def find_checkpoint(run_dir: Path, world: World) -> Found | None:
    """The newest checkpoint of which every byte is right; None for a fresh start.

    Every file is read and hashed, by one rank or another. A damaged checkpoint is passed over for
    the one before it, listed in `Found.damaged`; so is one that cannot be read, in `Found.unread`.

    Raises:
        CheckpointError: on every rank, when there are checkpoints but none is whole, or a newer
            one than the newest whole one is of another version of the code.
    """
    damaged: dict[Path, str] = {}
    unread: dict[Path, str] = {}
    for tag in broadcast_object(tags_in(run_dir)[::-1], world):
        contents, problem = broadcast_object(_read(tag) if world.is_main else None, world)
        if problem and problem.state == "unfinished":
            continue  # a kill in a save
        if problem and problem.state == "foreign":
            raise CheckpointError(problem.words)
        share = list(contents.files)[world.rank :: world.world_size] if contents else []
        found = gather_objects(problem or _check(tag, share, contents), world)
        problems = sorted(filter(None, found), key=lambda problem: problem.state == "unread")
        if not problems:
            return Found(tag, contents, damaged, unread)
        told = problems[0]  # what is known to be wrong counts more than what could not be read
        (unread if told.state == "unread" else damaged)[tag] = told.words
    if damaged or unread:
        raise CheckpointError(
            f"{run_dir}/checkpoints holds checkpoints but none can be resumed "
            f"({next(iter((damaged | unread).values()))}): "
            f"{'make them readable, or ' if unread else ''}move them away to start afresh"
        )
    return None


def _read(tag: Path) -> tuple[Contents | None, Problem | None]:
    try:
        return read_contents(tag), None
    except FormatError as error:
        return None, Problem(str(error), "foreign")
    except CheckpointError as error:
        cause = error.__cause__
        missing, erring = isinstance(cause, FileNotFoundError), isinstance(cause, OSError)
        return None, Problem(
            str(error), "unfinished" if missing else "unread" if erring else "damaged")


def _check(tag: Path, names: list[str], contents: Contents) -> Problem | None:
    try:
        wrong = wrong_size(tag, contents) or wrong_hash(tag, names, contents)
    except OSError as error:
        return Problem(str(error), "unread")
    return Problem(wrong, "damaged") if wrong else None


def wrong_hash(tag: Path, names: list[str], contents: Contents) -> str | None:
    for name in names:
        if file_sha256(tag / name) != contents.files[name][1]:
            return f"{tag / name} differs from its sha256 in {MANIFEST}"
    return None
