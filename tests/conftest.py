"""Every test runs on the CPU, also where a GPU is present, with ninja on the PATH.

One thread per process: the tensors are tiny, and OpenMP threads that wait for a busy core made a
0.4 s encode take 13 s.

streaming frees its shared memory when the process ends; here that is after hundreds of data sets.
"""

import collections
import contextlib
import os
import sys
from pathlib import Path

import pytest

from tests.support import zygote
from tests.support.memory import released_shared_memory

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def pytest_configure(config):
    """pytest-xdist's processes share one zygote, which imports while they collect."""
    controller = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if controller and config.option.markexpr != "slurm":  # on Slurm all is real
        zygote.start()


@pytest.fixture(scope="module", autouse=True)
def shared_memory():
    """What a test file's data sets held open is closed at its end."""
    with released_shared_memory() if "streaming" in sys.modules else contextlib.nullcontext():
        yield


def pytest_collection_modifyitems(items):
    """The longest first, so that no core is idle at the end; in `make test` a file stays together.

    There they are the files that run whole processes, those with most of them before; in the other
    tiers the tests whose mark says how many seconds they take.
    """
    whole = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-_seconds(item), -whole[item.path]))  # stable


def _seconds(item):
    marks = [mark for tier in ("faults", "slurm") for mark in item.iter_markers(tier)]
    return max((mark.kwargs.get("seconds", 0) for mark in marks), default=0)
