"""streaming's shared memory, which it keeps open until the process ends: here it ends sooner."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def released_shared_memory() -> Iterator[None]:
    """What data sets open inside is closed at the end, if nobody reads it any more."""
    from streaming.base.shared.memory import SharedMemory  # seconds to import

    held, build = [], SharedMemory.__init__

    def build_and_remember(memory, *arguments, **more):
        build(memory, *arguments, **more)
        held.append(memory)

    SharedMemory.__init__ = build_and_remember
    try:
        yield
    finally:
        SharedMemory.__init__ = build
    if stuck := [memory for memory in held if not _closed(memory)]:
        gc.collect()  # a quarter of a second
        for memory in stuck:
            _closed(memory)  # or not: a data set of a longer-lived fixture reads it


def _closed(memory) -> bool:
    try:
        memory.cleanup()
    except BufferError:
        return False
    return True
