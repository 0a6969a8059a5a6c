"""From what a set's files are called to a manifest's records: streams, cut, sha256, in parallel.

An importer lists candidates (a record without facts, `path` on this machine); `complete_all` looks
into every file and pins its cut; `write_manifest` writes what is left and a ledger of the rest, in
the line format of a prepared folder's rejects.jsonl.
"""

import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from tqdm import tqdm

from common.files import file_sha256, read_lines, write_lines
from data.clips.decode import CutSpec, choose_t0
from data.clips.pictures import display_size
from data.clips.probe import Probe, open_media, probe
from data.manifest.read import check_text
from data.reasons import Rejected, reject
from data.schema import DataError

Record = dict[str, Any]
MEDIA = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".flv")
ROUNDING = 0.002  # seconds; containers round time stamps to 1 ms


class Listing(NamedTuple):
    """What an importer found: candidates to look into, and ledger lines of what is none."""

    records: list[Record]
    rejects: list[Record]


@dataclass(frozen=True)
class CutRule:
    """Where a cut is taken. `marks`: the window with the most of them, seeded ties."""

    frames: int
    fps: float
    place: str = "centre"  # or "marks"
    seed: int = 0

    @property
    def spec(self) -> CutSpec:
        return CutSpec(frames=self.frames, fps=self.fps)


def complete_all(records: list[Record], rule: CutRule, workers: int) -> Listing:
    """Facts, cut and sha256 of every candidate, in their order; unreadable ones are rejected."""
    done = Listing([], [])
    job = partial(complete, rule=rule)
    for record in tqdm(spread(job, records, workers), total=len(records), unit="clip"):
        (done.rejects if "reason" in record else done.records).append(record)
    return done


def spread(job: partial, items: Iterable, workers: int) -> Iterator:
    """`job` of every item, in order, in `workers` processes (in this one if there is one).

    DataError if a process dies, which a codec can bring about.
    """
    if workers <= 1:
        yield from map(job, items)
        return
    # Not forked from here: codecs and torch hold threads that a fork would cut in half. A server
    # imports all there is once and forks the workers before any of it has run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", job.func.__module__])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from pool.map(job, items, chunksize=4)
        except BrokenProcessPool as error:
            raise DataError(
                f"workers={workers}: one of them died (out of memory, or a codec crashed); "
                f"use --workers 1 to see at which file"
            ) from error


def complete(record: Record, rule: CutRule) -> Record:
    """One candidate -> its record, or its ledger line where there is no picture.

    What is too short for a cut stays without t0: decoding it gives the reason.
    """
    path = Path(record["path"])
    try:
        check_text(record)  # a file name may be no text at all
        found = probe(path, need_sound=False)  # silent clips may be wanted; others judge that
        record = record | _stream_facts(path, found) | {"sha256": _sha256(path)}
    except Rejected as rejected:
        return reject(record, rejected.reason, rejected.detail)
    except ValueError as error:
        return reject(record, "invalid_record", str(error))
    try:
        record["t0"] = _place(record, found, rule)
        record["t1"] = record["t0"] + rule.spec.duration
    except Rejected as rejected:
        assert rejected.reason == "too_short", rejected
    if "marks" in record and "t0" in record:  # ground truth of the cut, on its own clock
        inside = [m for m in record["marks"] if record["t0"] <= m[0] < record["t1"]]
        record["marks"] = [[round(m[0] - record["t0"], 6), *m[1:]] for m in inside]
    return record


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise Rejected("undecodable", f"cannot be read: {error.strerror}") from error


def _place(record: Record, found: Probe, rule: CutRule) -> float:
    """t0 of the cut: the list's own, the densest window, or the centre. Rejected("too_short")."""
    times = [mark[0] for mark in record.get("marks", ()) if found.start <= mark[0] <= found.end]
    if rule.place == "marks" and times:
        draw = random.Random(f"{rule.seed}/{record['id']}")
        return choose_t0(found, rule.spec, densest_window(times, found, rule, draw))
    return choose_t0(found, rule.spec, record.get("t0"))


def densest_window(times: list[float], found: Probe, rule: CutRule, draw: random.Random) -> float:
    """Start, on a picture, of a window with the most marks; `draw` decides between equals.

    The marks lie in its middle as far as the take allows, so that none sits on the edge.
    """
    marks, length = np.sort(np.array(times)), rule.spec.duration
    starts = found.times[found.times <= found.end - length + ROUNDING]
    if not len(starts):
        return found.start
    first, end = np.searchsorted(marks, starts), np.searchsorted(marks, starts + length)
    best = np.flatnonzero(end - first == (end - first).max())
    low, high = draw.choice(sorted({(int(first[k]), int(end[k])) for k in best}))
    same = starts[[k for k in best if (first[k], end[k]) == (low, high)]]  # with these marks
    middle = (marks[low] + marks[high - 1] - length) / 2 if high > low else same[0]
    return float(same[np.abs(same - middle).argmin()])


def _stream_facts(path: Path, found: Probe) -> Record:
    """What the streams are, from packets and the first picture; sizes and fps as shown."""
    with open_media(path) as container:
        video = container.streams[found.video_index]
        try:
            picture = next(container.decode(video))
        except (av.FFmpegError, StopIteration) as error:
            raise Rejected("undecodable", f"no picture decodes: {error}") from error
        sound = None if found.audio_index is None else container.streams[found.audio_index]
        height, width = display_size(picture, found.pixel_aspect)
        steps = np.diff(found.times)
        return {
            "width": width,
            "height": height,
            "rotation": round(picture.rotation),
            "fps": round(found.fps, 4),
            "vfr": bool(len(steps) and np.ptp(steps) > 2 * ROUNDING),
            "frames": len(found.times),
            "seconds": round(found.duration, 4),
            "audio_rate": sound.sample_rate if sound else None,
            "channels": sound.channels if sound else None,
        }


def ledger_path(manifest: Path) -> Path:
    """x.jsonl -> x.rejects.jsonl: what is in no manifest, and why."""
    return manifest.with_name(f"{manifest.stem}.rejects.jsonl")


def read_ledger(manifest: Path) -> list[Record]:
    """The lines of the ledger next to a manifest; none where no importer wrote one."""
    path = ledger_path(manifest)
    if not path.is_file():
        return []
    try:
        lines = read_lines(path, whole=True)
        for number, line in enumerate(lines, start=1):
            if not isinstance(line.get("reason"), str):
                raise ValueError(f"line {number} has no 'reason'")
        return lines
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); import the set again or delete it") from error


def write_manifest(out: Path, records: list[Record], rejects: list[Record]) -> None:
    """Both files; paths become relative to `out`. DataError if nothing is left or an id repeats."""
    paths: dict[str, str] = {}
    for record in records:
        if (first := paths.get(record["id"])) is not None:
            raise DataError(f"id={record['id']!r}: both {first} and {record['path']} have it, and "
                            "captions and splits go by id; rename one")
        paths[record["id"]] = record["path"]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_lines(ledger_path(out), rejects)
        base = out.parent.resolve()
        if records:
            write_lines(out, [r | {"path": _relative(r["path"], base)} for r in records])
    except OSError as error:
        raise DataError(f"out={out}: cannot be written ({error}); give another --out") from error
    if not records:
        raise DataError(f"out={out}: not one clip is left; see {ledger_path(out)}")


def _relative(path: str, base: Path) -> str:
    folder = Path(path).parent.resolve()  # not the file: it may be a link to a blob without a name
    return Path(os.path.relpath(folder / Path(path).name, base)).as_posix()


def find_media(folder: Path) -> list[Path]:
    """Every media file below, sorted; hidden ones are a downloader's or an archiver's."""
    if not folder.is_dir():
        raise DataError(f"root={folder}: no such folder; give the one that holds the clips")
    paths = (Path(at) / name for at, _, names in os.walk(folder, followlinks=True)
             for name in names)
    return sorted(p for p in paths if p.suffix.lower() in MEDIA and not p.name.startswith("."))
