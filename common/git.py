"""This checkout's commit and what differs from it; empty answers where there is no git."""

import functools
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def run_git(*arguments: str) -> bytes:
    """What git prints; b"" where it fails, is missing, or the folder is not a checkout."""
    try:
        return subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True,
                              check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, no commit, ...
        return b""


@functools.cache  # of what runs, also when the checkout moves on meanwhile
def short_commit() -> str:
    """For information; "" where there is none."""
    return run_git("rev-parse", "--short", "HEAD").decode().strip()
