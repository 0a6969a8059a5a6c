"""One worker: decodes ahead in threads, encodes in order, writes one shard per group of clips.

A shard is written aside, renamed, and counts from the moment its receipt appears. So a worker may
be killed at any time: the next run redoes the group that was open, and nothing else.
"""

import collections
import itertools
import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from streaming import MDSWriter
from tqdm import tqdm

from common.files import whole_file, write_json
from data.clips.cut import Cut, CutSpec
from data.clips.decode import read_cut
from data.prepare.encoding import Encoders, build_metadata
from data.prepare.job import (
    Group,
    Item,
    Job,
    begun,
    clip_settings,
    clips_per_shard,
    flat,
    publish,
    refuse_change,
)
from data.prepare.merge import merge
from data.reasons import Rejected, reject
from data.schema import HASH, METADATA_FILE, TEXT_FILE, Metadata, columns

SHARDS: dict[str, Any] = {"compression": "zstd", "hashes": [HASH], "size_limit": None}
REPORT_SECONDS = 2.0  # between two reports for `--status`
Cuts = Iterator[tuple[Item, "Future[Cut]"]]


def prepare(
    manifest: Path,
    out: Path,
    encoders: Encoders,
    spec: CutSpec,
    default_split: str = "train",
    captions: Path | None = None,
    worker: int = 0,
    workers: int = 1,
    shard_clips: int = 0,
    decoders: int = 2,
) -> Metadata | None:
    """Cut, encode and write this worker's share; who finishes the last group makes `out`.

    Args:
        shard_clips: clips per shard; 0 fills shards of 64 MB.
        decoders: threads that decode ahead, each a few clips.

    Returns: what dataset.json says, or None while other workers have work left.
    DataError if `out` holds something else, the settings are not those that it was begun with, the
    manifest is empty or missing, the geometry is impossible, or not one clip is usable.
    """
    metadata = build_metadata(encoders, spec)
    settings = clip_settings(manifest, captions, default_split, spec) | {
        "clips_per_shard": shard_clips or clips_per_shard(metadata),
        "text_precision": encoders.text_precision,
        **encoders.sources,
    }
    job = Job(manifest, out, replace(metadata, settings=settings), captions)
    stored = begun(out)
    if stored is not None:
        refuse_change(out, stored, flat(job.metadata))
    if stored is not None and (out / METADATA_FILE).is_file():
        shutil.rmtree(job.folder, ignore_errors=True)  # a merge was killed at its last step
        return stored
    job.begin()
    _save_text_states(job, encoders)
    open_names = {group.name for group in job.missing()}
    mine = job.groups[worker::workers]
    todo = [group for group in mine if group.name in open_names]
    cuts = _decode_ahead(
        (item for group in todo for item in group.items),
        lambda item: read_cut(
            manifest.parent / item.record["path"], spec, item.record.get("t0"), item.view
        ),
        decoders,
    )
    with _Report(job, (worker, workers), mine, todo) as report:
        for group in todo:
            members = itertools.islice(cuts, len(group.items))
            _encode_group(job, encoders, group, members, report)
    left = job.missing()
    if left:
        print(
            f"worker {worker} of {workers}: done; {len(left)} of {len(job.groups)} shards are "
            f"left to others (first: {left[0].name})",
            file=sys.stderr,
        )
        return None
    return merge(job)


def _decode_ahead(
    items: Iterable[Item], read: Callable[[Item], Cut], threads: int
) -> Cuts:
    """Items in order with their cuts, decoded while earlier ones are encoded; a bounded number."""
    waiting: collections.deque[tuple[Item, Future[Cut]]] = collections.deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > 2 * threads:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_group(
    job: Job, encoders: Encoders, group: Group, cuts: Cuts, report: "_Report"
) -> None:
    """Encode the group's clips, write its shard aside, then its receipt."""
    began = time.monotonic()
    scratch = job.folder / f".{group.name}.{uuid.uuid4().hex}"
    writer = MDSWriter(out=str(scratch), columns=columns(job.metadata), **SHARDS)
    samples, rejects = [], []
    for item, cut in cuts:
        record = item.record
        try:
            sample = encoders.encode(cut.result(), record)
            writer.write(sample)
            samples.append(sample["record"])
            report.count()
        except Rejected as rejected:
            rejects.append(reject(record, rejected.reason, rejected.detail))
            report.count(rejected.reason)
    writer.finish()
    file, shard = f"{scratch.name[1:]}.mds.zstd", None
    if samples:
        [shard] = json.loads((scratch / "index.json").read_text())["shards"]
        publish(scratch / shard["zip_data"]["basename"], job.folder / "shards" / file)
    receipt = {
        "group": group.name, "file": file, "shard": shard, "samples": samples, "rejects": rejects,
        "seconds": round(time.monotonic() - began, 3),
    }
    write_json(scratch / "receipt.json", receipt)
    if not publish(scratch / "receipt.json", job.receipt(group)):
        # A worker of another array was faster with the same group.
        (job.folder / "shards" / file).unlink(missing_ok=True)
    shutil.rmtree(scratch)


def _save_text_states(job: Job, encoders: Encoders) -> None:
    """Whoever comes first writes them, so that `--merge` needs no encoders."""
    final = job.folder / TEXT_FILE
    if not final.is_file():
        own = job.folder / f".{TEXT_FILE}.{uuid.uuid4().hex}"
        save_file(encoders.text_states(), own)
        own.chmod(0o644)  # safetensors writes it for its owner only
        publish(own, final)


class _Report:
    """This worker's progress: one line on the terminal, one file for `--status`."""

    def __init__(
        self, job: Job, place: tuple[int, int], mine: list[Group], todo: list[Group]
    ) -> None:
        worker, workers = place
        self.path = job.folder / "workers" / f"{worker}-of-{workers}.json"
        self.total = sum(len(group.items) for group in mine)
        self.left = sum(len(group.items) for group in todo)
        self.rejected: collections.Counter[str] = collections.Counter()
        self.clips, self.began, self.told = 0, time.time(), 0.0
        self.bar: Any = tqdm(
            total=self.total, initial=self.total - self.left, unit="clip",
            desc="prepare" if workers == 1 else f"worker {worker} of {workers}",
            mininterval=1.0 if sys.stderr.isatty() else 10.0,
        )

    def __enter__(self) -> "_Report":
        self._tell()
        return self

    def __exit__(self, *_: object) -> None:
        self._tell()
        self.bar.close()

    def count(self, reason: str | None = None) -> None:
        """One clip more, written or rejected."""
        self.clips += 1
        if reason is not None:
            self.rejected[reason] += 1
            self.bar.set_postfix(self.rejected, refresh=False)
        self.bar.update()
        if time.time() - self.told > REPORT_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self.told = time.time()
        values = {
            "host": socket.gethostname(), "pid": os.getpid(), "began": self.began,
            "time": self.told, "clips": self.clips, "left": self.left - self.clips,
            "rejected": self.rejected,
        }
        own = self.path.with_name(f".{self.path.name}.{os.getpid()}")  # it may be started twice
        with whole_file(self.path, aside=own) as file:
            json.dump(values, file)
