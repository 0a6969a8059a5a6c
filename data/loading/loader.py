"""Shards -> batches: the same global batches for any number of ranks, workers and micro-batches.

The global batch of every step is a row of `data.loading.order`, resumed or not; a rank reads its
slice of it. `locate` gives the place of any step, so nothing about the loader needs to be in a
checkpoint. A shard that cannot be read stops the run on every rank in the same step, or is
substituted and written down. Called by train.py.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.events import append_event
from data.loading.agreement import PeerError, agree
from data.loading.order import locate
from data.loading.shards import ShardDataset
from data.loading.sources import DataConfig, Opened, buckets, open_streams
from data.loading.workers import Loader, begin_worker, start_server
from data.schema import DataError, Metadata, collate
from model.objective import Batch

Substitution = dict[str, Any]
T = TypeVar("T")


class BadShards:
    """The bad shards that all ranks know of, and the events of their samples, which rank 0 writes.

    One event per substituted sample: step, split, sample index, shard, reason, id that was used.
    """

    def __init__(self, config: DataConfig, split: str, run_dir: Path | None) -> None:
        self.config, self.split, self.run_dir = config, split, run_dir
        self.samples: dict[str, int] = {}  # shard -> samples in it

    def enter(self, step: int, substitutions: list[Substitution], total: int) -> None:
        """Log the substitutions of all ranks at `step`.

        Raises DataError when too many of `total` samples are bad.
        The bound is on the share of the split that lies in the bad shards found so far: it depends
        neither on the step nor on the rank.
        """
        for told in substitutions:
            self.samples[told["shard"]] = told["samples"]
            if self.run_dir is not None:
                values = {key: value for key, value in told.items() if key != "samples"}
                append_event(self.run_dir, "substitution", step=step, **values)
        limit, lost = self.config.max_substituted_fraction, sum(self.samples.values())
        if lost > limit * total:
            raise DataError(
                f"data.max_substituted_fraction={limit}: {lost} of the {total} samples of split "
                f"'{self.split}' are in bad shards ({', '.join(sorted(self.samples)[:3])}; "
                f"{substitutions[0]['reason']}); copy the data set again, or allow more"
            )


def build_loader(
    config: DataConfig,
    global_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    first_step: int = 0,
    run_dir: Path | None = None,
    waited: Callable[[float], None] | None = None,
) -> Generator[tuple[int, Batch], None, None]:
    """(epoch, Batch) without end, from `first_step` on: this rank's samples of each global batch.

    `audio_weight` is scaled over the global batch: the mean of weight * loss over its samples is
    the mean loss over those with sound, however they are spread over ranks and micro-batches.
    ``run_dir`` takes the events, None on all ranks but one; ``waited`` is given the
    seconds that each batch took on this rank alone. Every rank must take every batch. DataError,
    before anything is read, if a split is missing or smaller than one global batch or the global
    batch cannot be divided.
    """
    opened = open_streams(config)
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
    dataset = ShardDataset(
        config, opened, config.train_split, global_batch_size, world_size, seed
    )
    if min(dataset.order.bucket_steps) < 1:
        raise DataError(
            f"global_batch_size={global_batch_size}: split '{config.train_split}' of "
            f"{config.place} has only {dataset.num_samples} samples (or too few of one shape); "
            "lower it or prepare more clips"
        )
    seen = dataset._parallel_rank_world
    if (seen.rank, seen.num_ranks) != (rank, world_size):
        raise DataError(
            f"rank {rank} of {world_size}, but RANK and WORLD_SIZE in the environment say "
            f"{seen.rank} of {seen.num_ranks}; set both (and LOCAL_WORLD_SIZE) before loading"
        )
    dataset.start_at(first_step)
    bad = BadShards(config, config.train_split, run_dir)
    batches = _local_batches(dataset, [stream.metadata for stream in opened], first_step)
    return _agreed(batches, dataset, bad, first_step, waited)


def _agreed(
    batches: Generator[tuple[int, Batch, list[Substitution]], None, None],
    dataset: ShardDataset,
    bad: BadShards,
    step: int,
    waited: Callable[[float], None] | None,
) -> Generator[tuple[int, Batch], None, None]:
    """This rank's batches, each after all ranks have theirs: or all of them raise."""
    try:
        while True:
            began = time.perf_counter()
            epoch, batch, told = _together(functools.partial(next, batches))
            if waited is not None:
                waited(time.perf_counter() - began)
            told, heard = agree(None, told, int(batch.has_audio.sum()))
            bad.enter(step + 1, told, dataset.num_samples)  # the update that takes the batch
            scale = dataset.order.global_batch_size / max(heard, 1)
            yield epoch, batch._replace(audio_weight=batch.audio_weight * scale)
            step += 1
    finally:
        batches.close()


def _together(read: Callable[[], T]) -> T:
    """What `read` returns; a failure reaches every rank before it is raised.

    After a success the others wait in `agree`, which the caller must call.
    """
    try:
        return read()
    except Exception as error:
        message, crash = str(error).strip(), not isinstance(error, DataError)
        if crash:
            message = f"{type(error).__name__}: {message}"
        else:  # a worker's comes with its traceback before it
            message = message.splitlines()[-1].removeprefix("data.schema.DataError: ")
        with contextlib.suppress(PeerError):
            agree(message, [], crash=crash)
        raise


def _local_batches(
    dataset: ShardDataset, metadata: list[Metadata], first_step: int
) -> Generator[tuple[int, Batch, list[Substitution]], None, None]:
    config, steps = dataset.config, dataset.order.steps_per_epoch
    loader = Loader(
        dataset,
        batch_size=dataset.batch_size,
        num_workers=config.num_workers,
        collate_fn=functools.partial(_collate, metadata=metadata),
        timeout=0,  # or a killed worker goes unnoticed for as long; the watchdog has a budget
        persistent_workers=config.num_workers > 0,
        multiprocessing_context=start_server() if config.num_workers else None,
        worker_init_fn=begin_worker if config.num_workers else None,
    )
    epoch, seen = locate(first_step, steps)
    try:
        while True:
            for batch, told in loader:
                yield epoch, batch, told
                seen += 1
            if seen != steps:
                raise DataError(
                    f"{config.place}: epoch {epoch} ended after {seen} of {steps} batches; "
                    "a shard cannot be read"
                )
            epoch, seen = epoch + 1, 0
    except (ConnectionError, EOFError) as error:  # what it had ready was in its own memory
        raise RuntimeError("a DataLoader worker exited before its batch was taken; if it was "
                           "killed for memory, lower data.num_workers or ask for more") from error
    finally:
        # Left to the garbage collector, each worker would be waited for in vain for 5 s.
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()
        if hasattr(dataset, "_iterator"):
            dataset._iterator.non_blocking_exit()  # the threads of this process


def _collate(
    samples: list[dict[str, Any]], metadata: list[Metadata]
) -> tuple[Batch, list[Substitution]]:
    """Samples of one bucket: the streams in it may differ in name, not in shape."""
    told = [sample["substitution"] for sample in samples if sample["substitution"]]
    return collate(samples, metadata[samples[0]["stream"]]), told


class ValidationSet:
    """The validation split, any sample by its index: streams one after the other.

    Every rank must call `batch` and `shares` alike.
    """

    def __init__(self, config: DataConfig, run_dir: Path | None = None) -> None:
        self.opened: list[Opened] = open_streams(config)
        self.dataset = ShardDataset(config, self.opened, config.validation_split)
        self.bad = BadShards(config, config.validation_split, run_dir)

    def __len__(self) -> int:
        return self.dataset.num_samples

    def batch(self, indices: list[int], step: int = 0) -> Batch:
        """The samples of these indices, of one shape, in this order."""
        samples = _together(lambda: [self.dataset[index] for index in indices])
        batch, told = _collate(samples, [stream.metadata for stream in self.opened])
        self.bad.enter(step, agree(None, told)[0], len(self))
        return batch

    def shares(
        self, samples: int | None, size: int, rank: int, world_size: int, step: int
    ) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's part of a fixed choice of `samples` (None: all), batches of one shape.

        The batches are the same for any number of ranks, so that each sample has the same
        neighbours and no loss differs by a bit; they are dealt in turn, as many to every rank. The
        (B,) bool is False for samples that only fill a batch up. Each stream gives its first ones,
        in proportion to its size.
        """
        counts = self.dataset.samples_per_stream
        wanted = min(samples or len(self), len(self))
        ends = counts.cumsum()
        taken = [int(wanted * end // len(self)) for end in ends]
        chosen = [taken[0], *(b - a for a, b in zip(taken, taken[1:], strict=False))]
        for members in buckets(self.opened).values():
            pool = [int(ends[index] - counts[index]) + place
                    for index in members for place in range(chosen[index])]
            turns = -(-len(pool) // (size * world_size))
            for begin in range(rank * size, turns * world_size * size, world_size * size):
                places = range(begin, begin + size)
                real = torch.tensor([place < len(pool) for place in places])
                yield self.batch([pool[place % len(pool)] for place in places], step), real

    def records(self, indices: list[int]) -> list[dict[str, Any]]:
        """Their manifest records: id, captions, source, and what was found out; a collective."""
        found = _together(lambda: [self.dataset[index]["record"] for index in indices])
        agree(None, [])
        return found
