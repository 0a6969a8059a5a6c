"""Jobs that share a machine: started at once, killed, and left alone by their neighbours."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from streaming.base.shared import prefix as streaming_prefix

from data.loading import node
from data.loading.loader import ValidationSet, build_loader
from data.loading.sources import DataConfig
from data.schema import DataError
from tests.support.inputs.prepared import write_shards
from tests.support.launch import ROOT, environment

JOBS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), 12, 5)


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.workers.ranks"])
    return context


def names(number):
    """What a job keeps on the machine."""
    places = (node.SHARED_MEMORY, Path(tempfile.gettempdir()))
    return sorted(str(path) for place in places for path in place.glob(f"*{number}*"))


def look_together(barrier):
    """All jobs have looked for a free number before any of them takes its own."""
    look = streaming_prefix._check_and_find_retrying

    def look_and_wait(*arguments, **more):
        found = look(*arguments, **more)
        barrier.wait(120)
        return found

    streaming_prefix._check_and_find_retrying = look_and_wait


def job(root, barrier, results, hold):
    """A job of its own: it reads, tells its number, and lives until the file `hold` is there."""
    look_together(barrier)
    config = DataConfig(str(root), num_workers=0, cache_limit="1gb")
    ids = next(build_loader(config, 4, 0, 1, 3))[1].sample_ids
    validation_set = ValidationSet(config)
    results.put((os.getpid(), node.job_number(), ids))
    while not hold.exists():  # a file: an Event would be waited for by a killed process for ever
        time.sleep(0.1)
    validation_set.batch([0])
    results.put((os.getpid(), node.job_number(), ids))


def start(context, shards, count, hold):
    barrier = context.Barrier(count)
    results = [context.Queue() for _ in range(count)]  # a killed process may hold its queue's lock
    jobs = [context.Process(target=job, args=(shards, barrier, queue, hold)) for queue in results]
    for process in jobs:
        process.start()
    return jobs, results, [queue.get(timeout=120) for queue in results]


def test_jobs_that_start_at_once_do_not_meet(context, shards, tmp_path):
    jobs, _, told = start(context, shards, JOBS, tmp_path / "go")
    numbers = {number for _, number, _ in told}
    assert len(numbers) == JOBS and len({tuple(ids) for *_, ids in told}) == 1
    assert all(names(number) for number in numbers)
    (tmp_path / "go").touch()
    for process in jobs:
        process.join(120)
    assert [process.exitcode for process in jobs] == [0] * JOBS
    node.remove_leftovers()  # such a process ends without its atexit handlers
    assert [names(number) for number in numbers] == [[]] * JOBS


def test_leftovers_of_a_killed_job_go_and_those_of_a_live_one_stay(context, shards, tmp_path):
    jobs, results, told = start(context, shards, 2, tmp_path / "go")
    number_of = {pid: number for pid, number, _ in told}
    killed, alive = jobs
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(60)
    left, kept = names(number_of[killed.pid]), names(number_of[alive.pid])
    assert any(name.startswith("/dev/shm") for name in left)
    assert any("avfulldit-" in name for name in left)  # its copies of shards
    node.remove_leftovers()
    assert names(number_of[killed.pid]) == []
    assert names(number_of[alive.pid]) == kept and kept
    (tmp_path / "go").touch()
    assert results[1].get(timeout=120)[1] == number_of[alive.pid]  # it can still read
    alive.join(120)
    assert alive.exitcode == 0


READS = """
import sys
from data.loading.loader import DataConfig, build_loader
loader = build_loader(DataConfig(sys.argv[1], num_workers=1), 4, 0, 1, 3)
print(next(loader)[1].sample_ids)
loader.close()
"""


@pytest.mark.faults
def test_pythons_resource_tracker_has_no_part_in_it(shards):
    """It would free at a rank's end, or at a worker's, what others read, and complain of it."""
    # Not a fork: the pipe is read to its end, which is the tracker's, after the process.
    done = subprocess.run([sys.executable, "-c", READS, str(shards)], cwd=ROOT, env=environment(),
                          capture_output=True, text=True, check=True)
    assert "train" in done.stdout and not done.stderr


def test_a_cache_folder_belongs_to_one_run(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "shard.mds.77.part").touch()
    lock = node.lock_cache(tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(DataError, match=f"data.cache_dir={tmp_path}: another run"):
        node.lock_cache(tmp_path)
    lock.close()
    node.lock_cache(tmp_path).close()


def test_each_data_set_opens_as_many_files_as_the_first(shards):
    def opened():
        before = len(os.listdir("/proc/self/fd"))
        kept.append(ValidationSet(DataConfig(str(shards), num_workers=0)))
        return len(os.listdir("/proc/self/fd")) - before

    kept = []
    counts = [opened() for _ in range(5)]
    assert len(set(counts[1:])) == 1 and counts[1] <= counts[0] < 20
