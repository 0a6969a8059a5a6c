"""Bad shards: every rank stops in the same step, or reads the same neighbour; never less, no hang.

Every pair of {bad, missing, truncated} shard, {0, 2} workers and {1, 2} ranks, each x {stop,
substitute}.
"""

import json
import shutil
import time
from dataclasses import replace
from threading import Event, Thread

import numpy as np
import pytest
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState

from common.events import append_event, events_path
from data.loading.loader import ValidationSet, build_loader
from data.loading.shards import ShardDataset
from data.loading.sources import DataConfig, open_streams
from data.schema import DataError
from tests.support.inputs.prepared import write_shards
from tests.support.workers.ranks import Job, global_batches, read_job, run_job, spoil
from training.guards.run_state import read_state

TRAIN, HELD, STEPS = 26, 5, 12  # two epochs of 6 batches of 4
MATRIX = pytest.mark.parametrize(("kind", "workers", "world"), [
    ("bad", 0, 1), ("missing", 0, 2), ("truncated", 0, 2), ("missing", 2, 1), ("truncated", 2, 1),
    # Workers of several ranks start a server each, which imports torch.
    pytest.param("bad", 2, 2, marks=pytest.mark.faults),
])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), TRAIN, HELD)


@pytest.fixture
def copy(shards, tmp_path):
    """A copy as it was written: compressed shards only."""
    ignore = shutil.ignore_patterns("*.mds")
    return shutil.copytree(shards, tmp_path / "copy", ignore=ignore)


@pytest.fixture(scope="module")
def layout(shards):
    """(first sample, samples) of each shard of the training split."""
    config = DataConfig(str(shards))
    dataset = ShardDataset(config, open_streams(config), "train")
    return list(zip(dataset.sample_offset_per_shard.tolist(),
                    dataset.samples_per_shard.tolist(), strict=True))


def damaged(copy, layout, kind, policy, workers, world, **more):
    """A job that meets a bad second shard, in order, and where that begins."""
    config = DataConfig(str(copy), shuffle=False, num_workers=workers, on_bad_shard=policy, **more)
    path = sorted((copy / "train").glob("*.zstd"))[1]
    job = Job(config, world, STEPS, damage=(kind, str(path)), run_dir=copy)
    return job, path, layout[1]


@MATRIX
def test_stop_is_the_same_step_and_error_on_every_rank(copy, layout, kind, workers, world):
    job, path, (begin, _) = damaged(copy, layout, kind, "stop", workers, world)
    ranks = run_job(job)
    assert begin % 4 == 2  # of two ranks, only the second meets the shard in that step
    assert [len(rank["batches"]) for rank in ranks] == [begin // 4] * world
    assert len({rank["error"] for rank in ranks}) == 1
    error = ranks[0]["error"]
    assert f"{path.name}: this shard cannot be read" in error and "\n" not in error
    assert error.startswith("rank 1: " if world == 2 else str(path))
    assert not read_state(copy).events


@MATRIX
def test_substitute_is_the_same_neighbour_on_any_ranks(copy, layout, kind, workers, world):
    job, path, (begin, size) = damaged(
        copy, layout, kind, "substitute", workers, world, max_substituted_fraction=0.5
    )
    ranks = run_job(job)
    assert [rank["error"] for rank in ranks] == [None] * world

    def expected(sample):
        """The same row of the next shard for the samples of the bad one."""
        if not begin <= sample < begin + size:
            return f"train{sample:03d}"
        first, count = layout[2]
        return f"train{first + (sample - begin) % count:03d}"

    rows = [range(4 * step, 4 * step + 4) for step in range(6)] * 2
    assert [batch for _, batch in global_batches(ranks)] == [
        tuple(map(expected, row)) for row in rows
    ]
    lines = read_state(copy).substitutions
    assert [(x["step"], x["sample"], x["used"]) for x in lines] == [
        (step, sample, expected(sample)) for step, row in enumerate(rows, 1) for sample in row
        if begin <= sample < begin + size
    ]
    assert {(x["split"], x["shard"]) for x in lines} == {("train", str(path))}
    assert all("cannot be read" in x["reason"] for x in lines)


@pytest.mark.parametrize("world, workers", [(1, 2), (2, 0)])
def test_too_many_substitutions_stop_every_rank(copy, layout, world, workers):
    job, path, (begin, size) = damaged(
        copy, layout, "bad", "substitute", workers, world, max_substituted_fraction=0.05
    )
    ranks = run_job(job)
    assert [len(rank["batches"]) for rank in ranks] == [begin // 4] * world
    for rank in ranks:
        assert f"max_substituted_fraction=0.05: {size} of the 26 samples" in rank["error"]
        assert path.name in rank["error"]


def test_a_crash_on_one_rank_is_no_fault_of_the_data_on_the_other(shards):
    """Else the other exits with 78, which srun reports, and the job is not requeued."""
    config = DataConfig(str(shards), num_workers=0)
    ranks = run_job(Job(config, 2, STEPS, damage=("crash", "")))
    assert [rank["error"] for rank in ranks] == [None, None]
    assert "not callable" in ranks[0]["crash"]
    assert ranks[1]["crash"].startswith("rank 0: TypeError: ")


def test_two_bad_shards_in_a_row_give_the_next_good_one(copy, layout):
    files = sorted((copy / "train").glob("*.zstd"))
    config = DataConfig(str(copy), shuffle=False, num_workers=0, on_bad_shard="substitute",
                        max_substituted_fraction=0.9)
    spoil("truncated", files[0])  # at the start already: refused under stop, not here
    spoil("missing", files[1])
    dataset = ShardDataset(config, open_streams(config), "train")
    begin, count = layout[2]
    for bad in (0, 1):
        first, size = layout[bad]
        for row in range(size):
            assert dataset[first + row]["id"] == f"train{begin + row % count:03d}"
    for file in files[2:]:
        spoil("missing", file)
    with pytest.raises(DataError, match="every shard of stream 'copy' is bad"):
        ShardDataset(config, open_streams(config), "train")[0]


def test_a_resume_counts_the_substitutions_of_steps_it_repeats_once(copy, layout):
    job, _, (begin, _) = damaged(
        copy, layout, "bad", "substitute", 0, 1, max_substituted_fraction=0.5
    )
    read_job(job, 0)
    whole = [(told["step"], told["sample"]) for told in read_state(copy).substitutions]
    with open(events_path(copy), "a") as file:
        file.write('{"step": 9, "sp')  # killed while it was written
    first = begin // 4 + 1
    append_event(copy, "start", first_step=first)
    read_job(replace(job, first=first, steps=STEPS - first, damage=None), 0)
    again = read_state(copy)
    assert len(again.events) > len(whole) + 1
    assert [(told["step"], told["sample"]) for told in again.substitutions] == whole


def test_validation_samples_are_substituted_and_told_too(copy):
    config = DataConfig(str(copy), on_bad_shard="substitute", max_substituted_fraction=0.9,
                        validation_split="train")
    spoil("bad", sorted((copy / "train").glob("*.zstd"))[0])
    validation_set = ValidationSet(config, copy)
    [used] = validation_set.batch([0], step=7).sample_ids
    [line] = read_state(copy).substitutions
    assert (line["step"], line["sample"], line["used"]) == (7, 0, used) and used != "train000"


def test_shard_damaged_after_it_was_unpacked_is_noticed(copy):
    config = DataConfig(str(copy), num_workers=0)
    assert read_job(Job(config, 1, 6), 0)["error"] is None  # unpacks
    spoil("bad", sorted((copy / "train").glob("*.mds"))[1])
    error = read_job(Job(config, 1, 6), 0)["error"]
    assert "shard.00001.mds: its xxh64 is not the one in index.json" in error
    assert len(ValidationSet(config)) == HELD  # the other split is whole


def test_a_damaged_copy_in_the_cache_is_fetched_again(copy, tmp_path):
    config = DataConfig(str(copy), num_workers=0, cache_dir=str(tmp_path / "cache"))
    first = read_job(Job(config, 1, 6), 0)
    unpacked = sorted((tmp_path / "cache").rglob("train/*.mds"))
    assert len(unpacked) == 5 and not list(copy.rglob("*.mds"))  # nothing beside the user's own
    spoil("bad", unpacked[1])
    spoil("truncated", unpacked[2])
    spoil("missing", unpacked[3])
    assert read_job(Job(config, 1, 6), 0) == first


def test_cache_limit_evicts_copies_and_never_the_data(tmp_path, monkeypatch):
    root = write_shards(tmp_path / "data", 60, 2)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    shards = json.loads((root / "train" / "index.json").read_text())["shards"]
    largest = max(shard["raw_data"]["bytes"] + shard["zip_data"]["bytes"] for shard in shards)
    limit, steps = 4 * largest, 31  # two epochs and a batch
    assert sum(shard["raw_data"]["bytes"] for shard in shards) > limit
    evicted, evict = [], ShardDataset._evict_shard
    monkeypatch.setattr(ShardDataset, "_evict_shard",
                        lambda self, shard: (evicted.append(shard), evict(self, shard)))
    plain = read_job(Job(DataConfig(str(root), num_workers=0, cache_dir=str(tmp_path / "a")), 1,
                         steps), 0)
    config = DataConfig(str(root), num_workers=0, cache_dir=str(tmp_path / "b"),
                        cache_limit=str(limit))
    loader = build_loader(config, 4, 0, 1, 3)
    got = [next(loader)[1].sample_ids for _ in range(steps)]
    assert got == [ids for _, ids, _, _ in plain["batches"]]
    assert len(evicted) > len(shards)  # so that some were fetched again
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_shard_evicted_before_it_was_seen_is_fetched_again(tmp_path):
    """Between two looks of the thread that waits for it; the one that fetches is far ahead."""
    root = write_shards(tmp_path / "data", 60, 2)
    config = DataConfig(str(root), cache_dir=str(tmp_path / "cache"))
    dataset = ShardDataset(config, open_streams(config), "train", 4, 1)
    shard = int(dataset.spanner[0][0])
    walk, dataset._event = _Iterator(np.array([0, -1, 1])), Event()  # as __iter__ makes them
    dataset._shard_states[shard] = _ShardState.PREPARING
    waiting = Thread(target=dataset._ready_thread, args=(walk,), daemon=True)
    waiting.start()
    time.sleep(10 * TICK)
    assert walk.ready_index == 0
    dataset._shard_states[shard] = _ShardState.REMOTE  # as _evict_shard leaves it
    waiting.join(timeout=20)
    assert not waiting.is_alive() and walk.ready_index == walk.total
    assert dataset._shard_states[shard] == _ShardState.LOCAL


@pytest.mark.parametrize(("limit", "message"), [("lots", "a size like 200gb"), ("1kb", "1024")])
def test_a_cache_limit_that_cannot_be_is_named(copy, limit, message):
    with pytest.raises(ValueError, match=f"data.cache_limit={limit}: .*{message}"):
        build_loader(DataConfig(str(copy), cache_limit=limit), 4, 0, 1, 3)


def test_length_counts_this_ranks_samples(shards):
    config = DataConfig(str(shards))
    dataset = ShardDataset(config, open_streams(config), "train", 4, 1)
    assert (len(dataset), dataset.order.steps_per_epoch) == (24, 6)
