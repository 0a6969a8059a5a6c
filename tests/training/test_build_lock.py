"""training/build_lock.py: a killed build's lock goes, a living one's stays."""

import os
import subprocess
import sys
import time

import pytest
from torch.utils.file_baton import FileBaton

from training.build_lock import holder, remove_dead_locks

HOLD = "import sys, time; from torch.utils.file_baton import FileBaton as B; b = B(sys.argv[1]); " \
       "assert b.try_acquire(); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def lock(tmp_path):
    (tmp_path / "py311_cpu" / "an_op").mkdir(parents=True)
    return tmp_path / "py311_cpu" / "an_op" / "lock"


def build(lock):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_library_a_killed_build_is_waited_for(lock):
    """The defect, in torch: the lock outlives its owner, and nobody can take it."""
    process = build(lock)
    process.kill()
    process.wait()
    assert lock.exists() and not FileBaton(str(lock)).try_acquire()


def test_a_dead_ones_lock_goes_and_a_living_ones_stays(lock, tmp_path, capsys):
    process = build(lock)
    assert holder(lock) == process.pid
    assert remove_dead_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)}, False) == []
    process.kill()
    process.wait()
    assert remove_dead_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)}, False) == [lock]
    assert str(lock) in capsys.readouterr().err and not lock.exists()
    assert FileBaton(str(lock)).try_acquire()


def test_on_several_nodes_a_young_one_is_only_named(lock, tmp_path, capsys):
    lock.touch()
    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert remove_dead_locks(environ, True) == [] and lock.exists()
    assert f"{lock} is" in capsys.readouterr().err
    os.utime(lock, (time.time() - 1000,) * 2)
    assert remove_dead_locks(environ, True) == [lock]


def test_in_a_nodes_own_folder_it_goes_whatever_its_age(lock, tmp_path):
    lock.touch()
    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "SLURMD_NODENAME": tmp_path.name}
    assert remove_dead_locks(environ, True) == [lock]
