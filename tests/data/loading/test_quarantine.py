"""Samples that were stored wrong: named and stopped at, or replaced by a neighbour and counted."""

import dataclasses

import pytest
import torch

from data.loading.loader import build_loader
from data.loading.shards import ShardDataset
from data.loading.sources import DataConfig, open_streams
from data.schema import DataError, load_metadata, sample_fault
from tests.support.inputs import prepared
from tests.support.inputs.prepared import write_shards
from training.guards.run_state import read_state

BAD = "train007"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """20 samples, one of which has a NaN in its video latents: as written, with a good hash."""
    folder = tmp_path_factory.mktemp("quarantine")
    original = prepared.pack

    def pack(record, video, *rest):
        if record["id"] == BAD:
            video = video.clone()
            video[3, 0, 1, 2] = torch.nan
        return original(record, video, *rest)

    prepared.pack = pack
    try:
        return write_shards(folder / "shards", train=20, validation=2)
    finally:
        prepared.pack = original


def config(root, **values):
    return DataConfig(str(root), num_workers=0, **values)


def read(root, run_dir=None, **values):
    loader = build_loader(config(root, **values), 4, 0, 1, 0, 0, run_dir)
    batches = [next(loader)[1] for _ in range(5)]
    loader.close()
    return batches


def test_it_stops_and_names_sample_column_and_fix(root):
    with pytest.raises(DataError, match=rf"sample {BAD}: video_latents is not finite; prepare its"):
        read(root)


def test_a_neighbour_takes_its_place_the_same_each_time_and_it_is_told(root, tmp_path):
    first = read(root, tmp_path, on_bad_shard="substitute", max_substituted_fraction=0.06)
    again = read(root, None, on_bad_shard="substitute", max_substituted_fraction=0.06)
    ids = [name for batch in first for name in batch.sample_ids]
    assert ids == [name for batch in again for name in batch.sample_ids]
    assert BAD not in ids and len(ids) == 20 and len(set(ids)) == 19
    assert all(batch.video_latents.isfinite().all() for batch in first)
    (told,) = read_state(tmp_path).substitutions
    assert told["reason"].split(": ")[1] == f"sample {BAD}" and told["used"] in ids
    assert told["shard"].endswith("#7")  # one sample counts, not its shard


def test_too_many_stop_the_run(root):
    with pytest.raises(DataError, match="max_substituted_fraction=0.04: 1 of the 20 samples"):
        read(root, on_bad_shard="substitute", max_substituted_fraction=0.04)


def test_in_a_single_shard_the_next_row_takes_its_place(root):
    made = config(root, on_bad_shard="substitute")
    dataset = ShardDataset(made, open_streams(made), "train")
    only = int(dataset.spanner[7][0])
    dataset.broken = dict.fromkeys(set(range(dataset.num_shards)) - {only}, "gone")
    sample = dataset[7]
    assert sample["id"] != BAD and sample["substitution"]["used"] == sample["id"]
    assert int(dataset.spanner[int(sample["id"][5:])][0]) == only


@pytest.mark.parametrize(("change", "message"), [
    ({"video_latent_shape": [48, 3, 4, 5]}, "video_latents has shape [48, 3, 4, 4], not"),
    ({"audio_latent_shape": [13, 6]}, "audio_mean has shape [12, 6], not [13, 6]"),
    ({"video_text_width": 31}, "video_text has shape"),
    ({"video_text_length": 2}, "not at most [2, 32]"),
])
def test_shapes_are_held_against_dataset_json(root, change, message):
    made = config(root)
    sample = ShardDataset(made, open_streams(made), "train")[0]
    metadata = load_metadata(root)
    assert sample_fault(sample, metadata) is None
    assert message in sample_fault(sample, dataclasses.replace(metadata, **change))


@pytest.mark.parametrize("column", ["audio_mean", "audio_std", "video_text", "audio_text"])
def test_every_column_is_looked_at(root, column):
    made = config(root)
    sample = ShardDataset(made, open_streams(made), "train")[0]
    sample[column] = sample[column].copy()
    sample[column].flat[0] = 0x7F81 if column.endswith("text") else float("inf")
    assert sample_fault(sample, load_metadata(root)) == f"{column} is not finite"
