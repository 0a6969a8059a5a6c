"""How a run stands: a fold over RUN/events.jsonl. Imports nothing heavy.

Read by cluster.requeue, tools.status and tools.report.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common.events import Event, read_events

CANNOT_RUN = 78  # the exit code of what was refused before it trained


@dataclass
class Start:
    """One start of a run: what the batch script and train.py have told of it."""

    job: str | None  # "JOB-RESTARTS"; None outside Slurm
    began: Event
    beside: bool = False  # whether another job trained the run at that time
    told: Event | None = None  # the newest "state"
    ended: Event | None = None  # "job_end"
    decided: Event | None = None  # "requeue"

    @property
    def state(self) -> str:
        """What train.py said last; "unknown" if it did not get so far."""
        return str(self.told["state"]) if self.told else "unknown"

    @property
    def trains(self) -> bool:
        return self.state == "running" and self.ended is None

    @property
    def refused(self) -> bool:
        """Whether the run directory was another job's: it says nothing of the run."""
        exit_code = self.ended["exit"] if self.ended else None
        return self.beside and self.told is None and exit_code == CANNOT_RUN


@dataclass
class RunState:
    """What has happened to a run, in order."""

    starts: list[Start] = field(default_factory=list)
    cards: list[Event] = field(default_factory=list)  # "start": of starts that trained
    skips: list[Event] = field(default_factory=list)  # of steps that no later start does again
    substitutions: list[Event] = field(default_factory=list)  # likewise
    requeues: list[Event] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def current(self) -> Start | None:
        """The newest start that was not refused."""
        return next((start for start in reversed(self.starts) if not start.refused), None)

    def start_of(self, job: str | None) -> Start | None:
        """The newest start of a job."""
        return next((start for start in reversed(self.starts) if start.job == job), None)


def read_state(run_dir: Path) -> RunState:
    """Never fails: what cannot be read is left out, with a warning."""
    return fold(read_events(run_dir))


def fold(events: list[Event]) -> RunState:
    """How a run stands after these events."""
    run = RunState(events=events)
    for event in events:
        match event["event"]:
            case "job_start":
                beside = any(start.trains and job_number(start) != job_number(event)
                             for start in run.starts)
                run.starts.append(Start(event["job"], event, beside))
            case "state":
                _start_that_tells(run, event).told = event
            case "job_end":
                _start_of(run, event).ended = event
            case "requeue":
                run.requeues.append(event)
                _start_of(run, event).decided = event
            case "start":
                run.cards.append(event)
                _forget_steps_after(run, event["first_step"])
            case "skip":
                run.skips.append(event)
            case "substitution":
                run.substitutions.append(event)
    return run


def job_number(of: Start | Event) -> str | None:
    """The job's number, the same for all its restarts."""
    job = of.job if isinstance(of, Start) else of.get("job")
    return job.split("-")[0] if isinstance(job, str) else None


def _start_that_tells(run: RunState, event: Event) -> Start:
    """The start that a "state" is of; the first word of one without a batch script begins it."""
    # Before events.jsonl a state did not name its job: it is the newest start's.
    job = event.get("job", run.starts[-1].job if run.starts else None)
    start = run.start_of(job)
    again = start is not None and start.told is not None and event["state"] == "running"
    if start is None or again:
        start = Start(job, event)
        run.starts.append(start)
    return start


def _start_of(run: RunState, event: Event) -> Start:
    """The start that a job's event is of, also where its beginning was not written down."""
    job = event.get("job")
    start = run.start_of(job)
    if start is None and event["event"] == "requeue" and run.starts:
        start = run.starts[-1]  # before events.jsonl it named the job without its restarts
    if start is None:
        start = Start(job, event)
        run.starts.append(start)
    return start


def _forget_steps_after(run: RunState, first_step: int) -> None:
    """A start does the updates after its checkpoint again."""
    run.skips = [event for event in run.skips if event["step"] <= first_step]
    run.substitutions = [event for event in run.substitutions if event["step"] <= first_step]
