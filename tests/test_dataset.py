"""Order: equal global batches for any ranks, workers, resume. Faults: raised, never hidden."""

import itertools
import multiprocessing
import shutil
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data.dataset import DataConfig, HeldOut, ShardDataset, build_loader, epoch_order, locate
from data.schema import DataError, load_metadata
from tests.prepared import write_shards
from tests.ranks import read_rank

TRAIN, HELD = 26, 5
SIZES = np.array([7, 7, 7, 5])


@pytest.fixture(autouse=True, scope="module")
def private_temporary_folder(tmp_path_factory):
    """Streaming leaves two lock files per data set in it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("tmp"))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), TRAIN, HELD)


@pytest.fixture
def copy(shards, tmp_path):
    """A copy as it was written: compressed shards only."""
    ignore = shutil.ignore_patterns("*.mds")
    return shutil.copytree(shards, tmp_path / "copy", ignore=ignore)


def read(config: DataConfig, steps: int, batch: int = 4, first: int = 0, seed: int = 3) -> list:
    loader = build_loader(config, batch, 0, 1, seed, first)
    return [(e, tuple(b.sample_ids)) for e, b in itertools.islice(loader, steps)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("batch", [4, 8, 12])
def test_an_epoch_is_whole_batches_without_repeats(batch, nodes, shuffle):
    orders = [epoch_order(SIZES, batch, 0, epoch, shuffle, nodes) for epoch in range(3)]
    for order in orders:
        assert order.shape == (26 // batch, batch)
        assert len(set(order.flatten().tolist())) == order.size
        assert order.min() >= 0 and order.max() < 26
    assert np.array_equal(orders[1], epoch_order(SIZES, batch, 0, 1, shuffle, nodes))
    assert np.array_equal(orders[0], orders[1]) is not shuffle
    other_seed = epoch_order(SIZES, batch, 1, 0, shuffle, nodes)
    assert np.array_equal(orders[0], other_seed) is not shuffle


def test_every_sample_has_its_turn_though_some_are_left_out_of_an_epoch():
    seen = {int(i) for epoch in range(8) for i in epoch_order(SIZES, 4, 0, epoch).flatten()}
    assert seen == set(range(26))


def test_canonical_nodes_read_their_own_shards():
    order = epoch_order(np.array([8, 8, 8, 8]), 4, 0, 0, True, 2)
    halves = [{int(i) // 8 for i in part.flatten()} for part in np.split(order, 2, axis=1)]
    assert not halves[0] & halves[1] and all(len(half) == 2 for half in halves)


def test_locate_is_a_pure_function_of_the_step():
    assert [locate(step, 6) for step in (0, 5, 6, 13)] == [(0, 0), (0, 5), (1, 0), (2, 1)]


@pytest.fixture(scope="module")
def reference(shards):
    return read(DataConfig(str(shards), num_workers=0), 14)


def test_epochs_follow_each_other(reference):
    assert [epoch for epoch, _ in reference] == [0] * 6 + [1] * 6 + [2] * 2
    for begin in (0, 6):
        ids = [name for _, batch in reference[begin : begin + 6] for name in batch]
        assert len(set(ids)) == 24
    assert reference[:6] != [(0, batch) for _, batch in reference[6:12]]


@pytest.mark.parametrize("first", [1, 5, 6, 11, 13])
def test_resume_at_any_step(shards, reference, first):
    got = read(DataConfig(str(shards), num_workers=0), 14 - first, first=first)
    assert got == reference[first:]


@pytest.mark.parametrize("workers, first", [(1, 0), (2, 4)])
def test_workers_do_not_change_the_order(shards, reference, workers, first):
    got = read(DataConfig(str(shards), num_workers=workers), 14 - first, first=first)
    assert got == reference[first:]


def run_ranks(root: Path, world: int, workers: int, steps: int, first: int) -> list[dict]:
    """What each rank read; the ranks are processes with a gloo group, as in training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    arguments = (results, str(root), world, port, workers, steps, first)
    ranks = [context.Process(target=read_rank, args=(rank, *arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    read = dict(results.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * world
    return [read[rank] for rank in range(world)]


@pytest.mark.parametrize("world, workers, first", [(2, 1, 0), (4, 0, 3)])
def test_global_batches_are_the_same_for_any_number_of_ranks(
    shards, reference, world, workers, first
):
    ranks = run_ranks(shards, world, workers, 8, first)
    for step, (epoch, expected) in enumerate(reference[first : first + 8]):
        parts = [rank["batches"][step] for rank in ranks]
        assert {part[0] for part in parts} == {epoch}
        assert all(len(part[1]) == 4 // world for part in parts)
        assert tuple(name for part in parts for name in part[1]) == expected
    assert [rank["held"] for rank in ranks] == [[f"validation{r:03d}"] for r in range(world)]


def test_batch_has_the_schema(shards):
    _, batch = next(build_loader(DataConfig(str(shards), num_workers=0), 4, 0, 1, 3))
    metadata = load_metadata(shards)
    assert batch.video_latents.shape == (4, *metadata.video_latent_shape)
    assert batch.video_latents.dtype == batch.audio_mean.dtype == torch.float32
    assert batch.audio_mean.shape == batch.audio_std.shape == (4, *metadata.audio_latent_shape)
    assert batch.video_text.shape == (4, metadata.video_text_length, metadata.video_text_width)
    assert batch.audio_text_mask.dtype == torch.bool and batch.audio_text.shape[1] == 64
    assert batch.duration.tolist() == [metadata.duration] * 4
    part = batch.part(slice(1, 3))
    assert part.sample_ids == batch.sample_ids[1:3]
    assert torch.equal(part.video_latents, batch.video_latents[1:3])
    # Padding rows of the video text are zero, real ones are not.
    zero = (batch.video_text == 0).all(dim=2)
    assert zero.any() and torch.equal(zero, zero.cummax(dim=1).values)


def test_clips_without_sound_are_told_apart(tmp_path):
    held_out = HeldOut(DataConfig(str(write_shards(tmp_path / "mixed", 4, 6, silent=3))))
    batch = held_out.batch(list(range(6)))
    assert batch.has_audio.tolist() == [True, True, False] * 2
    assert batch.has_audio.dtype == torch.bool
    for stored in (batch.audio_mean, batch.audio_std):
        assert torch.equal(stored.ne(0).any(2).any(1), batch.has_audio)
    assert batch.part(slice(2, 4)).has_audio.tolist() == [False, True]


def test_latents_are_normalised_at_load(shards):
    held_out, metadata = HeldOut(DataConfig(str(shards))), load_metadata(shards)
    raw = torch.from_numpy(held_out.dataset[2]["video_latents"].astype(np.float32))
    mean, std = (torch.tensor(v) for v in (metadata.latents_mean, metadata.latents_std))
    expected = (raw - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    assert torch.equal(held_out.batch([4, 2]).video_latents[1], expected)


def test_held_out_samples_by_index(shards):
    held_out = HeldOut(DataConfig(str(shards)))
    assert len(held_out) == HELD
    assert held_out.batch([3, 0, 3]).sample_ids == [
        "validation003",
        "validation000",
        "validation003",
    ]
    overfit = HeldOut(DataConfig(str(shards), validation_split="train"))
    assert len(overfit) == TRAIN


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_shard_stops_the_run(copy, workers):
    flip_byte(sorted((copy / "train").glob("*.zstd"))[1])
    with pytest.raises(
        DataError, match="shard.00001.mds.zstd: this shard cannot be read .Checksum failure"
    ):
        read(DataConfig(str(copy), num_workers=workers, timeout_seconds=60), 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_that_vanishes_during_the_run_stops_it(copy, workers):
    loader = build_loader(
        DataConfig(str(copy), num_workers=workers, timeout_seconds=60), 4, 0, 1, 3
    )
    sorted((copy / "train").glob("*.zstd"))[2].unlink()
    with pytest.raises(
        DataError, match="shard.00002.mds.zstd: this shard cannot be read .its file is missing"
    ):
        list(itertools.islice(loader, 20))


def test_shard_damaged_after_it_was_unpacked_is_noticed(copy):
    config = DataConfig(str(copy), num_workers=0)
    read(config, 6)  # unpacks
    flip_byte(sorted((copy / "train").glob("*.mds"))[1])
    with pytest.raises(DataError, match="shard.00001.mds: its xxh64 is not the one in index.json"):
        read(config, 6)
    assert len(HeldOut(config)) == HELD  # the other split is whole


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: sorted((p / "train").glob("*.zstd"))[1].unlink(), "shard.00001.*missing"),
        (lambda p: (p / "train" / "index.json").unlink(), "no split 'train'.*data.prepare"),
        (lambda p: (p / "train" / "index.json").write_text("{"), "index.json: damaged"),
        (lambda p: sorted((p / "train").glob("*.zstd"))[0].write_bytes(b"short"), "5 bytes, index"),
        (lambda p: (p / "dataset.json").unlink(), "no dataset.json.*data.prepare"),
        (lambda p: (p / "dataset.json").write_text('{"format": 99}'), "format 99.*reads format 2"),
        (lambda p: (p / "dataset.json").write_text('{"format": 2}'), "dataset.json: damaged"),
        (lambda p: shutil.rmtree(p), "data.root=.*: no dataset.json; make it with"),
    ],
)
def test_a_data_set_that_is_not_whole_is_refused_at_the_start(copy, damage, message):
    damage(copy)
    with pytest.raises(DataError, match=message) as error:
        build_loader(DataConfig(str(copy), num_workers=0), 4, 0, 1, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "batch, world, nodes, message",
    [
        (64, 1, 1, "global_batch_size=64: split 'train'.*only 26 samples"),
        (6, 4, 1, "global_batch_size=6 is not divisible by ranks=4; use 4 or 8"),
        (6, 1, 4, "global_batch_size=6 is not divisible by num_canonical_nodes=4; use 4 or 8"),
        (4, 2, 1, "rank 0 of 2, but RANK and WORLD_SIZE in the environment say 0 of 1"),
    ],
)
def test_impossible_batches_are_refused(shards, batch, world, nodes, message):
    config = DataConfig(str(shards), num_workers=0, num_canonical_nodes=nodes)
    with pytest.raises(DataError, match=message):
        build_loader(config, batch, 0, world, 0)


def test_no_held_out_split_is_named(shards):
    with pytest.raises(DataError, match="no split 'test'"):
        HeldOut(DataConfig(str(shards), validation_split="test"))


def test_length_counts_this_ranks_samples(shards):
    dataset = ShardDataset(DataConfig(str(shards)), "train", 4, 1)
    assert (len(dataset), dataset.steps_per_epoch) == (24, 6)
