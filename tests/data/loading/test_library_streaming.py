"""Defects of mosaicml-streaming that we work around, in streaming itself: a failure means gone.

The numbers are those of the list in docs/development.md.
"""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from streaming.base.world import World

from tests.support.launch import ROOT, environment

SAMPLES = 64


@pytest.fixture(autouse=True)
def fresh_shared_memory():
    clean_stale_shared_memory()


@pytest.fixture
def shards(tmp_path):
    """64 samples in 8 shards or so, with hashes."""
    with MDSWriter(out=str(tmp_path / "data"), columns={"x": "ndarray:float32:64", "i": "int"},
                   hashes=["xxh64"], size_limit=1 << 11) as writer:
        for index in range(SAMPLES):
            writer.write({"x": np.full(64, index, np.float32), "i": index})
    files = sorted((tmp_path / "data").glob("*.mds"))
    assert len(files) > 6
    return files


def spoil(path):
    data = bytearray(path.read_bytes())
    data[-40] ^= 0x40  # inside the last sample's array
    path.write_bytes(data)


def read(**arguments):
    """(samples that arrived, the exception if any) of one epoch without workers."""
    dataset = StreamingDataset(batch_size=4, validate_hash="xxh64", download_timeout=5,
                               download_retry=1, **arguments)
    seen = 0
    try:
        for batch in StreamingDataLoader(dataset, batch_size=4, num_workers=0):
            seen += len(batch["x"])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        return seen, error
    return seen, None


def test_f19_local_shards_are_never_checked(shards):
    spoil(shards[3])
    assert read(local=str(shards[0].parent)) == (SAMPLES, None)


def test_f20_a_shard_that_failed_its_check_is_trusted_next_time(shards, tmp_path):
    spoil(shards[3])
    places = {"remote": str(shards[0].parent), "local": str(tmp_path / "cache")}
    seen, _ = read(**places)
    assert seen < SAMPLES
    clean_stale_shared_memory()
    assert read(**places) == (SAMPLES, None)


@pytest.mark.parametrize("kind", ["bad", "missing"])
def test_f21_a_bad_or_missing_shard_shortens_the_epoch_without_a_word(shards, tmp_path, kind):
    spoil(shards[5]) if kind == "bad" else shards[5].unlink()
    seen, error = read(remote=str(shards[0].parent), local=str(tmp_path / "cache"))
    assert seen < SAMPLES and error is None


WORKERS = """
import sys
from streaming import StreamingDataLoader, StreamingDataset
if __name__ == "__main__":
    dataset = StreamingDataset(remote=sys.argv[1], local=sys.argv[2], batch_size=4,
                               validate_hash="xxh64", download_retry=1)
    print("reading", flush=True)
    for batch in StreamingDataLoader(dataset, batch_size=4, num_workers=2):
        pass
    print("ended")
"""


@pytest.mark.faults
def test_f21_with_workers_it_hangs(shards, tmp_path):
    shards[5].unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", WORKERS, str(shards[0].parent), str(tmp_path / "cache")], cwd=ROOT,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline() == "reading\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=15)
    os.killpg(process.pid, signal.SIGKILL)  # its workers hold the pipe open
    process.communicate()


def test_f22_a_batch_is_counted_by_its_first_value(shards):
    """A dict first: its keys are counted. Ours is a NamedTuple with a tensor first."""
    dataset = StreamingDataset(local=str(shards[0].parent), batch_size=4)
    loader = StreamingDataLoader(dataset, batch_size=4, num_workers=0, collate_fn=lambda samples: {
        "meta": {"a": 1, "b": 2, "c": 3}, "x": [sample["x"] for sample in samples]})
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert loader.num_samples_yielded == 6  # 8 were drawn


def test_f23_without_local_world_size_every_rank_is_its_nodes_leader(monkeypatch):
    """deepspeed's launcher and srun do not set it; training.distributed does, before streaming."""
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        assert World.detect().is_local_leader
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert World.detect().is_local_leader == (rank == 0)
