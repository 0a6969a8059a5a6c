"""Workers that are killed with SIGKILL: nothing half-made is visible, nothing is done twice."""

import shutil
from types import SimpleNamespace

import pytest

from data.prepare import Encoders, prepare, work
from data.prepare import merge as merging
from data.schema import DataError, load_metadata
from data.stored import iter_samples
from data.verify import faults
from tests.support.kills import prepare_kills
from tests.support.models import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(an undisturbed data set, one whose two workers were killed three times or more)."""
    work = tmp_path_factory.mktemp("kills")
    calm, killed, kills = prepare_kills.run(work, kills=3, clips=70, workers=2, seed=1)
    assert kills >= 3
    return calm, killed


def test_killed_workers_make_the_same_files(runs):
    calm, killed = runs
    assert prepare_kills.contents(killed) == prepare_kills.contents(calm)
    assert not killed.with_name(".killed.partial").exists()
    metadata = load_metadata(killed)
    assert metadata.counts == {"train": 48, "validation": 12}
    assert metadata.rejected == {"too_short": 10}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_killed_workers_make_the_same_samples(runs, split):
    samples = [list(iter_samples(root, split)) for root in runs]
    assert len(samples[0]) == len(samples[1]) > 0
    for one, other in zip(*samples, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = value == other[name]
            assert same if isinstance(same, bool) else same.all(), name


class Killed(BaseException):
    """What SIGKILL would do, at a line of our choice."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(manifest of 9 clips, encoders, the data set made of them)."""
    root = tmp_path_factory.mktemp("small")
    folders = tiny.write_wan(root / "wan"), tiny.write_tangoflux(root / "tangoflux")
    encoders = Encoders.load(*map(str, folders), "cpu", prepare_kills.TEXT_LENGTH)
    manifest = prepare_kills.write_source(root, 9)
    prepare(manifest, root / "calm", encoders, prepare_kills.SPEC, shard_clips=2)
    return manifest, encoders, root / "calm"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (work, "publish"),  # the shard is written aside
        (work, "write_json"),  # it has its name, no receipt
        (merging, "_move_shards"),
        (merging, "write_card"),  # shards are moved
        (merging, "save_metadata"),
        (merging, "shutil"),  # the data set is visible, its scratch folder still there
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_end_at_any_point_is_made_good(small, tmp_path, monkeypatch, owner, name):
    manifest, encoders, calm = small
    out = tmp_path / "out"

    def run():
        return prepare(manifest, out, encoders, prepare_kills.SPEC, shard_clips=2)

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        last = SimpleNamespace(copyfile=shutil.copyfile, rmtree=die)
        patch.setattr(owner, name, last if name == "shutil" else die)
        with pytest.raises(Killed):
            run()
    assert out.exists() == (name == "shutil")
    assert run().counts == {"train": 6, "validation": 2}
    assert prepare_kills.contents(out) == prepare_kills.contents(calm)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(faults(out))


def test_a_shard_that_rots_before_the_merge_is_encoded_again(small, tmp_path, monkeypatch):
    manifest, encoders, calm = small
    out = tmp_path / "out"
    arguments = manifest, out, encoders, prepare_kills.SPEC, "train", None
    assert prepare(*arguments, worker=0, workers=2, shard_clips=2) is None
    shard = next((tmp_path / ".out.partial" / "shards").glob("train-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(DataError, match="1 of 5 shards are not what was written .*train-00001"):
        prepare(*arguments, worker=1, workers=2, shard_clips=2)
    assert not out.exists()
    assert prepare(*arguments, worker=0, workers=2, shard_clips=2) is not None
    assert prepare_kills.contents(out) == prepare_kills.contents(calm)


def test_disk_full_is_no_data_set(small, tmp_path, monkeypatch):
    """An error of the file system ends the worker; the next run goes on from there."""
    manifest, encoders, calm = small
    full = OSError(28, "No space left on device")

    def fail(*_):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(work.MDSWriter, "finish", fail)
        with pytest.raises(OSError, match="No space left"):
            prepare(manifest, tmp_path / "out", encoders, prepare_kills.SPEC, shard_clips=2)
    assert not (tmp_path / "out").exists()
    assert prepare(manifest, tmp_path / "out", encoders, prepare_kills.SPEC, shard_clips=2)
    assert prepare_kills.contents(tmp_path / "out") == prepare_kills.contents(calm)
