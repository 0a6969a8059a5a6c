"""The lock of an extension's build, when its builder is dead.

torch compiles DeepSpeed's extensions at first use, under a file named `lock`. A start that is
killed meanwhile leaves it, and every later one waits for it without end or message. The builder
keeps the file open, which shows on this machine whether it lives. Called by
training.distributed before anything is built.
"""

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

SETTLE_SECONDS = 1.0  # a builder closes the file a moment before it removes it
SHARED_AGE_SECONDS = 900.0  # on several nodes: no build takes so long


def remove_dead_locks(environ: Mapping[str, str], several_nodes: bool) -> list[Path]:
    """Delete locks that nobody holds and say so; name those that may be another node's.

    Returns: what was deleted. A folder named after this node, as launch/train.sbatch has it, holds
    no other node's.
    """
    from torch.utils.cpp_extension import get_default_build_root  # looks for compilers

    root = Path(environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    several_nodes &= environ.get("SLURMD_NODENAME", "") not in root.parts
    suspects = [lock for lock in root.glob("**/lock") if holder(lock) is None]
    if suspects:
        time.sleep(SETTLE_SECONDS)
    removed = []
    for lock in suspects:
        with contextlib.suppress(FileNotFoundError):
            age = time.time() - lock.stat().st_mtime
            if holder(lock) is not None:
                continue
            if several_nodes and age < SHARED_AGE_SECONDS:
                _say(f"{lock} is {age:.0f} s old and held by no process of this node: if no other "
                     "node builds there now, delete it, or this start will wait for it")
                continue
            lock.unlink()
            removed.append(lock)
            _say(f"removed {lock}, which a killed build had left")
    return removed


def holder(lock: Path) -> int | None:
    """The process of this machine that has the file open; only this user's can be seen."""
    target = str(lock.resolve())
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(opened) == target:
                return int(opened.parts[2])
    return None


def _say(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
