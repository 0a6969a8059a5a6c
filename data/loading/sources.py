"""Where the shards of a run are: streams, local or remote, checked against each other.

A stream is one folder that `data.prepare` wrote: every sample of one shape. Streams of different
shapes may be mixed if all that the model is built from agrees (`data.provenance`). Reading here
needs no process group, so that bad data are refused before a GPU is touched. Called by train.py
and data.loading.loader.
"""

import functools
import os
import re
import tempfile
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field
from pydantic.dataclasses import dataclass
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader
from streaming.base.util import bytes_to_int, retry
from torch import Tensor

from common.settings import STRICT
from data.loading.index import check_split
from data.loading.order import choose_per_epoch
from data.schema import (
    HASH,
    METADATA_FILE,
    TEXT_FILE,
    DataError,
    Metadata,
    load_metadata,
    load_text_states,
)


@dataclass(frozen=True, config=STRICT)
class StreamConfig:
    """One prepared data set: `root`, a folder, or `remote`, e.g. s3://bucket/prefix."""

    root: Annotated[str | None, Field(description="Local folder.")] = None
    remote: Annotated[str | None, Field(description="Address, e.g. s3://bucket/prefix.")] = None
    proportion: Annotated[float | None, Field(
        gt=0, description="Relative share of an epoch; null, for all streams: every sample "
        "once.")] = None
    name: Annotated[str | None, Field(
        description="In messages and in the cache; null: the last part of the place.")] = None

    def __post_init__(self) -> None:
        if (self.root is None) == (self.remote is None):
            raise ValueError(
                f"data: a stream has root={self.root} and remote={self.remote}; give exactly one"
            )
        if self.remote is not None and not urlsplit(self.remote).scheme:
            raise ValueError(
                f"data: remote={self.remote} is not an address; a local folder is a root")

    @property
    def place(self) -> str:
        return str(self.root or self.remote)

    @property
    def label(self) -> str:
        return self.name or self.place.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where the shards are and how they are read: one of `root`, `remote` and `streams`."""

    root: Annotated[str | None, Field(description="Local folder.")] = None
    remote: Annotated[str | None, Field(description="Address, e.g. s3://bucket/prefix.")] = None
    streams: Annotated[list[StreamConfig], Field(
        description="Several data sets, each with root or remote, proportion and name.")] = field(
        default_factory=list)
    train_split: Annotated[str, Field(description="Split to train on.")] = "train"
    validation_split: Annotated[str, Field(
        description="Split to validate on; `train` shows whether a model can memorise."
    )] = "validation"
    num_workers: Annotated[int, Field(
        ge=0, description="Loader processes per rank; 0: the rank itself.")] = 2
    shuffle: Annotated[bool, Field(
        description="Shuffle each epoch; false for an order that can be read off.")] = True
    shuffle_block: Annotated[int, Field(
        ge=1, description="Samples that are mixed at a time; part of the order.")] = 1 << 18
    num_canonical_nodes: Annotated[int, Field(
        ge=1, description="Above 1, a node reads only its share of the shards; part of the "
        "order.")] = 1
    cache_dir: Annotated[str | None, Field(
        description="On the node's own disk; null: next to the shards, or in TMPDIR.")] = None
    cache_limit: Annotated[str | None, Field(
        description="Per node, e.g. 200gb; the coldest shards make room. null: no limit.")] = None
    download_retries: Annotated[int, Field(
        ge=1, description="Of a remote file; raise it for a store that throttles.")] = 4
    download_timeout_seconds: Annotated[float, Field(
        gt=0, description="Of one attempt; raise it for a slow store.")] = 60.0
    on_bad_shard: Annotated[Literal["stop", "substitute"], Field(
        description="Stop at a damaged shard or sample, or take its neighbour.")] = "stop"
    max_substituted_fraction: Annotated[float, Field(
        ge=0, lt=1, description="Of a split's samples that may lie in bad shards.")] = 0.01

    def __post_init__(self) -> None:
        given = [key for key in ("root", "remote", "streams") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(
                f"data: {' and '.join(given) or 'no place'} given; set exactly one of data.root, "
                "data.remote and data.streams (an override of a file's streams: data.streams=[])"
            )
        weighted = [stream.label for stream in self.all_streams if stream.proportion is not None]
        if len(weighted) not in (0, len(self.all_streams)):
            raise ValueError(
                f"data.streams: only {', '.join(weighted)} has a proportion; give it to all "
                "streams or to none"
            )
        labels = [stream.label for stream in self.all_streams]
        for label in labels:
            if labels.count(label) > 1 or not re.fullmatch(r"[\w.-]+", label):
                raise ValueError(f"data.streams: name {label!r} must be unique, of [A-Za-z0-9_.-]")
        try:
            bytes_to_int(self.cache_limit or 0)
        except ValueError as error:
            raise ValueError(
                f"data.cache_limit={self.cache_limit}: must be a size like 200gb") from error

    @property
    def all_streams(self) -> list[StreamConfig]:
        return list(self.streams) or [StreamConfig(self.root, self.remote)]

    @property
    def place(self) -> str:
        """Where the data are, in words."""
        return ", ".join(stream.place for stream in self.all_streams)


class Opened(NamedTuple):
    """What is known of a stream without reading a shard."""

    label: str
    place: str
    metadata: Metadata
    text_states: dict[str, Tensor]
    version: str  # hash of its index files: another preparation never shares this one's cache


def open_streams(config: DataConfig) -> list[Opened]:
    """Read and check the small files of every stream; a few small downloads if it is remote.

    DataError, the same on every rank, if a file is missing or damaged.
    """
    return [_open(stream, config) for stream in config.all_streams]


def check_data(config: DataConfig, global_batch_size: int) -> list[Opened]:
    """Everything known before training without reading a sample.

    DataError if a file is missing, or there is less than one global batch of some shape.
    """
    opened = open_streams(config)
    counts = [stream.metadata.counts.get(config.train_split, 0) for stream in opened]
    chosen = choose_per_epoch(counts, [stream.proportion for stream in config.all_streams])
    for bucket, members in buckets(opened).items():
        samples = sum(chosen[index] for index in members)
        if samples < global_batch_size:
            names = ", ".join(opened[index].place for index in members)
            raise DataError(
                f"global_batch_size={global_batch_size}: split '{config.train_split}' of {names} "
                f"has only {samples} samples of shape {'x'.join(map(str, bucket))} an epoch; lower "
                "it or prepare more clips"
            )
    return opened


def buckets(opened: list[Opened]) -> dict[tuple[int, int, int], list[int]]:
    """(frames, height, width) -> its streams, in the order in which the shapes first occur."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for index, stream in enumerate(opened):
        data = stream.metadata
        found.setdefault((data.frames, data.height, data.width), []).append(index)
    return found


def needs_cache(stream: StreamConfig, config: DataConfig) -> bool:
    """Whether shards are unpacked elsewhere than next to the compressed ones.

    Eviction deletes files, so that a cache limit never works on the user's own.
    """
    if stream.root is None or config.cache_dir or config.cache_limit:
        return True
    splits = {config.train_split, config.validation_split}
    folders = [Path(stream.root) / split for split in splits]
    return any(
        not os.access(folder, os.W_OK)
        and any(not path.with_suffix("").is_file() for path in folder.glob("*.zstd"))
        for folder in folders
    )


def _open(stream: StreamConfig, config: DataConfig) -> Opened:
    splits = (config.train_split, config.validation_split)
    if stream.root is not None:
        folder = Path(stream.root)
        metadata, states = load_metadata(folder), load_text_states(folder)
        for split in splits:
            check_split(folder, split, whole=config.on_bad_shard == "stop")
        return Opened(stream.label, stream.place, metadata, states, _version(folder, splits))
    assert stream.remote is not None
    return _open_remote(stream.remote, stream.label, splits, config.download_retries,
                        config.download_timeout_seconds)


@functools.cache
def _open_remote(
    remote: str, label: str, splits: tuple[str, ...], retries: int, seconds: float
) -> Opened:
    """Every rank fetches the few small files itself: there is no process group yet to wait in."""
    names = [METADATA_FILE, TEXT_FILE, *(f"{split}/index.json" for split in set(splits))]
    with tempfile.TemporaryDirectory(prefix="avfulldit-") as temporary:
        folder = Path(temporary)
        for name in names:
            fetch(f"{remote.rstrip('/')}/{name}", folder / name, retries, seconds)
        for split in splits:
            check_split(folder, split, whole=False)
        return Opened(label, remote, load_metadata(folder), load_text_states(folder),
                      _version(folder, splits))


def fetch(address: str, path: Path, retries: int, seconds: float) -> None:
    """One file through streaming's downloader of this address; DataError when it gives up."""
    try:
        downloader = CloudDownloader.get(address)
        retry(clean_up_fn=downloader.clean_up, num_attempts=retries)(
            lambda: downloader.download(address, str(path), seconds)
        )()
        downloader.clean_up()
    except Exception as error:
        raise DataError(
            f"data.remote: {address} cannot be fetched ({error}); look at the address, the "
            "credentials and S3_ENDPOINT_URL"
        ) from error


def _version(folder: Path, splits: tuple[str, ...]) -> str:
    indices = b"".join((folder / split / "index.json").read_bytes() for split in splits)
    return get_hash(HASH, indices)
