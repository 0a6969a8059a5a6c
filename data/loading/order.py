"""Which samples are in which global batch: a pure function of (stream sizes, seed, epoch).

Ranks, workers, accumulation and resuming read slices of the same table, so none of them can change
it. A stream is an endless sequence of passes over its samples, each a new permutation; an epoch
takes the next `choose` of them, so a proportion is exact and every sample has its turn. Streams of
one shape form a bucket; every global batch lies within one bucket. Called by data.loading.shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from streaming.base.shuffle import get_shuffle

from data.schema import DataError


@dataclass(frozen=True)
class Source:
    """One stream, as far as the order is concerned."""

    shard_sizes: np.ndarray  # (shards,) samples in each
    choose: int  # samples per epoch
    bucket: int  # streams of one shape share it; counted from 0

    @property
    def size(self) -> int:
        return int(self.shard_sizes.sum())


@dataclass(frozen=True)
class Order:
    """Everything that decides the order, but the epoch."""

    sources: tuple[Source, ...]
    global_batch_size: int
    seed: int = 0
    shuffle: bool = True
    num_canonical_nodes: int = 1  # each gives an equal share of every batch, from its own shards
    shuffle_block: int = 1 << 18  # samples; shards are mixed within a block of this size

    def __post_init__(self) -> None:
        smallest = min(source.size for source in self.sources)
        if smallest < self.num_canonical_nodes:
            raise DataError(
                f"num_canonical_nodes={self.num_canonical_nodes}: a stream has only {smallest} "
                "samples, every node needs one of each; lower it or prepare more clips"
            )

    @property
    def bucket_steps(self) -> list[int]:
        """Whole global batches of each bucket in an epoch; what is left over differs by epoch."""
        buckets = [0] * (1 + max(source.bucket for source in self.sources))
        for source in self.sources:
            buckets[source.bucket] += source.choose // self.num_canonical_nodes
        return [count // (self.global_batch_size // self.num_canonical_nodes) for count in buckets]

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.bucket_steps)

    def epoch(self, epoch: int) -> np.ndarray:
        """(steps, global_batch_size) sample indices, streams counted one after the other."""
        steps = self.bucket_steps
        bucket_of_step = np.repeat(np.arange(len(steps)), steps)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(bucket_of_step)
        rows = np.empty((len(bucket_of_step), self.global_batch_size), np.int64)
        for bucket, count in enumerate(steps):
            nodes = [self._node(bucket, count, node, epoch)
                     for node in range(self.num_canonical_nodes)]
            rows[bucket_of_step == bucket] = np.concatenate(nodes, axis=1)
        return rows

    def _node(self, bucket: int, steps: int, node: int, epoch: int) -> np.ndarray:
        """(steps, share) sample indices: one canonical node's columns of a bucket's batches."""
        share = self.global_batch_size // self.num_canonical_nodes
        turns, stream_of_place, offset = [], [], 0
        for index, source in enumerate(self.sources):
            if source.bucket == bucket:
                turns.append(offset + self._turns(source, node, epoch))
                stream_of_place.append(np.full(len(turns[-1]), index))
            offset += source.size
        # Which stream is next is shuffled, not the samples: each stream keeps its shards' locality.
        place = np.concatenate(stream_of_place)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch, bucket, node)).shuffle(place)
        mixed = np.empty(len(place), np.int64)
        mixed[np.argsort(place, kind="stable")] = np.concatenate(turns)
        return mixed[: steps * share].reshape(steps, share)

    def _turns(self, source: Source, node: int, epoch: int) -> np.ndarray:
        """One node's samples of one stream in this epoch, counted within the stream."""
        nodes, count = self.num_canonical_nodes, source.choose // self.num_canonical_nodes
        low, high = source.size * node // nodes, source.size * (node + 1) // nodes
        begin, length, parts = epoch * count, high - low, []
        for number in range(begin // length, -(-(begin + count) // length)):
            order = self._pass(source, number)[low:high]
            parts.append(order[max(begin - number * length, 0) : begin + count - number * length])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _pass(self, source: Source, number: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(source.size)
        return get_shuffle("py1e", source.shard_sizes, self.num_canonical_nodes, self.seed, number,
                           self.shuffle_block)


def choose_per_epoch(sizes: Sequence[int], proportions: Sequence[float | None]) -> list[int]:
    """Samples of each stream in an epoch of as many samples as there are.

    Without proportions every sample once; with them, shares of the sum by largest remainder.
    """
    weights = [weight for weight in proportions if weight is not None]
    if not weights:
        return list(sizes)
    exact = [sum(sizes) * weight / sum(weights) for weight in weights]
    chosen = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: chosen[index] - exact[index])
    for index in by_remainder[: sum(sizes) - sum(chosen)]:
        chosen[index] += 1
    return chosen


def locate(step: int, steps_per_epoch: int) -> tuple[int, int]:
    """Step (optimiser updates done) -> (epoch, batch within it)."""
    return divmod(step, steps_per_epoch)
