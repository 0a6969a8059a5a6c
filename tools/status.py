"""How a run stands, from the files in its directory: on any machine that sees them, also mid-run.

    python -m tools.status runs/alt_merge_t2av [--watch]
    python -m tools.status configs/alt_merge_t2av.yaml [key=value ...]    # the run of that config

State, step, speed and time left, losses, the newest checkpoint and whether it is whole, starts and
jobs, skipped updates, and what happened last. Writes nothing. Exit status 1 where no run is.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from cluster.requeue import HOPELESS
from common.durations import as_clock, in_words
from common.events import timestamp
from common.files import read_lines
from common.settings import ConfigError, overlay, parse_overrides, read_yaml
from training.checkpoint.contents import MANIFEST, read_contents, wrong_size
from training.checkpoint.run_dir import CheckpointError, step_of, tags_in
from training.guards.run_state import RunState, Start, read_state

RECENT = 20  # training records that speed and mean loss are taken from
SILENT_SECONDS = 600.0  # beyond this and ten log periods, "running" is doubted
WATCH_SECONDS = 5.0
QUEUED = ", in the queue again unless cancelled (squeue --me)"  # which these files cannot know


class StatusError(ValueError):
    """Nothing to report; the message says why and what to do."""


def find_run(target: str, overrides: list[str]) -> Path:
    """A run directory as it is, or the one that a config names."""
    if not target.endswith((".yaml", ".yml")):
        if overrides:
            raise StatusError(f"{overrides[0]}: only a config takes key=value; {target} is a run")
        return Path(target)
    values = overlay(read_yaml(target), parse_overrides(overrides))
    if not isinstance(values.get("run_dir"), str):
        raise StatusError(f"{target}: key 'run_dir' is missing; add it")
    return Path(values["run_dir"])


class Run(NamedTuple):
    """What the files say."""

    path: Path
    state: RunState
    config: dict[str, Any]
    steps: list[dict[str, Any]]  # training records of metrics.jsonl
    validations: list[dict[str, Any]]
    now: float


def read_run(path: Path) -> Run:
    """Raises StatusError where there is no run."""
    state = read_state(path)
    if not state.events and not (path / "lock").exists():
        raise StatusError(f"{path}: nothing was started there yet; a job that waits has no files "
                          "(squeue --me)")
    config = path / "config" / "run.json"
    records = read_lines(path / "metrics.jsonl", skip_damaged=True)
    return Run(
        path, state, json.loads(config.read_text()) if config.is_file() else {},
        [record for record in records if "train/loss" in record],
        [record for record in records if any(key.startswith("validation/") for key in record)],
        time.time(),
    )


def describe_state(run: Run) -> str:
    """What the newest start told, doubted where the batch script or the clock knows better."""
    start = run.state.current
    if start is None:
        return "starting"
    silent = run.now - max(start_signs(run), default=run.now)
    later = becomes(start)
    ended = start.ended
    if ended and start.state in ("running", "unknown"):
        where = ", in preflight" if ended.get("stage") == "preflight" else ""
        why = f" ({HOPELESS[ended['exit']]})" if ended["exit"] in HOPELESS else ""
        log = start.began.get("log")
        return (f"ended with exit {ended['exit']}{why} {in_words(run.now - timestamp(ended))} ago"
                f"{where}{later}: see the job's log{f' {log}' if log else ''}")
    starting = start.told is None
    period = run.config.get("log_every", 1) * mean(run.steps, "time/step_seconds")
    if (starting or start.trains) and silent > max(SILENT_SECONDS, 10 * period):
        return f"running?  NO SIGN FOR {in_words(silent)}: the job may be dead"
    if starting:
        before = [one.state for one in run.state.starts if one.told]
        return (f"starting{f', {before[-1]} before' if before else ''}; "
                f"last sign {in_words(silent)} ago")
    reason = f": {start.told['reason']}" if start.told and start.told.get("reason") else ""
    if start.state == "preempted" and ended:
        later = later or ", goes on when requeued or submitted again (squeue --me)"
    return (f"{start.state}{reason}{later if start.state in ('preempted', 'failed') else ''}, "
            f"last sign {in_words(silent)} ago")


def start_signs(run: Run) -> list[float]:
    """When the run was last heard of: its events, its metrics."""
    metrics = run.path / "metrics.jsonl"
    times = [timestamp(event) for event in run.state.events[-1:]]
    return times + ([metrics.stat().st_mtime] if metrics.exists() else [])


def becomes(start: Start) -> str:
    """Whether an ended job put itself into the queue, or why it did not."""
    if start.decided is None or start.ended is None:
        return ""
    if start.decided["requeue"]:
        return QUEUED
    # What is hopeless, done or stopped says so already.
    why = start.decided["why"]
    return f", not requeued: {why}" if "no checkpoint" in why else ""


def mean(records: list[dict[str, Any]], tag: str) -> float:
    values = [record[tag] for record in records[-RECENT:] if tag in record]
    return sum(values) / len(values) if values else 0.0


def named(record: dict[str, Any], prefix: str) -> str:
    return "  ".join(f"{tag.removeprefix(prefix)} {value:.4f}" for tag, value in record.items()
                     if tag.startswith(prefix))


def describe_steps(run: Run) -> list[str]:
    if not run.steps:
        return ["step        none yet"]
    last, end = run.steps[-1], run.config.get("max_steps", 0)
    seconds, batch = mean(run.steps, "time/step_seconds"), run.config.get("global_batch_size", 0)
    start = run.state.current
    if start and start.told is None and start.ended is None:
        # It may have been submitted with another max_steps, which is not written down yet.
        return [f"step        {last['step']} before this start"]
    lines = [f"step        {last['step']} of {end}, {100 * last['step'] / max(end, 1):.1f} %, "
             f"time left {as_clock(seconds * (end - last['step']))}"]
    if seconds:
        lines.append(f"speed       {seconds:.3g} s a step, {batch / seconds:.3g} samples/s")
    lines.append(f"loss        {last['train/loss']:.4f}  {named(last, 'train/loss_')}  "
                 f"(mean of the last {len(run.steps[-RECENT:])} records "
                 f"{mean(run.steps, 'train/loss'):.4f})")
    if run.validations:
        held = run.validations[-1]
        lines.append(f"validation  {named(held, 'validation/loss_')}  at step {held['step']}")
    return lines


def describe_checkpoint(run: Run) -> str:
    """The newest one, and whether its manifest and the sizes of its files are right."""
    tags = [tag for tag in tags_in(run.path) if (tag / MANIFEST).is_file()]
    if not tags:
        return "none yet"
    tag = tags[-1]
    try:
        contents = read_contents(tag)
        wrong = wrong_size(tag, contents)
        size = sum(count for count, _ in contents.files.values())
        told = wrong or (f"whole: {len(contents.files)} files, {size / 1e9:.3g} GB, written by "
                         f"{contents.world_size} ranks")
    except (CheckpointError, OSError) as error:
        told = str(error)
    age = in_words(run.now - (tag / MANIFEST).stat().st_mtime)
    return f"step {step_of(tag)}, {age} ago, {told}; {len(tags)} there"


def describe_jobs(run: Run) -> list[str]:
    starts = [start for start in run.state.starts if "nodes" in start.began and not start.refused]
    if not starts:
        return []
    last = starts[-1]
    since = in_words(run.now - timestamp(last.ended or last.began))
    nodes = ", ".join(sorted({start.began["nodes"] for start in starts}))
    # A resubmitted job counts its restarts from 0, the decisions of all jobs are kept.
    itself = sum(event["requeue"] for event in run.state.requeues)
    restarts = sum(not str(start.job).endswith("-0") for start in starts)
    waits = last.decided is not None and last.decided["requeue"]
    return [
        f"job         {last.job} on {last.began['nodes']}, {last.began.get('ranks')} ranks, "
        f"{'ended' if last.ended else 'started'} {since} ago",
        f"starts      {len(starts)}, on {nodes}; requeued {max(restarts + waits, itself)} times, "
        f"{itself} of them by the job itself",
    ]


def describe_last(run: Run) -> str:
    """The newest failure, requeue, end or start of a job."""
    for event in reversed(run.state.events):
        said = {
            "job_start": "start of job {job}", "job_end": "end of job {job}, exit {exit}",
            "requeue": "requeued: {state}, exit {exit}, newest checkpoint at step {step}",
            "alarm": "failure: {words} ({folder})",
        }.get(event["event"])
        if said and event.get("requeue", True):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(timestamp(event)))
            return f"{when}  {said.format_map(defaultdict(str, event))}"
    return "nothing out of the ordinary"


def report(run: Run) -> str:
    lines = [f"{run.path}  {run.config.get('task', '')}".rstrip(),
             f"state       {describe_state(run)}", *describe_steps(run),
             f"checkpoint  {describe_checkpoint(run)}", *describe_jobs(run)]
    if skips := run.state.skips:
        lines.append(f"skips       {sum(not skip['applied'] for skip in skips)} updates, "
                     f"{len(skips)} events; last {skips[-1]['kind']} at step {skips[-1]['step']}")
    return "\n".join([*lines, f"last        {describe_last(run)}"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("tools.status", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory, or a config")
    parser.add_argument("overrides", nargs="*", help="key=value, of a config")
    parser.add_argument("--watch", action="store_true", help="again every few seconds")
    parser.add_argument("--where", action="store_true", help="print the run directory only")
    args = parser.parse_args(arguments)
    try:
        path = find_run(args.run, args.overrides)
        if args.where:
            print(path)
            return 0
        print(report(read_run(path)), flush=True)
        while args.watch:
            time.sleep(WATCH_SECONDS)
            print(f"\033[2J\033[H{report(read_run(path))}", flush=True)
    except (StatusError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 78 if args.where else 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
