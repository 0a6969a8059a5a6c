"""One split as a strict StreamingDataset: our own order, every shard checked, faults never hidden.

The plain StreamingDataset ends an epoch early (no workers) or hangs (workers) when a shard cannot
be read, trusts what lies on disk, and unpacks under a name that two jobs share. Called by
data.loading.loader, in the loader's workers too.

RANK, WORLD_SIZE and LOCAL_WORLD_SIZE must be set (streaming reads them); without them this is
one process.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState
from streaming.base.hashing import get_hash

from data.loading.cached_stream import open_stream
from data.loading.node import leave_to_the_job, own_shared_memory
from data.loading.order import Order, Source, choose_per_epoch, locate
from data.loading.sources import DataConfig, Opened, buckets
from data.schema import HASH, UNREADABLE, DataError, sample_fault


class BadSampleError(DataError):
    """One stored sample that cannot be trained on; its shard is what was written."""


def _begin_in_worker(cls: type["ShardDataset"]) -> "ShardDataset":
    leave_to_the_job()
    return cls.__new__(cls)


class ShardDataset(StreamingDataset):
    """One split of all streams; every fault is a DataError at once, or a neighbour's sample.

    A shard is hash-checked when this process first touches it, a sample's numbers and shapes each
    time. Under `on_bad_shard: substitute` a sample that is bad, or of a bad shard, is replaced by
    the one at the same place of the stream's next good shard: a function of what is bad alone.
    The sample's "substitution" says what was replaced.
    """

    def __init__(
        self,
        config: DataConfig,
        opened: list[Opened],
        split: str,
        global_batch_size: int = 1,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.config, self.split = config, split
        self.failure: BaseException | None = None
        self.verified: set[int] = set()
        self.broken: dict[int, str] = {}  # shard -> why it cannot be read
        self.metadata = [known.metadata for known in opened]
        streams = [
            open_stream(stream, config, known, split)
            for stream, known in zip(config.all_streams, opened, strict=True)
        ]
        try:
            with own_shared_memory():
                super().__init__(
                    streams=streams,
                    split=split,
                    batch_size=global_batch_size // world_size,
                    shuffle=config.shuffle,
                    shuffle_seed=seed,
                    num_canonical_nodes=config.num_canonical_nodes,
                    validate_hash=HASH,
                    download_retry=config.download_retries,
                    download_timeout=config.download_timeout_seconds,
                    cache_limit=config.cache_limit,
                )
        except ValueError as error:  # nothing but the cache limit is left to be refused
            raise DataError(f"data.cache_limit={config.cache_limit}: {error}") from error
        self.order = self._build_order(opened, global_batch_size, seed)

    def _build_order(self, opened: list[Opened], global_batch_size: int, seed: int) -> Order:
        proportions = [stream.proportion for stream in self.config.all_streams]
        chosen = choose_per_epoch(self.samples_per_stream.tolist(), proportions)
        bucket_of = {index: bucket for bucket, members in enumerate(buckets(opened).values())
                     for index in members}
        sources = []
        for index, begin in enumerate(self.shard_offset_per_stream):
            sizes = self.samples_per_shard[begin : begin + self.shards_per_stream[index]]
            sources.append(Source(sizes, chosen[index], bucket_of[index]))
        return Order(
            tuple(sources), global_batch_size, seed, self.config.shuffle,
            self.config.num_canonical_nodes, self.config.shuffle_block,
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For a worker, which attaches to shared memory while it unpickles the state below."""
        _, arguments, *state = super().__reduce_ex__(protocol)
        return _begin_in_worker, arguments, *state

    def __len__(self) -> int:
        """Samples per rank and epoch."""
        return self.order.steps_per_epoch * int(self.batch_size or 1)

    def start_at(self, step: int) -> None:
        """Make the next epoch that is iterated begin at `step`."""
        epoch, batch = locate(step, self.order.steps_per_epoch)
        self.load_state_dict(
            {
                "epoch": epoch,
                "sample_in_epoch": batch * self.order.global_batch_size,
                "num_canonical_nodes": self.num_canonical_nodes,
                "shuffle_seed": self.shuffle_seed,
            }
        )

    def _get_work(self, epoch: int, sample_in_epoch: int) -> np.ndarray:
        """This worker's sample indices: whole batches, dealt to the workers in turn."""
        world, batch_size = self._parallel_worker_world, int(self.batch_size or 1)
        mine = self.order.epoch(epoch)[sample_in_epoch // self.order.global_batch_size :]
        mine = mine[world.worker_of_rank :: world.workers_per_rank]
        begin = world.rank * batch_size
        return mine[:, begin : begin + batch_size].flatten()

    def stream_of(self, sample_id: int) -> int:
        """Index of the stream that a sample belongs to."""
        return int(np.searchsorted(self.sample_offset_per_stream, sample_id, side="right")) - 1

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """One sample by index, as MDS columns and `stream`, `substitution` (None: it is itself)."""
        wanted, substitution = int(sample_id), None
        for place in self._places(wanted):
            shard_id = int(self.spanner[place][0])
            try:
                self._verify(shard_id)
                sample = self._checked(self._decoded(place, retry), place)
            except DataError as error:
                alone = isinstance(error, BadSampleError)
                if not alone:
                    self.broken[shard_id] = str(error)
                if self.config.on_bad_shard == "stop":
                    raise
                if substitution is None:
                    substitution = {
                        "split": self.split, "sample": wanted, "reason": str(error),
                        "shard": self.shard_path(shard_id) + (f"#{wanted}" if alone else ""),
                        "samples": 1 if alone else int(self.samples_per_shard[shard_id]),
                    }
                continue
            if substitution:
                substitution["used"] = sample["id"]
            return sample | {"stream": self.stream_of(wanted), "substitution": substitution}
        raise DataError(
            f"every shard of stream '{self.config.all_streams[self.stream_of(wanted)].label}' is "
            f"bad, one because: {next(iter(self.broken.values()))}"
        )

    def _places(self, sample_id: int) -> Iterator[int]:
        """The sample, the one at its place in each other shard of its stream, its own shard's."""
        stream, (shard_id, row) = self.stream_of(sample_id), self.spanner[sample_id]
        first, count = self.shard_offset_per_stream[stream], self.shards_per_stream[stream]
        for turn in range(count):
            shard = first + (shard_id - first + turn) % count
            yield int(self.sample_offset_per_shard[shard] + row % self.samples_per_shard[shard])
        size = int(self.samples_per_shard[shard_id])
        for turn in range(1, size):
            yield int(self.sample_offset_per_shard[shard_id] + (row + turn) % size)

    def _decoded(self, place: int, retry: int) -> dict[str, Any]:
        try:
            return super().get_item(place, retry)
        except DataError:
            raise
        except UNREADABLE as error:
            shard = self.shard_path(int(self.spanner[place][0]))
            raise BadSampleError(
                f"{shard}: sample {place} cannot be decoded ({error!r}); prepare its clip again, "
                "or set data.on_bad_shard=substitute") from error

    def _checked(self, sample: dict[str, Any], place: int) -> dict[str, Any]:
        fault = sample_fault(sample, self.metadata[self.stream_of(place)])
        if fault:
            shard = self.shard_path(int(self.spanner[place][0]))
            raise BadSampleError(f"{shard}: sample {sample['id']}: {fault}; prepare its clip "
                                 "again, or set data.on_bad_shard=substitute")
        return sample

    def shard_path(self, shard_id: int) -> str:
        """Where a shard's compressed file is, or the raw one if it was not compressed."""
        stream = self.streams[self.stream_per_shard[shard_id]]
        basename = [info.basename for info in self.shards[shard_id].file_pairs[0] if info][-1]
        return os.path.join(stream.remote or stream.local, stream.split, basename)

    def _verify(self, shard_id: int) -> None:
        """DataError unless the shard's unpacked file has the hash that the index says."""
        if shard_id in self.broken:
            raise DataError(self.broken[shard_id])
        if shard_id in self.verified:
            return
        stream, (info, _) = self.streams[self.stream_per_shard[shard_id]], (
            self.shards[shard_id].file_pairs[0]
        )
        path = Path(stream.local, stream.split, info.basename)
        for _ in range(3):
            if not path.is_file():
                self.prepare_shard(shard_id)  # unpacks; checks the compressed file's hash
            try:
                found = get_hash(HASH, path.read_bytes())
            except FileNotFoundError:
                continue  # evicted in between
            if found == info.hashes[HASH]:
                self.verified.add(shard_id)
                return
            if stream.remote is None:
                break
            path.unlink(missing_ok=True)  # a copy in the cache: fetched again
        raise DataError(
            f"{path}: its {HASH} is not the one in index.json; delete the file (it is made "
            f"again from its .zstd) or copy the data set again"
        )

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """As the parent; a failure is a DataError and leaves no rank waiting for the shard.

        In a background thread (not blocking) it is only noted: whoever reads a sample raises it.
        """
        stream = self.streams[self.stream_per_shard[shard_id]]
        infos = [info for info in self.shards[shard_id].file_pairs[0] if info]
        files = [Path(stream.local, stream.split, info.basename) for info in infos]
        try:
            if shard_id in self.broken:
                raise DataError(self.broken[shard_id])
            if stream.remote is None and not any(path.is_file() for path in files):
                raise FileNotFoundError("its file is missing")
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            # The parent would leave it locked, and marked as being prepared, which others wait
            # for: let them try themselves, and fail too.
            while self._cache_filelock.is_locked if hasattr(self, "_cache_filelock") else False:
                self._cache_filelock.release()
            self._shard_states[shard_id] = _ShardState.LOCAL
            self.broken.setdefault(
                shard_id,
                f"{self.shard_path(shard_id)}: this shard cannot be read ({error}); "
                "copy the data set again",
            )
            if blocking:
                raise DataError(self.broken[shard_id]) from error

    def on_exception(self, future: Future) -> None:
        """Keep a background thread's failure for the thread that yields samples."""
        if future.exception() is not None:
            self.failure = future.exception()
            self._event.set()

    def _ready_thread(self, it: Any) -> None:
        """As the parent, which waits without end for a shard that is evicted meanwhile.

        With a `cache_limit` one thread fetches ahead and so evicts what this one still waits for.
        """
        while not (it.should_exit() or it.ready_index == it.total or self._event.is_set()):
            ahead = it.ready_index - it.yield_index
            sample_id = it.sample_ids[it.ready_index]
            shard_id = int(self.spanner[sample_id][0]) if sample_id != -1 else None
            if self.predownload is not None and ahead > self.predownload:
                time.sleep(TICK)
            elif shard_id is None or self._shard_states[shard_id] == _ShardState.LOCAL:
                it.ready_index += 1
            elif self._shard_states[shard_id] == _ShardState.REMOTE:
                self.prepare_shard(shard_id, blocking=False)
            else:  # another thread or process prepares it
                time.sleep(TICK)
        it.on_exit()

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        yield from super()._each_sample_id(it)
        if self._event.is_set():  # the parent would end the epoch here as if all was well
            raise DataError(str(self.failure)) from self.failure
