"""`--status`: how far all workers are, summed from the files they leave behind; starts nothing."""

import collections
import json
import time
from pathlib import Path

from common.durations import in_words
from data.prepare.job import Job, partial_folder
from data.prepare.merge import tally
from data.schema import METADATA_FILE, load_metadata

STALE_SECONDS = 60.0  # without a report a worker is not counted as running


def status(job: Job | None, out: Path) -> str:
    """One line per worker that has work left, and the sum of all in the last line."""
    if (out / METADATA_FILE).is_file():
        metadata = load_metadata(out)
        return f"{out}: complete; {tally(metadata.counts)}; rejected: {tally(metadata.rejected)}"
    if job is None:
        return f"{out}: nothing yet; no {partial_folder(out)}"
    lines, rate, running = [], 0.0, 0
    for path in sorted((job.folder / "workers").glob("[0-9]*.json")):
        worker = json.loads(path.read_text(encoding="utf-8"))
        silent = time.time() - worker["time"]
        own_rate = worker["clips"] / max(worker["time"] - worker["began"], 1e-3)
        if not worker["left"]:
            continue
        state = f"{own_rate:.2f} clip/s, ETA {in_words(worker['left'] / max(own_rate, 1e-9))}"
        if silent > STALE_SECONDS:
            state = f"no sign for {in_words(silent)}; if it does not run, start it again"
        else:
            rate, running = rate + own_rate, running + 1
        lines.append(
            f"worker {path.stem.replace('-', ' ')} on {worker['host']}: {worker['clips']} clips, "
            f"{worker['left']} left, {state}"
        )
    samples, rejected = 0, collections.Counter(fault.reason for fault in job.faults)
    for path in (job.folder / "receipts").glob("*.json"):
        receipt = json.loads(path.read_text(encoding="utf-8"))
        samples += len(receipt["samples"])
        rejected.update(reject["reason"] for reject in receipt["rejects"])
    missing = job.missing()
    clips = sum(len(group.items) for group in missing)
    eta = in_words(clips / rate) if rate else "unknown"
    lines.append(
        f"{out}: {len(job.groups) - len(missing)} of {len(job.groups)} shards, {samples} samples, "
        f"{clips} of {job.num_items} clips left; {rate:.2f} clip/s by {running} running workers, "
        f"ETA {eta}; rejected: {tally(rejected)}"
    )
    return "\n".join(lines)
