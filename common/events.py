"""RUN/events.jsonl: what happened to a run, one JSON object per line, only ever appended.

    {"event": "skip", "time": "2026-01-31T12:00:00.000+00:00", ...}

Written by train.py, by the batch script around it, and by whichever rank fails first; how a run
stands is a fold over it (training.guards.run_state). Imports nothing heavy.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from common.files import append_lines, read_lines

Event = dict[str, Any]


class Kind(NamedTuple):
    """A kind of event: what it says, and the keys without which it says nothing."""

    sentence: str
    keys: dict[str, type]


KINDS = {
    "job_start": Kind(
        "A Slurm job has begun: its nodes, ranks and log.", {"job": str, "nodes": str}),
    "state": Kind(
        "What train.py says of itself: running, done, preempted (to be requeued), stopped (by "
        "hand) or failed, and why.", {"state": str}),
    "start": Kind(
        "What this start is made of: code, packages, hardware, seed, data, weights, the "
        "checkpoint that it goes on from.", {"first_step": int}),
    "skip": Kind(
        "A skipped update or a spike: its samples, their t and losses.",
        {"step": int, "kind": str, "applied": bool}),
    "substitution": Kind(
        "A sample of a bad shard: the shard, the reason, the sample in its place.",
        {"step": int, "shard": str}),
    "alarm": Kind("The first rank to fail: its words, and the folder of the failure.",
                  {"words": str}),
    "job_end": Kind("A Slurm job has ended, in which stage and with which exit code.",
                    {"job": str, "exit": int}),
    "requeue": Kind(
        "Whether the job went back into the queue, and why.",
        {"requeue": bool, "why": str, "step": int, "exit": int, "state": str}),
}


def events_path(run_dir: Path) -> Path:
    return run_dir / "events.jsonl"


def job_name(environ: Mapping[str, str]) -> str | None:
    """One start of one Slurm job, as "JOB-RESTARTS"; None outside Slurm."""
    job = environ.get("SLURM_JOB_ID")
    return f"{job}-{environ.get('SLURM_RESTART_COUNT') or 0}" if job else None


def append_event(run_dir: Path, event: str, **values: Any) -> Event:
    """Append one line, and return it. Where it cannot be written there is a warning, no error."""
    line = {"event": event, "time": _date(datetime.now()), **values}
    try:
        append_lines(events_path(run_dir), [line])
    except OSError as error:  # a full disk must not end a run
        print(f"warning: {events_path(run_dir)} cannot be written ({error}): "
              f"{str(line):.500}", file=sys.stderr, flush=True)
    return line


def read_events(run_dir: Path) -> list[Event]:
    """Events in the order of their lines, those of older versions' files before them.

    What is no event of a known kind is left out, and so is a file that cannot be read, each with a
    warning: a damaged history decides nothing.
    """
    lines = _read(events_path(run_dir))
    return _older_events(run_dir) + [line for line in lines if _is_event(line)]


def _date(when: datetime) -> str:
    return when.astimezone().isoformat(timespec="milliseconds")


def timestamp(event: Event) -> float:
    """Seconds since 1970."""
    return datetime.fromisoformat(event["time"]).timestamp()


def _read(path: Path) -> list[Event]:
    try:
        return read_lines(path, skip_damaged=True)
    except OSError as error:
        print(f"warning: {path} cannot be read ({error}); it is left out", file=sys.stderr,
              flush=True)
        return []


def _is_event(line: Event) -> bool:
    """Whether it is of a known kind and has its keys; warns if not."""
    try:
        timestamp(line)
        kind = KINDS[line["event"]]
        told = all(isinstance(line[key], type_) for key, type_ in kind.keys.items())
    except (KeyError, TypeError, ValueError, OverflowError):
        told = False
    if not told:
        print(f"warning: not an event, left out: {ascii(line):.80}", file=sys.stderr, flush=True)
    return told


# Until events.jsonl, each kind had a file of its own.
_OLDER_FILES = {"jobs.jsonl": "", "requeues.jsonl": "requeue", "skips.jsonl": "skip",
                "substitutions.jsonl": "substitution", "config/starts.jsonl": "start"}


def _older_events(run_dir: Path) -> list[Event]:
    """The events of a run directory of those days, by time."""
    found = []
    for name, event in _OLDER_FILES.items():
        for line in _read(run_dir / name):
            # Skips and substitutions had no time: the last of them is as old as its file.
            line.setdefault("time", (run_dir / name).stat().st_mtime)
            line["event"] = event or ("job_start" if line.get("event") == "START" else "job_end")
            found.append(line)
    status = run_dir / "status.json"
    if status.is_file():
        found.append({**_read_object(status), "event": "state"})
    for line in found:
        if isinstance(line.get("time"), int | float):
            with contextlib.suppress(ValueError, OverflowError, OSError):  # no date
                line["time"] = _date(datetime.fromtimestamp(line["time"]))
    return sorted(filter(_is_event, found), key=timestamp)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
