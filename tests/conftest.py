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

from tests.memory import released_shared_memory

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module", autouse=True)
def shared_memory():
    """What a test file's data sets held open is closed at its end."""
    with released_shared_memory() if "streaming" in sys.modules else contextlib.nullcontext():
        yield


def pytest_collection_modifyitems(items):
    """Files that run whole processes come first, those with most of them before."""
    whole = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -whole[item.path])  # stable: files stay together
