"""Where a run directory keeps its checkpoints. Imports nothing heavy: for tools.status, too.

    RUN/config/*.json  RUN/metrics.jsonl  RUN/tb/  RUN/checkpoints/  RUN/samples/  RUN/lock
"""

from pathlib import Path

from common.errors import ExpectedError


class CheckpointError(ExpectedError, RuntimeError):
    """A checkpoint that could not be written, found or trusted."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written: the disk's fault, which may pass."""

    exit_code = 1  # worth another start


def tags_in(run_dir: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, oldest first; a copy (step00000500.bak) is none."""
    folders = [path for path in (run_dir / "checkpoints").glob("step*")
               if path.name[4:].isascii() and path.name[4:].isdigit()]
    return sorted(folders, key=step_of)


def step_of(tag: Path) -> int:
    return int(tag.name[4:])
