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
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from cluster.requeue import HOPELESS
from common.durations import as_clock, in_words
from common.files import read_lines
from common.settings import ConfigError, overlay, parse_overrides, read_yaml
from training.checkpoint.contents import MANIFEST, read_contents, wrong_size
from training.checkpoint.run_dir import CheckpointError, step_of, tags_in
from training.guards.run_state import TIME_FORMAT, is_told, read_status

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
    status: dict[str, Any]
    config: dict[str, Any]
    steps: list[dict[str, Any]]  # training records of metrics.jsonl
    validations: list[dict[str, Any]]
    jobs: list[dict[str, Any]]  # START and END of each start, by launch/train.sbatch
    skips: list[dict[str, Any]]
    requeues: list[dict[str, Any]]  # what the job decided at each end
    now: float


def read_run(path: Path) -> Run:
    """Raises StatusError where there is no run."""
    config = path / "config" / "run.json"
    if not any((path / name).exists() for name in ("lock", "jobs.jsonl", "status.json")):
        raise StatusError(f"{path}: nothing was started there yet; a job that waits has no files "
                          "(squeue --me)")
    records, jobs, skips, requeues = (
        read_lines(path / f"{name}.jsonl", skip_damaged=True)
        for name in ("metrics", "jobs", "skips", "requeues"))
    return Run(
        path, read_status(path), json.loads(config.read_text()) if config.is_file() else {},
        [record for record in records if "train/loss" in record],
        [record for record in records if any(key.startswith("validation/") for key in record)],
        jobs, skips, requeues, time.time(),
    )


def own_jobs(run: Run) -> list[dict[str, Any]]:
    """START and END lines without those of jobs that were refused while another one trained."""
    told = datetime.strptime(run.status["time"], TIME_FORMAT).timestamp() \
        if run.status["state"] == "running" else 0.0
    opened = next((entry for entry in reversed(run.jobs)
                   if entry["event"] == "START" and entry["time"] <= told), None)
    if opened is None or any(entry["event"] == "END" and entry["job"] == opened["job"]
                             for entry in run.jobs):
        return run.jobs
    refused = {entry["job"] for entry in run.jobs
               if entry["event"] == "END" and entry["time"] > told and entry["exit"] == 78}
    return [entry for entry in run.jobs if entry["job"] not in refused]


def describe_state(run: Run) -> str:
    """What status.json says, doubted where the launcher or the clock knows better."""
    state = run.status["state"]
    signs = [path.stat().st_mtime for name in ("status.json", "metrics.jsonl", "jobs.jsonl")
             if (path := run.path / name).exists()]
    silent = run.now - max(signs, default=run.now)
    jobs = own_jobs(run)
    last = jobs[-1] if jobs else {}
    later = becomes(run, last) if last.get("event") == "END" else ""
    told = is_told(run.status, jobs)  # by the newest start
    if last.get("event") == "END" and (state == "running" or not told):
        where = ", in preflight" if last.get("stage") == "preflight" else ""
        why = f" ({HOPELESS[last['exit']]})" if last["exit"] in HOPELESS else ""
        return (f"ended with exit {last['exit']}{why} {in_words(run.now - last['time'])} ago{where}"
                f"{later}: see the job's log{' ' + log if (log := last.get('log')) else ''}")
    starting = last.get("event") == "START" and not told
    period = run.config.get("log_every", 1) * mean(run.steps, "time/step_seconds")
    if (starting or state == "running") and silent > max(SILENT_SECONDS, 10 * period):
        return f"running?  NO SIGN FOR {in_words(silent)}: the job may be dead"
    if starting:
        before = "" if state == "unknown" else f", {state} before"
        return f"starting{before}; last sign {in_words(silent)} ago"
    reason = f": {run.status['reason']}" if run.status.get("reason") else ""
    if state == "preempted" and last.get("event") == "END":
        later = later or ", goes on when requeued or submitted again (squeue --me)"
    return f"{state}{reason}{later if state in ('preempted', 'failed') else ''}, " \
           f"last sign {in_words(silent)} ago"


def decided(run: Run, last: dict[str, Any]) -> dict[str, Any]:
    """What the job decided after its last line in jobs.jsonl; empty if it could not."""
    late = bool(run.requeues) and run.requeues[-1]["time"] >= last["time"] - 1
    return run.requeues[-1] if late else {}


def becomes(run: Run, last: dict[str, Any]) -> str:
    """Whether an ended job put itself into the queue, or why it did not."""
    entry = decided(run, last)
    if entry.get("requeue"):
        return QUEUED
    # What is hopeless, done or stopped says so already.
    return f", not requeued: {entry['why']}" if "no checkpoint" in entry.get("why", "") else ""


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
    jobs = own_jobs(run)
    if jobs and jobs[-1]["event"] == "START" and not is_told(run.status, jobs):
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
    jobs = own_jobs(run)
    starts = [entry for entry in jobs if entry["event"] == "START"]
    restarts = sum(not entry["job"].endswith("-0") for entry in starts)
    lines = []
    if starts:
        last, ended = starts[-1], jobs[-1]["event"] == "END"
        lines.append(
            f"job         {last['job']} on {last['nodes']}, {last['ranks']} ranks, "
            f"{'ended' if ended else 'started'} {in_words(run.now - jobs[-1]['time'])} ago")
        nodes = ", ".join(sorted({entry["nodes"] for entry in starts}))
        # A resubmitted job counts its restarts from 0, the ledger does not.
        itself = sum(entry["requeue"] for entry in run.requeues)
        waits = decided(run, jobs[-1]).get("requeue", False)
        lines.append(f"starts      {len(starts)}, on {nodes}; requeued "
                     f"{max(restarts + waits, itself)} times, {itself} of them by the job itself")
    return lines


def describe_last(run: Run) -> str:
    """The newest of: failure, requeue, end of a job, start of a job."""
    events = [(entry["time"], f"{entry['event']} of job {entry['job']}" + (
        f", exit {entry['exit']}" if entry["event"] == "END" else "")) for entry in run.jobs]
    events += [(entry["time"], f"requeued: {entry['state']}, exit {entry['exit']}, newest "
                f"checkpoint at step {entry['step']}") for entry in run.requeues
               if entry["requeue"]]
    for alarm in run.path.glob("failures/*/alarm"):
        words = alarm.read_text(encoding="utf-8").split(" ", 1)[-1]
        events.append((alarm.stat().st_mtime, f"failure: {words} ({alarm.parent})"))
    if not events:
        return "nothing out of the ordinary"
    when, what = max(events)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))}  {what}"


def report(run: Run) -> str:
    lines = [f"{run.path}  {run.config.get('task', '')}".rstrip(),
             f"state       {describe_state(run)}", *describe_steps(run),
             f"checkpoint  {describe_checkpoint(run)}", *describe_jobs(run)]
    if run.skips:
        skip = run.skips[-1]
        lines.append(f"skips       {sum(not entry['applied'] for entry in run.skips)} updates, "
                     f"{len(run.skips)} events; last {skip['kind']} at step {skip['step']}")
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
