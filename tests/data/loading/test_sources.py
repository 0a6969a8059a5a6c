"""Streams: what may be given and must agree, several shapes, sound weighted over ranks."""

import dataclasses
import math
from collections import Counter

import pytest

from common.settings import ConfigError, parse_config
from data.loading import sources
from data.loading.loader import ValidationSet
from data.loading.sources import DataConfig, StreamConfig, check_data, needs_cache, open_streams
from data.provenance import check_provenance
from data.schema import DataError
from tests.support.inputs.prepared import LATENT, SOUND, write_shards
from tests.support.models.tiny import HOP, SAMPLE_RATE
from tests.support.workers.ranks import Job, global_batches, run_job

LONG = {"frames": 13, "video_latent_shape": [LATENT[0], 4, *LATENT[2:]],
        "audio_latent_shape": [math.ceil(13 / 24 * SAMPLE_RATE / HOP), SOUND[1]]}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Two data sets of one shape and one of another; every third clip of the first is silent."""
    root = tmp_path_factory.mktemp("streams")
    write_shards(root / "small", 10, 3, silent=3, seed=1, prefix="small-")
    write_shards(root / "big", 30, 5, seed=2, prefix="big-")
    write_shards(root / "long", 14, 4, silent=2, seed=3, prefix="long-", **LONG)
    return root


def config(roots, workers=0, **proportions):
    chosen = proportions or {"small": None, "big": None, "long": None}
    streams = [StreamConfig(str(roots / name), proportion=share) for name, share in chosen.items()]
    return DataConfig(streams=streams, num_workers=workers)


@pytest.fixture(scope="module")
def reference(roots):
    return run_job(Job(config(roots), 1, 30))[0]


def test_every_batch_has_one_shape_and_streams_of_a_shape_are_mixed(reference):
    shapes, together = Counter(), set()
    for _, ids, shape, _ in reference["batches"][:13]:  # (10 + 30) // 4 + 14 // 4 = an epoch
        names = {name.split("-")[0] for name in ids}
        assert names <= {"small", "big"} if shape == LATENT else names == {"long"}
        shapes[shape] += 1
        together |= {frozenset(names)}
    assert shapes == {LATENT: 10, tuple(LONG["video_latent_shape"]): 3}
    assert frozenset({"small", "big"}) in together
    assert [epoch for epoch, *_ in reference["batches"]] == [0] * 13 + [1] * 13 + [2] * 4


@pytest.mark.parametrize("world, first", [(2, 0), (4, 7), (1, 15)])
def test_same_global_order_and_one_shape_on_any_ranks_resumed_or_not(
    roots, reference, world, first
):
    ranks = run_job(Job(config(roots), world, 30 - first, first=first))
    assert global_batches(ranks) == global_batches([reference])[first:]
    for parts in zip(*(rank["batches"] for rank in ranks), strict=True):
        assert len({shape for _, _, shape, _ in parts}) == 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sound_is_weighted_alike_over_any_ranks(roots, reference, world):
    """weight * samples / heard: the mean over a global batch is one over its clips with sound."""
    ranks = run_job(Job(config(roots), world, 13))
    for step, (_, ids, _, weights) in enumerate(reference["batches"][:13]):
        silent = [name for name in ids if is_silent(name)]
        assert weights == pytest.approx({
            name: 0.0 if name in silent else len(ids) / max(len(ids) - len(silent), 1)
            for name in ids
        })
        merged = {k: v for rank in ranks for k, v in rank["batches"][step][3].items()}
        assert merged == weights


def is_silent(name):
    every = {"small": 3, "long": 2}.get(name.split("-")[0], 0)
    return bool(every) and (int(name[-3:]) + 1) % every == 0


def test_proportions_are_exact_over_an_epoch(roots):
    job = Job(config(roots, small=1.0, big=1.0), 1, 10)
    ids = [name for _, ids, *_ in run_job(job)[0]["batches"] for name in ids]
    counts = Counter(name.split("-")[0] for name in ids)
    assert counts == {"small": 20, "big": 20}  # 10 samples twice, 20 of the 30 once
    turns = Counter(ids)
    assert {turns[name] for name in turns if name.startswith("small")} == {2}
    assert {turns[name] for name in turns if name.startswith("big")} == {1}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("samples", [None, 6])
def test_validation_choice_is_the_same_on_any_ranks(roots, world, samples):
    validation_set = ValidationSet(config(roots))
    taken, calls = [], set()
    for rank in range(world):
        shares = list(validation_set.shares(samples, 2, rank, world, 0))
        calls.add(tuple(batch.video_latents.shape for batch, _ in shares))
        taken += [name for batch, real in shares
                  for name, kept in zip(batch.sample_ids, real.tolist(), strict=True) if kept]
    assert len(calls) == 1  # as many batches of the same shapes on every rank
    wanted = {"small": 3, "big": 5, "long": 4} if samples is None else {
        "small": 1, "big": 3, "long": 2}
    assert sorted(taken) == sorted(
        f"{name}-validation{index:03d}" for name, count in wanted.items() for index in range(count)
    )


def test_duration_follows_the_stream(roots):
    validation_set = ValidationSet(config(roots))
    assert validation_set.batch([0]).duration.tolist() == pytest.approx([9 / 24])
    assert validation_set.batch([8]).duration.tolist() == pytest.approx([13 / 24])


@pytest.mark.parametrize("values, message", [
    ({}, "data: no place given; set exactly one of data.root, data.remote and data.streams"),
    ({"root": "a", "remote": "s3://b/c"}, "data: root and remote given"),
    ({"streams": [{"root": "a"}, {"root": "b/a"}]}, "name 'a' must be unique"),
    ({"streams": [{"root": "a", "proportion": 1}, {"root": "b"}]}, "only a has a proportion"),
    ({"streams": [{"root": "a", "proportion": 0}]}, "streams.0.proportion=0 must be above 0"),
    ({"streams": [{"root": "a", "rot": "b"}]},
     "unknown key 'streams.0.rot'; did you mean 'streams.0.root'?"),
    ({"streams": [{"name": "a"}]}, "a stream has root=None and remote=None; give exactly one"),
    ({"remote": "bucket/a"}, "remote=bucket/a is not an address; a local folder is a root"),
    ({"root": "a", "max_substituted_fraction": 1}, "max_substituted_fraction=1 must be below 1"),
    ({"root": "a", "on_bad_shard": "skip"}, "on_bad_shard='skip'"),
    ({"root": "a", "download_retries": 0}, "download_retries=0 must be at least 1"),
])
def test_bad_configs_are_one_line(values, message):
    with pytest.raises(ConfigError) as error:
        parse_config(DataConfig, values)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field, value", [
    ("fps", 25.0), ("sample_rate", 44100), ("fingerprints", {"video_vae": "other"}),
])
def test_streams_that_one_model_cannot_take_are_refused(roots, field, value):
    opened = open_streams(config(roots))
    metadata = {stream.place: stream.metadata for stream in opened}
    metadata = {place: dataclasses.replace(found, fingerprints={"video_vae": "one"})
                for place, found in metadata.items()}
    last = opened[-1].place
    metadata[last] = dataclasses.replace(metadata[last], **{field: value})
    with pytest.raises(DataError, match=f"{field}.*small.*long.*prepare one of the two again"):
        check_provenance(metadata, "/nowhere", None)


def test_a_shape_with_less_than_a_batch_is_named(roots):
    with pytest.raises(DataError, match="of .*long has only 14 samples of shape 13x64x64"):
        check_data(config(roots), 16)


def test_a_root_that_cannot_be_written_is_read_through_a_cache(roots, monkeypatch):
    stream, plain = StreamConfig(str(roots / "big")), DataConfig(str(roots / "big"))
    assert not needs_cache(stream, plain)
    assert needs_cache(stream, dataclasses.replace(plain, cache_limit="1gb"))
    assert needs_cache(stream, dataclasses.replace(plain, cache_dir="/scratch"))
    for split in ("train", "validation"):
        for path in (roots / "big" / split).glob("*.mds"):
            path.unlink()
    monkeypatch.setattr(sources.os, "access", lambda path, mode: False)
    assert needs_cache(stream, plain)
    found = run_job(Job(plain, 1, 7))[0]
    assert found["error"] is None and len(found["batches"]) == 7
    assert not list((roots / "big").rglob("*.mds"))
