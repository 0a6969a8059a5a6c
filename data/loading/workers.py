"""The loader's worker processes: how they start, what they ignore, when they end.

Called by data.loading.loader.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

from streaming import StreamingDataLoader


class Loader(StreamingDataLoader):
    """A StreamingDataLoader whose workers import the data set's modules alone."""

    def _get_iterator(self) -> Any:
        with _without_main():
            return super()._get_iterator()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Each worker would import the program that started it, DeepSpeed and all: seconds and memory.

    That the fork server could do it once is what Python promises for "__main__" and 3.11 forgets.
    """
    main: dict[str, Any] = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {key: main.pop(key) for key in ("__file__", "__spec__") if key in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def begin_worker(worker: int) -> None:
    """The loader's `worker_init_fn`: leaves stopping to the rank, and ends with it."""
    _ignore_stop_signals()
    # PyTorch watches the parent, which is the fork server, and that waits for its workers.
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    """A killed rank's workers would stay, with its memory and its job step."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    rank.join()
    os._exit(1)


def _ignore_stop_signals() -> None:
    """Slurm signals every process of a job; whether to stop is for the rank to say."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def start_server() -> Any:
    """The multiprocessing context of the workers; imports what they need once.

    A fork with threads alive (NCCL, tokenizers) can hang: workers come from a clean server. It and
    Python's resource tracker inherit that they ignore signals.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.loading.loader"])
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    _ignore_stop_signals()
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return context
