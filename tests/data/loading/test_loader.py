"""Order: equal global batches for any ranks, workers, resume. Faults: raised, never hidden."""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loading.loader import ValidationSet, build_loader
from data.loading.sources import DataConfig
from data.schema import DataError, Metadata, collate, load_metadata
from tests.support.inputs.prepared import write_shards
from tests.support.launch import ROOT, environment
from tests.support.workers.ranks import Job, global_batches, run_job

TRAIN, HELD = 26, 5


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


@pytest.mark.parametrize("world, workers, first", [(2, 1, 0), (4, 0, 3)])
def test_global_batches_are_the_same_for_any_number_of_ranks(
    shards, reference, world, workers, first
):
    ranks = run_job(Job(DataConfig(str(shards), num_workers=workers), world, 8, first=first))
    assert global_batches(ranks) == reference[first : first + 8]
    for rank in ranks:
        assert all(len(ids) == 4 // world for _, ids, _, _ in rank["batches"])
    held = [(name, real) for rank in ranks for ids, reals, _ in rank["held"]
            for name, real in zip(ids, reals, strict=True)]
    assert sorted(name for name, real in held if real) == [f"validation{i:03d}" for i in range(5)]
    assert len({len(rank["held"]) for rank in ranks}) == 1


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
    assert part.video_text_length == metadata.video_text_length
    # Padding rows of the video text are zero, real ones are not.
    zero = (batch.video_text == 0).all(dim=2)
    assert zero.any() and torch.equal(zero, zero.cummax(dim=1).values)


def test_clips_without_sound_are_told_apart(tmp_path):
    root = write_shards(tmp_path / "mixed", 4, 6, silent=3)
    validation_set = ValidationSet(DataConfig(str(root)))
    batch = validation_set.batch(list(range(6)))
    assert batch.has_audio.tolist() == [True, True, False] * 2
    assert batch.has_audio.dtype == torch.bool
    for stored in (batch.audio_mean, batch.audio_std):
        assert torch.equal(stored.ne(0).any(2).any(1), batch.has_audio)
    assert batch.part(slice(2, 4)).has_audio.tolist() == [False, True]


def test_latents_are_normalised_at_load(shards):
    validation_set, metadata = ValidationSet(DataConfig(str(shards))), load_metadata(shards)
    raw = torch.from_numpy(validation_set.dataset[2]["video_latents"].astype(np.float32))
    mean, std = (torch.tensor(v) for v in (metadata.latents_mean, metadata.latents_std))
    expected = (raw - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    assert torch.equal(validation_set.batch([4, 2]).video_latents[1], expected)


def test_validation_samples_by_index(shards):
    validation_set = ValidationSet(DataConfig(str(shards)))
    assert len(validation_set) == HELD
    assert validation_set.batch([3, 0, 3]).sample_ids == [
        "validation003",
        "validation000",
        "validation003",
    ]
    overfit = ValidationSet(DataConfig(str(shards), validation_split="train"))
    assert len(overfit) == TRAIN


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: sorted((p / "train").glob("*.zstd"))[1].unlink(), "shard.00001.*missing"),
        (lambda p: (p / "train" / "index.json").unlink(), "no split 'train'.*data.prepare"),
        (lambda p: (p / "train" / "index.json").write_text("{"), "index.json: damaged"),
        (lambda p: sorted((p / "train").glob("*.zstd"))[0].write_bytes(b"short"), "5 bytes, index"),
        (lambda p: (p / "dataset.json").unlink(), "no dataset.json.*data.prepare"),
        (lambda p: (p / "dataset.json").write_text('{"format": 99}'), "format 99.*reads format 3"),
        (lambda p: (p / "dataset.json").write_text('{"format": 3}'), "dataset.json: differs"),
        (lambda p: (p / "dataset.json").write_bytes(b"\xff"), "dataset.json: damaged"),
        (lambda p: (p / "dataset.json").write_text((p / "dataset.json").read_text().replace(
            '"fps": 24.0', '"fps": 25.0')), "dataset.json: differs from its own sha256"),
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


def test_no_validation_split_is_named(shards):
    with pytest.raises(DataError, match="no split 'test'"):
        ValidationSet(DataConfig(str(shards), validation_split="test"))


RANK = """
import sys, time
print("imported as", __name__, flush=True)
from data.loading.loader import build_loader
from data.loading.sources import DataConfig
if __name__ == "__main__":
    loader = build_loader(DataConfig(sys.argv[1], num_workers=2), 4, 0, 1, 3)
    next(loader)
    print("reading", flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_killed_rank(shards, tmp_path):
    """PyTorch's workers watch their parent, which is the fork server, and would stay for ever."""
    (tmp_path / "rank.py").write_text(RANK)
    program = [sys.executable, tmp_path / "rank.py", str(shards)]
    rank = subprocess.Popen(program, cwd=ROOT, text=True,
                            env=environment(), stdout=subprocess.PIPE, start_new_session=True)
    assert rank.stdout and rank.stdout.readline() == "imported as __main__\n"
    assert rank.stdout.readline() == "reading\n", "a worker imported the rank's program"
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait()
    deadline = time.monotonic() + 15
    try:
        while _members(rank.pid):
            assert time.monotonic() < deadline, f"{_members(rank.pid)} stayed"
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)


def _members(group: int) -> list[str]:
    """Command lines of a process group's living members."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, its_group = (path / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append((path / "cmdline").read_text().replace("\0", " "))
    return found


def test_a_killed_worker_is_named_at_once(shards):
    """The memory killer takes workers; with a timeout of its own PyTorch looks only at its end."""
    before = set(multiprocessing.active_children())
    loader = build_loader(DataConfig(str(shards), num_workers=1), 4, 0, 1, 3)
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="DataLoader worker .*exited"):
        for _ in loader:
            pass
    assert time.monotonic() - began < 20
    loader.close()


@pytest.mark.parametrize(("longest", "rows"), [(5, 32), (31, 32), (32, 64), (500, 512), (512, 512)])
def test_video_text_keeps_the_longest_captions_rows_and_one_of_padding(longest, rows):
    stored = {"video_latents": np.zeros((1, 1, 1, 1), np.float16), "id": "x", "has_audio": 0,
              "audio_mean": np.zeros((1, 1), np.float16), "audio_std": np.zeros((1, 1), np.float16),
              "audio_text": np.zeros((64, 4), np.uint16), "audio_text_mask": np.zeros(64, np.uint8)}
    texts = [np.full((count, 4), 0x3F80, np.uint16) for count in (3, longest)]  # ones
    metadata = Metadata(
        fps=24.0, frames=1, height=16, width=16, sample_rate=16000, audio_hop=512,
        video_temporal_stride=4, video_spatial_stride=16, latents_mean=[0.0], latents_std=[1.0],
        video_latent_shape=[1, 1, 1, 1], audio_latent_shape=[1, 1], video_text_length=512,
        video_text_width=4, audio_text_length=64, audio_text_width=4)
    batch = collate([stored | {"video_text": text} for text in texts], metadata)
    assert batch.video_text.shape == (2, rows, 4)
    assert batch.padded_video_text.shape == (2, 512, 4)
    assert batch.padded_video_text.sum(dim=(1, 2)).tolist() == [12, 4 * longest]
