"""What a batch script does about an exit of train.py: requeue the job, or not.

    python -m cluster.requeue EXIT_CODE CONFIG [key=value ...]    # exit 0: requeue the job

Exit codes of train.py: 0 done or stopped in order, 76 hung, 77 bad numbers, 78 cannot run as it
is configured, 1 a crash. A stop in order exits with 0, because srun kills the peers of a task that
does not; the state in RUN/events.jsonl says whether the job is to go on. Imports nothing heavy.
Called by launch/train.sbatch.
"""

import os
import sys
from pathlib import Path

from common.events import Event, append_event, job_name
from common.settings import ConfigError, overlay, parse_overrides, read_yaml
from training.checkpoint.run_dir import step_of, tags_in
from training.guards.run_state import CANNOT_RUN, job_number, read_state

HOPELESS = {77: "bad numbers", CANNOT_RUN: "a configuration that cannot run"}
UNTOLD = {"running": "ended without a word", "unknown": "ended before it trained"}
FRUITLESS_STARTS = 2  # crashes without a new checkpoint before it is called a crash loop
TERMINATED = 143  # by SIGTERM, which comes from outside: a preemption before train.py could save


def newest_step(run_dir: Path) -> int:
    """Step of the newest finished checkpoint, 0 without one."""
    finished = [tag for tag in tags_in(run_dir) if (tag / "manifest.json").is_file()]
    return step_of(finished[-1]) if finished else 0


def decide(run_dir: Path, code: int) -> tuple[bool, str]:
    """(requeue?, why), which is also written down.

    A crash that brought no new checkpoint may be bad luck, more than FRUITLESS_STARTS in a row are
    a crash loop. A preemption is not a crash, and a newly submitted job starts the count again.
    """
    run, step, job = read_state(run_dir), newest_step(run_dir), job_name(os.environ)
    start = run.start_of(job) if job else run.current
    state = start.state if start else "unknown"
    told = UNTOLD.get(state, state)
    event: Event = {"job": job, "step": step, "exit": code, "state": told}
    past = [one for one in run.requeues if job_number(one) == job_number(event)]
    before = [one["step"] for one in past if not was_preempted(one)][-FRUITLESS_STARTS:]
    requeue, why = False, f"{FRUITLESS_STARTS} requeues brought no checkpoint after step {step}"
    if code in HOPELESS:
        why = HOPELESS[code]
    elif state in ("done", "stopped"):
        why = f"the run is {state}"
    elif was_preempted(event) or before != [step] * FRUITLESS_STARTS:
        requeue, why = True, f"{told}, exit {code}, newest checkpoint at step {step}"
    if run_dir.is_dir():
        append_event(run_dir, "requeue", **event, requeue=requeue, why=why)
    return requeue, why


def was_preempted(event: Event) -> bool:
    """Whether a start ended because Slurm or a person asked it to."""
    return event["state"] == "preempted" or event["exit"] == TERMINATED


def main(arguments: list[str]) -> int:
    """Exit status 0: requeue; 1: do not; 78: the configuration cannot be read."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        code, path, *overrides = arguments
        values = overlay(read_yaml(path), parse_overrides(overrides))
        requeue, why = decide(Path(values["run_dir"]), int(code))
    except (ConfigError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    print(f"{'requeue' if requeue else 'no requeue'}: {why}", flush=True)
    return 0 if requeue else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
