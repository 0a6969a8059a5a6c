"""Is a prepared data set what was written? Every file against its hash.

    python -m data.verify out/

prints one line per bad file; exits 0 if there is none, else 1.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from streaming.base.hashing import get_hash
from tqdm import tqdm

from data.loading.index import read_index
from data.schema import HASH, TEXT_FILE, DataError, Metadata, load_metadata
from data.stored import shard_faults

READERS = 8  # files that are read at a time


def faults(root: Path) -> Iterator[str]:
    """One line per file that is missing, cut short or altered, and per count that is wrong."""
    try:
        metadata = load_metadata(root)
    except DataError as error:
        yield str(error)
        return
    bad = dict(_small_files(root, metadata))
    yield from bad.values()
    shards = []
    for split, count in metadata.counts.items():
        known = f"{split}/index.json" in bad  # one line per file
        try:
            index = read_index(root, split)
        except DataError as error:
            if not known:
                yield str(error)
            continue
        held = sum(shard["samples"] for shard in index)
        if held != count and not known:
            yield f"{root / split / 'index.json'}: {held} samples, dataset.json says {count}"
        shards += [(split, shard) for shard in index]
    with ThreadPoolExecutor(READERS) as pool:
        checks = pool.map(lambda place: shard_faults(root, *place), shards)
        for lines in tqdm(checks, total=len(shards), unit="shard", desc="verify", leave=False):
            yield from lines


def _small_files(root: Path, metadata: Metadata) -> Iterator[tuple[str, str]]:
    """(name, line) of every bad file that is not a shard."""
    for name in sorted(metadata.files.keys() | {TEXT_FILE}):
        path = root / name
        if not path.is_file():
            yield name, f"{path}: missing"
            continue
        found = get_hash(HASH, path.read_bytes())
        if found != metadata.files.get(name, found):
            yield name, f"{path}: {HASH} {found}, not {metadata.files[name]}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("data.verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    root = parser.parse_args(arguments).root
    lines = list(faults(root))
    for line in lines:
        print(line)
    verdict = f"{len(lines)} faults" if lines else "every file is what was written"
    print(f"{root}: {verdict}", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
