"""A prepared data set as files: indices, shards, hashes, samples; read-only, without a loader.

For `data.verify` and `data.inspect`, which must be able to look at a damaged folder. Training
reads through `data.loading.loader`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstd
from streaming.base.compression import decompress
from streaming.base.format import reader_from_json
from streaming.base.hashing import get_hash

from data.loading.index import read_index
from data.schema import HASH, UNREADABLE, DataError


def shard_faults(root: Path, split: str, shard: dict[str, Any]) -> list[str]:
    """One line per file of a shard that is missing or not what index.json says."""
    files = [info for info in (shard.get("zip_data"), shard["raw_data"]) if info]
    present = [info for info in files if (root / split / info["basename"]).is_file()]
    if not present:  # the compressed one travels, the other is made of it when it is read
        return [f"{root / split / files[0]['basename']}: missing"]
    found = ((info, file_fault(root / split / info["basename"], info)) for info in present)
    return [f"{root / split / info['basename']}: {fault}" for info, fault in found if fault]


def file_fault(path: Path, info: dict[str, Any]) -> str | None:
    """What is wrong with a file, given its {"bytes", "hashes"}; None if nothing is."""
    size = path.stat().st_size
    if size != info["bytes"]:
        return f"{size} bytes, not {info['bytes']}"
    found, expected = get_hash(HASH, path.read_bytes()), info["hashes"][HASH]
    return None if found == expected else f"{HASH} {found}, not {expected}"


def read_shard(root: Path, split: str, shard: dict[str, Any]) -> list[bytes]:
    """The encoded samples of one shard, from either of its files."""
    path = root / split / shard["raw_data"]["basename"]
    if path.is_file():
        data = path.read_bytes()
    else:
        path = root / split / shard["zip_data"]["basename"]
        data = decompress(shard["compression"], path.read_bytes())
    count = int(np.frombuffer(data[:4], np.uint32)[0])
    if count != shard["samples"]:
        raise ValueError(f"{count} samples, index.json says {shard['samples']}")
    bounds = np.frombuffer(data[4 : 4 * (count + 2)], np.uint32)  # (count + 1,)
    return [data[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def iter_samples(
    root: Path, split: str, indices: list[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Samples of a split as columns, in order; only those of `indices` (sorted) if given.

    DataError naming the shard that cannot be read.
    """
    first = 0
    for shard in read_index(root, split):
        last = first + shard["samples"]
        wanted = [i - first for i in indices if first <= i < last] if indices is not None else None
        first = last
        if wanted == []:
            continue
        faults = shard_faults(root, split, shard)
        if faults:
            raise DataError(f"{faults[0]}; copy the data set again")
        try:
            encoded = read_shard(root, split, shard)
            reader = reader_from_json(str(root), split, shard)
            for index in range(len(encoded)) if wanted is None else wanted:
                yield reader.decode_sample(encoded[index])
        except (*UNREADABLE, zstd.Error) as error:
            path = root / split / shard["raw_data"]["basename"]
            raise DataError(f"{path}: cannot be decoded ({error!r}); prepare it again") from error
