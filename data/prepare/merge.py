"""The last step: every group has a receipt; verify all shards, then make the data set visible.

Runs in the worker that finishes last, or by `--merge`. Killed in the middle it is run again: a
shard is moved once, everything else is written again, and `out` appears by one rename.
"""

import collections
import dataclasses
import fcntl
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from streaming.base.hashing import get_hash

from common.files import write_lines
from data.manifest.data_card import build_card, write_card
from data.manifest.records import read_ledger
from data.prepare.job import Group, Job
from data.schema import (
    HASH,
    METADATA_FILE,
    REJECTS_FILE,
    TEXT_FILE,
    DataError,
    Metadata,
    load_metadata,
    save_metadata,
)

SAMPLES_FILE = "samples.jsonl"  # every written record, with what was found out about its cut
READERS = 8  # shards that are hashed at a time


def merge(job: Job) -> Metadata:
    """Verify and publish; returns what dataset.json says.

    DataError if a group is missing, a shard is not what its receipt says (it is then encoded again
    by the next run), or not one clip is usable.
    """
    missing = job.missing()
    if missing:
        raise DataError(
            f"out={job.out}: {len(missing)} of {len(job.groups)} shards are not encoded yet "
            f"(first: {missing[0].name}); run the workers again"
        )
    try:
        with (job.folder / "merge.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two workers may finish at once; a kill releases it
            if (job.folder / METADATA_FILE).is_file():
                return _merge(job)
    except FileNotFoundError:
        if not (job.out / METADATA_FILE).is_file():
            raise
    return load_metadata(job.out)  # the other one was first


def _merge(job: Job) -> Metadata:
    receipts = [_read_receipt(job, group) for group in job.groups]
    root = job.folder / "root"
    places = _places(receipts)
    with ThreadPoolExecutor(READERS) as pool:
        faults = pool.map(lambda r: _fault(job, root, r, places.get(r["group"])), receipts)
        bad = [(receipt, fault) for receipt, fault in zip(receipts, faults, strict=True) if fault]
    for receipt, _ in bad:
        (job.folder / "receipts" / f"{receipt['group']}.json").unlink()
    if bad:
        raise DataError(
            f"out={job.out}: {len(bad)} of {len(receipts)} shards are not what was written (first: "
            f"{bad[0][0]['group']}: {bad[0][1]}); run the same command again, which encodes them"
        )
    rejects = [fault.as_reject() for fault in job.faults] + [
        reject for receipt in receipts for reject in receipt["rejects"]]
    samples = [sample for receipt in receipts for sample in receipt["samples"]]
    if not samples:
        _refuse_empty(job, rejects)
    root.mkdir(exist_ok=True)
    _move_shards(job, root, receipts, places)
    shutil.copyfile(job.folder / TEXT_FILE, root / TEXT_FILE)
    write_lines(root / REJECTS_FILE, rejects)
    write_lines(root / SAMPLES_FILE, samples)
    metadata = job.metadata
    left_out = [*read_ledger(job.manifest), *rejects]  # by the importer, then by us
    write_card(root, build_card(samples, left_out, metadata.fps, metadata.frames))
    files = sorted(
        path for path in root.rglob("*")  # .tmp: left by a kill, written again below
        if path.is_file() and path.suffix not in (".zstd", ".tmp") and path.name != METADATA_FILE
    )
    metadata = dataclasses.replace(
        metadata,
        counts=dict(collections.Counter(sample["split"] for sample in samples)),
        rejected=dict(collections.Counter(reject["reason"] for reject in rejects)),
        files={str(p.relative_to(root)): get_hash(HASH, p.read_bytes()) for p in files},
    )
    save_metadata(root, metadata)
    if job.out.is_dir():
        job.out.rmdir()  # empty, or this fails
    root.rename(job.out)
    shutil.rmtree(job.folder, ignore_errors=True)  # what is left is removed by the next run
    return metadata


def _read_receipt(job: Job, group: Group) -> dict[str, Any]:
    """DataError unless it accounts for every clip of its group."""
    receipt = json.loads(job.receipt(group).read_text(encoding="utf-8"))
    told = [record["id"] for record in receipt["samples"] + receipt["rejects"]]
    asked = [item.record["id"] for item in group.items]
    written = receipt["shard"]["samples"] if receipt["shard"] else 0
    if sorted(told) != sorted(asked) or written != len(receipt["samples"]):
        raise DataError(
            f"{job.receipt(group)}: lists {len(told)} clips, {written} in the shard; the group "
            f"has {len(asked)}; delete this file and run the same command again"
        )
    return receipt


def _places(receipts: list[dict[str, Any]]) -> dict[str, str]:
    """Group -> its shard's place in the data set, numbered from 0 in each split without gaps."""
    numbers: collections.Counter[str] = collections.Counter()
    places = {}
    for receipt in receipts:
        split = receipt["group"].rpartition("-")[0]
        if receipt["shard"]:
            places[receipt["group"]] = f"{split}/shard.{numbers[split]:05d}.mds"
            numbers[split] += 1
    return places


def _fault(job: Job, root: Path, receipt: dict[str, Any], place: str | None) -> str | None:
    """What is wrong with a shard's file; None if nothing is."""
    if place is None:
        return None
    info = receipt["shard"]["zip_data"]
    path = job.folder / "shards" / receipt["file"]
    if not path.is_file():
        path = root / f"{place}.zstd"  # moved by a merge that was killed
    if not path.is_file():
        return "missing"
    data = path.read_bytes()
    if len(data) != info["bytes"]:
        return f"{len(data)} bytes, not {info['bytes']}"
    return None if get_hash(HASH, data) == info["hashes"][HASH] else f"another {HASH}"


def _move_shards(
    job: Job, root: Path, receipts: list[dict[str, Any]], places: dict[str, str]
) -> None:
    """Shards to their places, and one index per split."""
    indices: dict[str, list[dict[str, Any]]] = {}
    for receipt in receipts:
        if not receipt["shard"]:
            continue
        split, name = places[receipt["group"]].split("/")
        (root / split).mkdir(exist_ok=True)
        source = job.folder / "shards" / receipt["file"]
        if source.is_file():
            source.replace(root / split / f"{name}.zstd")
        shard = receipt["shard"]
        shard["raw_data"]["basename"], shard["zip_data"]["basename"] = name, f"{name}.zstd"
        indices.setdefault(split, []).append(shard)
    for split, shards in indices.items():
        text = json.dumps({"version": 2, "shards": shards}, sort_keys=True)
        (root / split / "index.json").write_text(text)


def _refuse_empty(job: Job, rejects: list[dict[str, Any]]) -> None:
    """DataError; the reasons are kept, the rest is removed."""
    kept = job.out.with_name(f"{job.out.name}.{REJECTS_FILE}")
    write_lines(kept, rejects)
    shutil.rmtree(job.folder)
    counts = collections.Counter(reject["reason"] for reject in rejects)
    raise DataError(
        f"{job.manifest}: none of {len(rejects)} clips is usable ({tally(counts)}); see {kept}"
    )


def tally(counts: dict[str, int]) -> str:
    """`silent 3, too_short 1`."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
