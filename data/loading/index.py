"""A split's index.json: foreign bytes until they were held against the schema.

A shard's file names end up in paths and its encodings choose what decodes the samples, a pickle
among others: nothing but what `data.prepare` writes is let through. Called by data.loading.sources
and data.stored.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from streaming.base.format.mds.encodings import get_mds_encoded_size
from typing_extensions import TypedDict

from data.schema import HASH, DataError, columns, how_to_prepare, load_metadata

Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 48)]
Samples = Annotated[int, Field(strict=True, gt=0, lt=1 << 32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class _File(TypedDict):
    basename: Name
    bytes: Count
    hashes: dict[str, str]


class _Shard(TypedDict):
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]
    compression: Literal["zstd"] | None
    format: Literal["mds"]
    hashes: list[str]
    raw_data: _File
    samples: Samples
    size_limit: int | None
    version: Literal[2]
    zip_data: _File | None


class _Index(TypedDict):
    shards: list[_Shard]
    version: Literal[2]


_ADAPTER = TypeAdapter(_Index)


def read_index(root: str | Path, split: str) -> list[dict[str, Any]]:
    """The shards of a split, as index.json lists them.

    Raises:
        DataError: the index is missing, damaged, or not one of this schema and dataset.json.
    """
    path = Path(root) / split / "index.json"
    if not path.is_file():
        raise DataError(f"data.root={root}: no split '{split}' ({path}); {how_to_prepare(root)}")
    encodings = columns(load_metadata(root))
    try:
        values = json.loads(path.read_bytes())
        shards = _ADAPTER.validate_python(values)["shards"]
        names: set[str] = set()
        for number, shard in enumerate(shards):
            fault = _fault(shard, encodings, names)
            if fault:
                raise ValueError(f"shard {number}: {fault}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: damaged ({where}: {first['msg']}); copy the data set again"
                        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); copy the data set again") from error
    return values["shards"]


def _fault(shard: _Shard, encodings: dict[str, str], names: set[str]) -> str | None:
    """What is not as data.prepare writes it; adds the shard's file names to `names`."""
    found = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if found != encodings:
        odd = sorted(set(found.items()) ^ set(encodings.items()))[0]
        return f"column {odd[0]} as {found.get(odd[0])}, not {encodings.get(odd[0])}"
    if shard["column_sizes"] != [get_mds_encoded_size(e) for e in shard["column_encodings"]]:
        return f"column_sizes {shard['column_sizes']}"
    if (shard["compression"] is None) != (shard["zip_data"] is None):
        return f"compression {shard['compression']}, zip_data {shard['zip_data']}"
    for file in (shard["raw_data"], shard["zip_data"]):
        if file is None:
            continue
        if HASH not in file["hashes"]:
            return f"{file['basename']} without {HASH}"
        if file["basename"] in names:
            return f"{file['basename']} is there twice"
        names.add(file["basename"])
    return None


def check_split(root: str | Path, split: str, whole: bool) -> None:
    """DataError unless the split's index is right and, if ``whole``, so is every shard's size."""
    folder, shards = Path(root) / split, read_index(root, split)
    for shard in shards if whole else ():
        files = [info for info in (shard["raw_data"], shard["zip_data"]) if info]
        sizes = {info["basename"]: info["bytes"] for info in files}
        found = {n: os.path.getsize(folder / n) for n in sizes if (folder / n).is_file()}
        if not found:
            raise DataError(f"{folder / list(sizes)[-1]}: shard missing; copy the data set again")
        for name, size in found.items():
            if size != sizes[name]:
                raise DataError(
                    f"{folder / name}: {size} bytes, index.json says {sizes[name]}; "
                    f"copy the data set again"
                )
