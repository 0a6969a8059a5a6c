"""How a run stands, in RUN/status.json; imports nothing heavy.

Written by the guards, read by cluster.requeue and tools.status.
"""

import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from common.files import write_json

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


def write_status(run_dir: Path, state: str, **values: Any) -> None:
    """state: running, done, preempted (to be requeued), stopped (by hand), or failed."""
    record = {"state": state, "time": time.strftime(TIME_FORMAT), "pid": os.getpid()}
    write_json(run_dir / "status.json", record | values)


def read_status(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"state": "unknown"}


def is_told(status: dict[str, Any], jobs: list[dict[str, Any]]) -> bool:
    """Whether the newest start that train.sbatch wrote down got as far as telling a state."""
    starts = [job["time"] for job in jobs if job["event"] == "START"]
    if "time" not in status:
        return False
    told = datetime.strptime(status["time"], TIME_FORMAT).timestamp()
    return not starts or told >= starts[-1]
