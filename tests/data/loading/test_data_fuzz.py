"""Foreign bytes in a data set: index and shards, damaged at random or with malice.

Whoever reads them gets a DataError or what was written; nothing is run, nothing is written outside
the data set's own folders.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming.base.compression import compress, decompress
from streaming.base.hashing import get_hash

from data.loading.shards import ShardDataset
from data.loading.sources import DataConfig, open_streams
from data.schema import HASH, DataError
from data.stored import iter_samples
from tests.support.inputs.prepared import write_shards
from tests.support.memory import released_shared_memory

ODD = (None, -1, 0, 10**12, 0.5, True, "", "x", "pkl", "../escaped", "/etc/hostname", [], {}, [{}])


class Original(NamedTuple):
    """A small data set."""

    root: Path
    files: dict[str, bytes]
    samples: list[dict[str, Any]]

    def __repr__(self) -> str:  # hypothesis prints it
        return f"Original({self.root})"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Original:
    root = write_shards(tmp_path_factory.mktemp("data") / "set", train=5, validation=1)
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")}
    return Original(root, files, list(iter_samples(root, "train")))


def restore(root: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(root)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def read_all(root: Path) -> list[dict[str, Any]]:
    config = DataConfig(str(root), num_workers=0)
    dataset = ShardDataset(config, open_streams(config), "train")
    return [dataset.get_item(index) for index in range(dataset.num_samples)]


def check_reader(read, root: Path, expected: list[dict[str, Any]] | None) -> None:
    try:
        found = read(root)
    except DataError as error:
        assert "\n" not in str(error).strip()
        return
    if expected is not None:
        assert [sample["id"] for sample in found] == [sample["id"] for sample in expected]
        for got, want in zip(found, expected, strict=True):
            assert all(np.array_equal(got[key], want[key]) for key in want)


def check(original, expected: list[dict[str, Any]] | None) -> None:
    """Both readers refuse, or give `expected` (None: anything whole)."""
    root, files, _ = original
    around = sorted(root.parent.parent.rglob("escaped*"))
    try:
        for read in (read_all, lambda root: list(iter_samples(root, "train"))):
            with released_shared_memory():  # outside: a caught error's frames hold the data set
                check_reader(read, root, expected)
        assert sorted(root.parent.parent.rglob("escaped*")) == around
    finally:
        restore(root, files)


def damage(content: bytearray, data: st.DataObject, end: int | None = None) -> bytes:
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        place = data.draw(st.integers(0, max(min(end or len(content), len(content)) - 1, 0)))
        if kind == "flip" and content:
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=8))
    return bytes(content)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_an_index_of_random_bytes(original, data):
    root, files, samples = original
    (root / "train/index.json").write_bytes(
        damage(bytearray(files["train/index.json"]), data))
    check(original, samples)


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON tree."""
    keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(
        node, list) else ()
    return [place for key in keys for place in [(node, key), *places(node[key])]]


@pytest.mark.parametrize("seed", range(60))
def test_an_index_with_an_odd_value(original, seed):
    chance = random.Random(seed)
    root, files, samples = original
    index = json.loads(files["train/index.json"])
    container, key = chance.choice(places(index))
    container[key] = chance.choice(ODD)
    (root / "train/index.json").write_text(json.dumps(index))
    check(original, samples)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in streaming's own reader
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_shard_with_its_right_hash(original, data):
    """As if whoever damaged the shard also rewrote the index."""
    root, files, _ = original
    index = json.loads(files["train/index.json"])
    shard = index["shards"][0]
    name = shard["zip_data"]["basename"]
    raw = bytearray(decompress("zstd", files[f"train/{name}"]))
    raw = damage(raw, data, end=data.draw(st.sampled_from([64, 2000, len(raw)])))
    packed = compress("zstd", raw)
    for part, content in (("raw_data", raw), ("zip_data", packed)):
        shard[part] |= {"bytes": len(content), "hashes": {HASH: get_hash(HASH, content)}}
    (root / f"train/{name}").write_bytes(packed)
    (root / "train/index.json").write_text(json.dumps(index))
    check(original, None)


@pytest.mark.parametrize("column", ["id", "video_latents"])
def test_a_pickle_is_not_run(original, tmp_path, column):
    root, files, _ = original
    index = json.loads(files["train/index.json"])
    for shard in index["shards"]:
        at = shard["column_names"].index(column)
        shard["column_encodings"][at] = "pkl"
        shard["column_sizes"][at] = None
    (root / "train/index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="pkl"):
        read_all(root)
    with pytest.raises(DataError, match="pkl"):
        list(iter_samples(root, "train"))
    restore(root, files)


def test_what_is_not_damaged_is_read(original):
    """Else the tests above would show nothing."""
    for read in (read_all, lambda root: list(iter_samples(root, "train"))):
        assert [sample["id"] for sample in read(original.root)] == [
            sample["id"] for sample in original.samples]
    restore(original.root, original.files)
