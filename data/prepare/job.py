"""Work to do and work done: one hidden folder next to `out`, shared by all workers.

    .out.partial/dataset.json       as it will be, counts open: all settings
    .out.partial/text.safetensors   the encoded "" and negative prompts
    .out.partial/shards/            one file per finished group of clips
    .out.partial/receipts/          one JSON per finished group: it counts once this is here
    .out.partial/workers/           one JSON per worker: rate and rejects, for `--status`
    .out.partial/root/              the data set as it is being merged; renamed to `out`

The clips are cut into groups by their place in the manifest alone, a group becomes one shard, and
worker k of n takes groups k, k+n, ...: the shards do not depend on n, nor on who was killed when.
"""

import dataclasses
import math
import os
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from common.files import file_sha256
from common.git import short_commit
from data.clips.cut import CutSpec
from data.manifest import Fault, read_captions, read_manifest
from data.schema import (
    ENCODING_VERSION,
    METADATA_FILE,
    DataError,
    Metadata,
    load_metadata,
    save_metadata,
)

SHARD_BYTES = 1 << 26  # about, uncompressed
MAX_CLIPS_PER_SHARD = 64  # what a killed worker may have to do again, and how work is shared out
TYPICAL_TEXT_ROWS = 128  # umT5 rows of a long caption
NAMES = ("commit", "wan", "tangoflux")  # for information: other fields identify these
OPEN_FIELDS = ("counts", "rejected", "files")  # of Metadata, known when all is done


class Item(NamedTuple):
    """One sample to be made."""

    record: dict[str, Any]  # the manifest's, with the sample's own id
    view: int  # which of the clip's cuts


class Group(NamedTuple):
    """What becomes one shard."""

    split: str
    number: int  # within the split
    items: list[Item]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class Job:
    """One manifest, one set of settings, one folder to be made."""

    manifest: Path
    out: Path
    metadata: Metadata  # dataset.json to be, counts open
    captions: Path | None = None

    @property
    def folder(self) -> Path:
        return partial_folder(self.out)

    @cached_property
    def _read(self) -> tuple[list[dict[str, Any]], list[Fault]]:
        captions = None if self.captions is None else read_captions(self.captions)
        return read_manifest(self.manifest, self.metadata.settings["split"], captions)

    @property
    def faults(self) -> list[Fault]:
        return self._read[1]

    @cached_property
    def groups(self) -> list[Group]:
        """All groups, split by split in the order of the manifest."""
        settings = self.metadata.settings
        views, size = settings["offsets"] * settings["crops"], settings["clips_per_shard"]
        splits: dict[str, list[Item]] = {}
        for record in self._read[0]:
            for view in range(views):
                name = record["id"] if views == 1 else f"{record['id']}@{view}"
                splits.setdefault(record["split"], []).append(Item(record | {"id": name}, view))
        return [
            Group(split, begin // size, items[begin : begin + size])
            for split, items in splits.items()
            for begin in range(0, len(items), size)
        ]

    @property
    def num_items(self) -> int:
        return sum(len(group.items) for group in self.groups)

    def receipt(self, group: Group) -> Path:
        return self.folder / "receipts" / f"{group.name}.json"

    def missing(self) -> list[Group]:
        """Groups without a receipt."""
        done = {path.name for path in (self.folder / "receipts").glob("*.json")}
        return [group for group in self.groups if f"{group.name}.json" not in done]

    def begin(self) -> None:
        """Make the folder, or join the workers that made it; DataError if the settings differ."""
        for name in ("shards", "receipts", "workers"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not (self.folder / METADATA_FILE).is_file():
            own = self.folder / f".{uuid.uuid4().hex}"
            own.mkdir()
            save_metadata(own, self.metadata)
            publish(own / METADATA_FILE, self.folder / METADATA_FILE)
            own.rmdir()
        refuse_change(self.out, load_metadata(self.folder), flat(self.metadata))


def partial_folder(out: Path) -> Path:
    """Where a data set is while it is being made; on the same file system, for the rename."""
    return out.with_name(f".{out.name}.partial")


def begun(out: Path) -> Metadata | None:
    """The settings that `out` was made with or is being made with; DataError if `out` is not ours.

    None if there is nothing yet.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / METADATA_FILE).is_file():
            raise DataError(f"out={out}: not empty; delete it or give another folder")
        return load_metadata(out)
    if (partial_folder(out) / METADATA_FILE).is_file():
        return load_metadata(partial_folder(out))
    return None


def clip_settings(
    manifest: Path, captions: Path | None, split: str, spec: CutSpec
) -> dict[str, Any]:
    """What a data set depends on besides the encoders and the shapes that Metadata names itself."""
    settings = dataclasses.asdict(spec)
    for name in ("fps", "frames", "height", "width", "sample_rate", "hop"):
        del settings[name]
    for name, path in {"manifest": manifest, "captions": captions}.items():
        settings[name] = None if path is None else _sha256(path)
    return settings | {
        "split": split, "encoding_version": ENCODING_VERSION, "commit": short_commit()
    }


def clips_per_shard(metadata: Metadata) -> int:
    """As many as fill a shard with captions of a usual length."""
    sample = 2 * (
        math.prod(metadata.video_latent_shape)
        + 2 * math.prod(metadata.audio_latent_shape)
        + TYPICAL_TEXT_ROWS * metadata.video_text_width
        + metadata.audio_text_length * metadata.audio_text_width
    )
    return max(1, min(MAX_CLIPS_PER_SHARD, SHARD_BYTES // sample))


def flat(metadata: Metadata) -> dict[str, Any]:
    """Field -> value of everything that all workers of a data set must agree on."""
    fields = dataclasses.asdict(metadata)
    settings, fingerprints = fields.pop("settings"), fields.pop("fingerprints")
    for name in NAMES:
        settings.pop(name, None)
    for name in OPEN_FIELDS:
        del fields[name]
    return fields | settings | {f"fingerprints.{k}": v for k, v in fingerprints.items()}


def refuse_change(out: Path, stored: Metadata, now: dict[str, Any]) -> None:
    """DataError naming the first field of `now` that `out` was begun or made with otherwise."""
    before = flat(stored)
    for field, value in now.items():
        if field in before and before[field] != value:
            complete = out.exists() and any(out.iterdir())
            folder = out if complete else partial_folder(out)
            way = "use the first value"
            if field == "encoding_version":
                way = f"use its own commit ({stored.settings.get('commit') or 'unknown'})"
            raise DataError(
                f"out={out}: {'not empty, made' if complete else 'begun'} with {field}="
                f"{_short(before[field])}, now {field}={_short(value)}; {way}, or "
                f"another out, or delete {folder}"
            )


def publish(path: Path, final: Path) -> bool:
    """Give a finished file its final name, whole or not at all; False if another one has it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(path, final)
    except FileExistsError:
        return False
    finally:
        path.unlink()
    return True


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _short(value: Any) -> str:
    """Hashes differ at their beginning."""
    text = str(value)
    return text if len(text) <= 40 else text[:12]
