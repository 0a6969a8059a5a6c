"""Which checkpoints a run has, which one it resumes from, and which ones go.

A tag is a folder RUN/checkpoints/stepXXXXXXXX. It counts when its manifest is there and every file
has the size that it says; it is resumed only when every byte has the hash, too.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from training.distributed import World, broadcast_object, gather_objects
from training.manifest import MANIFEST, Manifest, read_manifest, wrong_size
from training.run_dir import CheckpointError
from training.storage import file_sha256

PROTECTED = "PROTECTED"  # a file of this name in a tag keeps it for ever


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last `last`, every `every` steps, and the protected ones."""

    last: int = 2
    every: int | None = None


class Found(NamedTuple):
    """A checkpoint whose every byte was checked, and the newer ones that were not whole."""

    tag: Path
    manifest: Manifest
    damaged: dict[Path, str]  # tag -> what is wrong with it


def tag_of(step: int) -> str:
    return f"step{step:08d}"


def remove(tag: Path) -> None:
    """Manifest first: a half-deleted tag must not count. What cannot be deleted is only told."""
    try:
        (tag / MANIFEST).unlink(missing_ok=True)
        if tag.exists():
            shutil.rmtree(tag)
    except OSError as error:
        print(f"warning: {tag} could not be deleted: {error}", file=sys.stderr, flush=True)


def prune(run_dir: Path, retention: Retention) -> None:
    """Delete what is not retained, after a save; also what killed saves left, and damaged ones."""
    whole = complete_tags(run_dir)
    keep = set(whole[-retention.last:])
    if retention.every:
        keep |= {tag for tag in whole if int(tag.name[4:]) % retention.every == 0}
    for tag in sorted((run_dir / "checkpoints").glob("step*")):
        if tag not in keep and not (tag / PROTECTED).exists():
            remove(tag)


def set_aside(tag: Path) -> None:
    """A damaged tag stops counting, so that it is not one of those kept; the next save deletes it.

    The manifest is kept under another name, for whoever wants to know.
    """
    os.replace(tag / MANIFEST, tag / f"damaged_{MANIFEST}")


def complete_tags(run_dir: Path) -> list[Path]:
    """Tags with a manifest and all files in their right sizes, oldest first."""
    found = []
    for path in sorted((run_dir / "checkpoints").glob(f"step*/{MANIFEST}")):
        try:
            manifest = read_manifest(path.parent)
        except CheckpointError:
            continue  # find_checkpoint tells
        if not wrong_size(path.parent, manifest):
            found.append(path.parent)
    return found


def find_checkpoint(run_dir: Path, world: World) -> Found | None:
    """The newest checkpoint of which every byte is right; None for a fresh start.

    Every file is read and hashed, by one rank or another. A damaged checkpoint is passed over for
    the one before it, which `Found.damaged` tells.

    Raises:
        CheckpointError: on every rank, when there are checkpoints but none is whole.
    """
    tags = sorted((path.parent for path in run_dir.glob(f"checkpoints/step*/{MANIFEST}")),
                  reverse=True)
    damaged: dict[Path, str] = {}
    for tag in broadcast_object(tags, world):
        manifest, problem = broadcast_object(_read(tag) if world.is_main else None, world)
        problems = gather_objects(
            problem or wrong_size(tag, manifest) or wrong_hash(
                tag, list(manifest.files)[world.rank :: world.world_size], manifest), world)
        told = next((problem for problem in problems if problem), None)
        if told is None:
            return Found(tag, manifest, damaged)
        damaged[tag] = told
    if damaged:
        raise CheckpointError(
            f"{run_dir}/checkpoints holds checkpoints but none can be resumed "
            f"({next(iter(damaged.values()))}): move them away to start afresh"
        )
    return None  # a tag without a manifest was never finished: a kill in the first save


def _read(tag: Path) -> tuple[Manifest | None, str | None]:
    try:
        return read_manifest(tag), None
    except CheckpointError as error:
        return None, str(error)


def wrong_hash(tag: Path, names: list[str], manifest: Manifest) -> str | None:
    try:
        for name in names:
            if file_sha256(tag / name) != manifest.files[name][1]:
                return f"{tag / name} differs from its sha256 in {MANIFEST}"
    except OSError as error:
        return str(error)
    return None
