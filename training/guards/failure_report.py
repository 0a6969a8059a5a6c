"""One folder that explains why a start of a run failed: RUN/failures/<time of start>/.

    rank00001.json        reason, step, epoch, sample ids, t, shapes, memory, environment
    rank00001.stacks.txt  every thread's stack
    flight_1              its last collectives, where TORCH_FR_BUFFER_SIZE is set: a pickle
    config.json           the resolved configuration
    alarm                 the first rank's words; the watchdogs of the other ranks see it and follow

Made only when something fails. Called by train.py around the run and by training.guards.watchdog.
"""

import contextlib
import faulthandler
import os
import platform
import resource
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from common.errors import ExpectedError
from common.events import append_event
from common.files import write_json
from common.ranks import World, broadcast_object

WAIT_SECONDS = 6.0  # for the other ranks' stacks, before the launcher kills them
# Only these reach the folder: the environment of a job may hold credentials.
ENVIRONMENT = ("CUDA_", "DS_", "GLOO_", "LOCAL_", "MASTER_", "NCCL_", "OMP_", "RANK", "SLURM_",
               "TORCH", "WORLD_SIZE", "TMPDIR", "PYTHON")


class Last(NamedTuple):
    """What this rank was working on; kept by reference, put into words only on failure."""

    step: int
    epoch: int
    batch: Any  # a NamedTuple with `sample_ids` and tensors on the CPU
    t: torch.Tensor | None


class Failure:
    """This rank's part of the failure folder; as a context manager it writes on an exception.

    Args:
        config: the resolved configuration.
    """

    def __init__(
        self, run_dir: Path, config: Mapping[str, Any], world: World,
    ) -> None:
        began = time.strftime("%Y%m%dT%H%M%S") + f"_{os.getpid()}"
        self.folder = run_dir / "failures" / broadcast_object(began, world)
        self.run_dir, self.config, self.world = run_dir, config, world
        self.last: Last | None = None

    @property
    def alarm(self) -> Path:
        return self.folder / "alarm"

    def read_alarm(self) -> tuple[int, str] | None:
        """(exit code, words) of the rank that failed first, if one did."""
        with contextlib.suppress(OSError, ValueError):  # none, or a disk that errs: asked again
            code, words = self.alarm.read_text(encoding="utf-8").split(" ", 1)
            return int(code), words
        return None

    def write(self, reason: str, code: int, phase: str = "") -> None:
        """Everything this rank knows, from any thread; touches no device."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{self.world.rank:05d}"
        with open(self.folder / f"{name}.stacks.txt", "w", encoding="utf-8") as file:
            if sys.exc_info()[0]:
                traceback.print_exc(file=file)
                file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        write_json(self.folder / f"{name}.json", {
            "reason": reason, "phase": phase, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(), "pid": os.getpid(), "rank": self.world.rank,
            "last": describe_last(self.last), "memory": describe_memory(),
            "python": platform.python_version(), "arguments": sys.argv,
            "environment": {key: value for key, value in sorted(os.environ.items())
                            if key.startswith(ENVIRONMENT)},
        })
        with contextlib.suppress(FileExistsError), open(self.alarm, "x", encoding="utf-8") as file:
            file.write(f"{code} rank {self.world.rank} on {socket.gethostname()}: {reason}")
            file.flush()
            write_json(self.folder / "config.json", self.config)
            append_event(self.run_dir, "alarm", exit=code, rank=self.world.rank,
                         words=f"rank {self.world.rank} on {socket.gethostname()}: {reason}",
                         folder=self.folder)
        if os.environ.get("TORCH_FR_BUFFER_SIZE") and dist.is_initialized():
            (self.folder / f"flight_{self.world.rank}").write_bytes(flight_record())

    def wait_for_others(self) -> None:
        """Until every rank has written, or for a bounded time."""
        until = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            if len(list(self.folder.glob("rank*.json"))) >= self.world.world_size:
                return
            time.sleep(0.1)

    def __enter__(self) -> "Failure":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, (ExpectedError, KeyboardInterrupt)):
            return
        self.write(f"{type(error).__name__}: {error}", code=1)
        hint = ""
        if is_out_of_memory(error):
            hint = ("out of memory: lower train_micro_batch_size_per_gpu, set recompute=full or "
                    "take a higher ZeRO stage; ")
        error.add_note(  # printed after the traceback: the last line of the log
            f"error: rank {self.world.rank}: {hint}stacks, last batch, memory and configuration "
            f"are in {self.folder}"
        )
        self.wait_for_others()


def flight_record() -> bytes:
    """This rank's last collectives and where the code called them, pickled by torch itself.

    Torch would write them when a collective times out, long after the watchdog's budgets.
    """
    torch_own: Any = torch._C._distributed_c10d
    nccl = dist.get_backend() == "nccl"
    return torch_own._dump_nccl_trace() if nccl else torch_own._dump_fr_trace()


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "out of memory" in text or "can't allocate memory" in text
    )


def describe_last(last: Last | None) -> dict[str, Any] | None:
    """Step, sample ids, t and shapes of the batch in hand, as JSON."""
    if last is None:
        return None
    return {
        "step": last.step, "epoch": last.epoch, "sample_ids": list(last.batch.sample_ids),
        "t": None if last.t is None else last.t.tolist(),
        "shapes": {name: list(value.shape) for name, value in last.batch._asdict().items()
                   if isinstance(value, torch.Tensor)},
    }


def describe_memory() -> dict[str, Any]:
    """Bytes on the host and on the device, from counters that need no device."""
    found: dict[str, Any] = {
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    }
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()[:3]
        found["host"] = dict(line.split(":", 1) for line in lines)
    if torch.cuda.is_initialized():
        stats = torch.cuda.memory_stats()
        found["device"] = {key: stats[key] for key in stats if key.endswith("bytes.all.peak")
                           or key.endswith("bytes.all.current")}
    return found
