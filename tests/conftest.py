"""Every test runs on the CPU, also where a GPU is present, with ninja on the PATH.

One thread per process: the tensors are tiny, and OpenMP threads that wait for a busy core made a
0.4 s encode take 13 s.

streaming frees its shared memory when the process ends; here that is after hundreds of data sets.
"""

import contextlib
import gc
import os
import sys
from pathlib import Path

import pytest

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module", autouse=True)
def released_shared_memory():
    """What a test file's data sets held open is closed at its end."""
    if "streaming" not in sys.modules:  # seconds to import
        yield
        return
    from streaming.base.shared.memory import SharedMemory

    held, build = [], SharedMemory.__init__

    def build_and_remember(memory, *arguments, **more):
        build(memory, *arguments, **more)
        held.append(memory)

    SharedMemory.__init__ = build_and_remember
    yield
    SharedMemory.__init__ = build
    gc.collect()
    for memory in held:
        with contextlib.suppress(BufferError):  # a data set of a longer-lived fixture reads it
            memory.cleanup()
