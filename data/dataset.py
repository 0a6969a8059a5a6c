"""Shards -> batches: a strict StreamingDataset whose order is a pure function of (seed, epoch).

The global batch of every step is the same set of samples for any number of ranks, workers and
micro-batches, resumed or not; a rank reads its slice of it. `locate` gives the place of any step,
so nothing about the loader needs to be in a checkpoint. Called by train.py.

RANK, WORLD_SIZE and LOCAL_WORLD_SIZE must be set (streaming reads them); without them this is
one process. A damaged or missing shard stops the run on every rank, it never shortens an epoch.
"""

import functools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.hashing import get_hash
from streaming.base.shuffle import get_shuffle

from data.schema import HASH, Batch, DataError, Metadata, check_split, collate, load_metadata

SHUFFLE_BLOCK = 1 << 18  # samples; shards are mixed within a block of this size


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and how they are read."""

    root: str
    train_split: str = "train"
    validation_split: str = "validation"
    num_workers: int = 2  # processes per rank
    shuffle: bool = True
    num_canonical_nodes: int = 1  # >1: a node reads only its share of the shards; part of the order
    timeout_seconds: float = 300.0  # for one batch from a worker


def epoch_order(
    shard_sizes: np.ndarray,
    global_batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    num_canonical_nodes: int = 1,
) -> np.ndarray:
    """(steps, global_batch_size) sample indices: every global batch of one epoch.

    steps = floor(samples / global_batch_size); the few samples left out differ from epoch to
    epoch. Each canonical node gives an equal share of every batch, from its own shards.
    """
    total = int(shard_sizes.sum())
    steps, share = total // global_batch_size, global_batch_size // num_canonical_nodes
    order = np.arange(total)
    if shuffle:
        order = get_shuffle("py1e", shard_sizes, num_canonical_nodes, seed, epoch, SHUFFLE_BLOCK)
    bounds = [total * node // num_canonical_nodes for node in range(num_canonical_nodes)]
    parts = [order[begin : begin + steps * share].reshape(steps, share) for begin in bounds]
    return np.concatenate(parts, axis=1)


def locate(step: int, steps_per_epoch: int) -> tuple[int, int]:
    """Step (optimiser updates done) -> (epoch, batch within it)."""
    return divmod(step, steps_per_epoch)


class ShardDataset(StreamingDataset):
    """One split of a prepared data set, in our own order; every fault is raised at once.

    The plain StreamingDataset ends the epoch early (no workers) or hangs (workers) when a shard
    cannot be read, and never checks a shard that is already on disk.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        global_batch_size: int = 1,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        check_split(config.root, split)
        self.folder = Path(config.root) / split
        self.global_batch_size = global_batch_size
        self.failure: BaseException | None = None
        self.verified: set[int] = set()
        super().__init__(
            local=config.root,
            split=split,
            batch_size=global_batch_size // world_size,
            shuffle=config.shuffle,
            shuffle_seed=seed,
            num_canonical_nodes=config.num_canonical_nodes,
            validate_hash=HASH,
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    def __len__(self) -> int:
        """Samples per rank and epoch."""
        return self.steps_per_epoch * int(self.batch_size or 1)

    def start_at(self, step: int) -> None:
        """Make the next epoch that is iterated begin at `step`."""
        epoch, batch = locate(step, self.steps_per_epoch)
        self.load_state_dict(
            {
                "epoch": epoch,
                "sample_in_epoch": batch * self.global_batch_size,
                "num_canonical_nodes": self.num_canonical_nodes,
                "shuffle_seed": self.shuffle_seed,
            }
        )

    def _get_work(self, epoch: int, sample_in_epoch: int) -> np.ndarray:
        """This worker's sample indices: whole batches, dealt to the workers in turn."""
        world, batch_size = self._parallel_worker_world, int(self.batch_size or 1)
        order = epoch_order(
            self.samples_per_shard,
            self.global_batch_size,
            self.shuffle_seed,
            epoch,
            self.shuffle,
            self.num_canonical_nodes or 1,
        )
        mine = order[sample_in_epoch // self.global_batch_size :]
        mine = mine[world.worker_of_rank :: world.workers_per_rank]
        begin = world.rank * batch_size
        return mine[:, begin : begin + batch_size].flatten()

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """One sample by index; its shard is hash-checked when this process first touches it."""
        shard_id = int(self.spanner[sample_id][0])
        if shard_id not in self.verified:
            self._verify(shard_id)
            self.verified.add(shard_id)
        return super().get_item(sample_id, retry)

    def _verify(self, shard_id: int) -> None:
        raw_info, _ = self.shards[shard_id].file_pairs[0]
        path = self.folder / raw_info.basename
        if not path.is_file():
            self.prepare_shard(shard_id)  # decompresses; checks the compressed file's hash
        if get_hash(HASH, path.read_bytes()) != raw_info.hashes[HASH]:
            raise DataError(
                f"{path}: its {HASH} is not the one in index.json; delete the file (it is made "
                f"again from its .zstd) or copy the data set again"
            )

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """As the parent; a failure is a DataError and leaves no rank waiting for the shard."""
        files = [
            self.folder / info.basename for info in self.shards[shard_id].file_pairs[0] if info
        ]
        try:
            if not any(path.is_file() for path in files):
                raise FileNotFoundError("its file is missing")
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            # The parent would leave it marked as being prepared, which others wait for: let them
            # try themselves, and fail too.
            self._shard_states[shard_id] = _ShardState.LOCAL
            raise DataError(
                f"{files[-1]}: this shard cannot be read ({error}); copy the data set again"
            ) from error

    def on_exception(self, future: Future) -> None:
        """Keep a background thread's failure for the thread that yields samples."""
        if future.exception() is not None:
            self.failure = future.exception()
            self._event.set()

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        yield from super()._each_sample_id(it)
        if self._event.is_set():  # the parent would end the epoch here as if all was well
            raise DataError(str(self.failure)) from self.failure


def build_loader(
    config: DataConfig,
    global_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    first_step: int = 0,
) -> Iterator[tuple[int, Batch]]:
    """(epoch, Batch) for ever, from `first_step` on: this rank's samples of each global batch.

    DataError, before anything is read, if the split is missing or smaller than one global batch
    or the global batch cannot be divided.
    """
    metadata = load_metadata(config.root)
    for key, value in {
        "ranks": world_size,
        "num_canonical_nodes": config.num_canonical_nodes,
    }.items():
        if global_batch_size % value:
            raise DataError(
                f"global_batch_size={global_batch_size} is not divisible by {key}={value}; "
                f"use {global_batch_size // value * value or value} or "
                f"{(global_batch_size // value + 1) * value}"
            )
    dataset = ShardDataset(config, config.train_split, global_batch_size, world_size, seed)
    if dataset.steps_per_epoch < 1:
        raise DataError(
            f"global_batch_size={global_batch_size}: split '{config.train_split}' of {config.root} "
            f"has only {dataset.num_samples} samples; lower it or prepare more clips"
        )
    seen = dataset._parallel_rank_world
    if (seen.rank, seen.num_ranks) != (rank, world_size):
        raise DataError(
            f"rank {rank} of {world_size}, but RANK and WORLD_SIZE in the environment say "
            f"{seen.rank} of {seen.num_ranks}; set both (and LOCAL_WORLD_SIZE) before loading"
        )
    dataset.start_at(first_step)
    return _batches(dataset, metadata, config, locate(first_step, dataset.steps_per_epoch))


def _batches(
    dataset: ShardDataset, metadata: Metadata, config: DataConfig, place: tuple[int, int]
) -> Iterator[tuple[int, Batch]]:
    # A fork with threads alive (NCCL, tokenizers) can hang: workers come from a clean server,
    # which imports what they need once.
    context = multiprocessing.get_context("forkserver") if config.num_workers else None
    if context:
        context.set_forkserver_preload(["__main__", "data.dataset"])
    loader = StreamingDataLoader(
        dataset,
        batch_size=dataset.batch_size,
        num_workers=config.num_workers,
        collate_fn=functools.partial(collate, metadata=metadata),
        timeout=config.timeout_seconds if config.num_workers else 0,
        persistent_workers=config.num_workers > 0,
        multiprocessing_context=context,
    )
    epoch, seen = place
    try:
        while True:
            for batch in loader:
                yield epoch, batch
                seen += 1
            if seen != dataset.steps_per_epoch:
                raise DataError(
                    f"{dataset.folder}: epoch {epoch} ended after {seen} of "
                    f"{dataset.steps_per_epoch} batches; a shard cannot be read"
                )
            epoch, seen = epoch + 1, 0
    finally:
        # Left to the garbage collector, each worker would be waited for in vain for 5 s.
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()
        if hasattr(dataset, "_iterator"):
            dataset._iterator.non_blocking_exit()  # the threads of this process


class HeldOut:
    """The validation split, any sample by its index: every rank reads the ones it is given."""

    def __init__(self, config: DataConfig) -> None:
        self.metadata = load_metadata(config.root)
        self.dataset = ShardDataset(config, config.validation_split)

    def __len__(self) -> int:
        return self.dataset.num_samples

    def batch(self, indices: list[int]) -> Batch:
        """The samples of these indices, in this order."""
        return collate([self.dataset[index] for index in indices], self.metadata)

    def records(self, indices: list[int]) -> list[dict[str, Any]]:
        """Their manifest records: id, captions, source, and what was found out."""
        return [self.dataset[index]["record"] for index in indices]
