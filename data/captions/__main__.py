"""Captions for the clips of a manifest; `python -m data.captions --help`.

    python -m data.captions manifest.jsonl --out captions.jsonl \
        --video-model omni-research/Tarsier2-Recap-7b --audio-model Qwen/Qwen2.5-Omni-7B

The video model sees the silent frames of the very cut (t0 to t1, at training's rate and crop), the
audio model sees them too and hears the sound; one model is in memory at a time. A cut without
sound, by data.prepare's defaults, gets the audio caption "" and stays with --keep-silent. Each
appends to its own file (captions.video.jsonl, captions.audio.jsonl), so the same command goes on
where a killed run stopped. At the end both are joined, one line per id, no key for a caption that
failed:

    {"id": "...", "video_caption": "...", "audio_caption": "...", "video_model": "...",
     "video_prompt": "12 digits of the prompt's sha256", "audio_model": ..., "audio_prompt": ...}

Captions from elsewhere need `id`, `video_caption`, `audio_caption` only (JSONL, or CSV with these
columns). A clip that cannot be captioned is in captions.<kind>.rejects.jsonl with its reason; the
next run tries it again. Many GPUs: one process each with --slice 0/8 ... 7/8 and its own --out;
the joined files may simply be concatenated.
"""

import argparse
import collections
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.files import json_line
from data.captions.caption_files import (
    KINDS,
    CaptionJob,
    Record,
    appending,
    join,
    read_part,
)
from data.captions.captioners import (
    Answer,
    AudioCaptioner,
    VideoCaptioner,
    open_audio_model,
    open_video_model,
)
from data.clips.decode import Cut, CutSpec, read_cut
from data.manifest import Fault, read_records
from data.reasons import Rejected, reject
from data.schema import DataError
from model.weights.hub import one_line_errors

PROMPTS = Path(__file__).parent / "prompts"
SOUND: dict[str, Any] = {"sample_rate": 16000, "hop": 160}  # Whisper's features: 10 ms each
SILENT = ("no_audio", "silent", "digital_silence")  # reasons that are known answers, not failures
DECODERS = 2  # threads that decode the next batch while the model writes this one
Captioner = VideoCaptioner | AudioCaptioner


def build_jobs(args: argparse.Namespace) -> list[CaptionJob]:
    """The one or two passes of a run; models, prompts and what is already there are checked."""
    if args.out.suffix != ".jsonl":
        raise DataError(f"out={args.out}: must end in .jsonl; its neighbours are named after it")
    size = {name: getattr(args, name) for name in ("fps", "frames", "height", "width")}
    counts = ("batch", "video_frames", "audio_fps", "max_new_tokens")
    for name, value in (size | {name: getattr(args, name) for name in counts}).items():
        if not value > 0:
            raise DataError(f"{name}={value}: must be above 0")
    spec = CutSpec(**size, **SOUND, min_source_fps=0.0, max_length_mismatch=math.inf)
    # What is too slow or quiet for training is for the filters to say. But a model that is asked
    # for the sound of a silent cut invents one.
    specs = {"video": replace(spec, keep_silent=True), "audio": spec}
    seen = {"video": f"{args.video_frames} frames", "audio": f"{args.audio_fps:g} frames/s"}
    openers = {"video": open_video_model, "audio": open_audio_model}
    jobs = []
    for kind in KINDS:
        source = getattr(args, f"{kind}_model")
        if source is None:
            continue
        with one_line_errors(DataError, f"{kind}_model={source}"):
            openers[kind](source)
        job = CaptionJob(
            kind, args.out.with_suffix(f".{kind}.jsonl"),
            args.out.with_suffix(f".{kind}.rejects.jsonl"), specs[kind],
            source if not Path(source).is_dir() else Path(source).resolve().name,
            read_prompt(getattr(args, f"{kind}_prompt")),
            f"{seen[kind]} of {spec.height}x{spec.width} at {spec.fps:g} fps",
        )
        read_part(job)
        jobs.append(job)
    if not jobs:
        raise DataError("no model: give --video-model, --audio-model or both")
    return jobs


def read_prompt(path: Path) -> str:
    """The instruction in a text file; DataError if there is none."""
    if not path.is_file() or not path.read_text(encoding="utf-8").strip():
        raise DataError(f"prompt={path}: no such file, or empty; write the instruction into it")
    return path.read_text(encoding="utf-8").strip()


def run_job(
    job: CaptionJob, records: list[Record], faults: list[Fault], root: Path,
    load: Callable[[], Captioner], batch: int,
) -> collections.Counter[str]:
    """Caption what `job.part` does not hold yet. Counts: new, kept, truncated, rejects' reasons.

    Batches are fixed slices of the manifest and are written whole, in its order.
    """
    counts: collections.Counter[str] = collections.Counter()
    with appending(job.part) as part, job.rejects.open("w", encoding="utf-8") as rejects:
        done = read_part(job)
        for fault in faults:
            rejects.write(json_line(fault.as_reject()))
            counts[fault.reason] += 1
        counts["kept"] = sum(record["id"] in done for record in records)
        slices = [records[i : i + batch] for i in range(0, len(records), batch)]
        todo = [[r for r in group if r["id"] not in done] for group in slices]
        todo = [group for group in todo if group]
        captioner = load() if todo else None
        with tqdm(total=sum(map(len, todo)), unit="clip", desc=f"{job.kind} captions") as progress:
            for group in decode_ahead(todo, root, job.spec):
                lines, refused = caption_group(job, captioner, group, counts)
                part.write("".join(map(json_line, lines)).encode())
                part.flush()
                os.fsync(part.fileno())
                rejects.write("".join(map(json_line, refused)))
                rejects.flush()
                progress.update(len(group))
    return counts


def caption_group(
    job: CaptionJob, captioner: Any, group: list[tuple[Record, Future[Cut]]],
    counts: collections.Counter[str],
) -> tuple[list[Record], list[Record]]:
    """(captions, rejects) of one batch."""
    usable, lines, refused = [], [], []
    for record, future in group:
        try:
            usable.append((record, future.result()))
        except Rejected as error:
            if job.kind == "audio" and error.reason in SILENT:
                counts[error.reason] += 1
                lines.append(_line(job, record, Answer("", truncated=False)))
            else:
                refused.append(reject(record, error.reason, error.detail))
    try:
        answers = captioner.caption([cut for _, cut in usable]) if usable else []
    except torch.OutOfMemoryError as error:
        raise DataError(f"batch={len(usable)}: does not fit into memory; lower it") from error
    for (record, _), answer in zip(usable, answers, strict=True):
        if not answer.text:
            refused.append(reject(record, "empty_caption", "the model answered with nothing"))
            continue
        counts["new"] += 1
        counts["truncated"] += answer.truncated
        lines.append(_line(job, record, answer))
    counts.update(line["reason"] for line in refused)
    order = [record["id"] for record, _ in group]
    return sorted(lines, key=lambda line: order.index(line["id"])), refused


def decode_ahead(
    groups: list[list[Record]], root: Path, spec: CutSpec
) -> Iterator[list[tuple[Record, Future[Cut]]]]:
    """Each batch with its cuts, the next one being decoded meanwhile."""
    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: list[tuple[Record, Future[Cut]]] = []
        for group in [*groups, []]:
            coming = [(record, pool.submit(read_record, record, root, spec)) for record in group]
            if waiting:
                yield waiting
            waiting = coming


def read_record(record: Record, root: Path, spec: CutSpec) -> Cut:
    """The record's own cut: from t0 to t1, or `spec.frames` from t0, or from the centre."""
    t0, t1 = record.get("t0"), record.get("t1")
    if t0 is not None and t1 is not None:
        spec = replace(spec, frames=max(1, round((t1 - t0) * spec.fps)))
    return read_cut(root / record["path"], spec, t0)


def check_windows(records: list[Record]) -> list[Fault]:
    """Takes the records with an impossible t1 out of the list."""
    faults = []
    for number, record in reversed(list(enumerate(records))):
        t0, t1 = record.get("t0"), record.get("t1")
        fits = isinstance(t1, int | float) and t0 is not None and t0 < t1 < math.inf
        if t1 is not None and not fits:
            detail = f"t0={t0!r}, t1={t1!r}: seconds, t1 after t0, or no t1 at all"
            faults.append(Fault(record["id"], "invalid_record", detail, number + 1))
            del records[number]
    return faults[::-1]


def parse(arguments: list[str]) -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        "data.captions", description=lines[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, whole = parser.add_argument, int
    add("manifest", type=Path)
    add("--out", type=Path, required=True, help="the joined captions, .jsonl")
    add("--video-model", help="folder or hub id: Tarsier2 or any image-text-to-text model")
    add("--audio-model", help="folder or hub id: Qwen2.5-Omni")
    for kind in KINDS:
        add(f"--{kind}-prompt", type=Path, default=PROMPTS / f"{kind}.txt")
    add("--fps", type=float, default=24.0, help="of the cut, as training has it")
    add("--frames", type=whole, default=49, help="of the cut, where the manifest has no t1")
    add("--height", type=whole, default=336, help="of the frames shown; 3:5 as training's crop")
    add("--width", type=whole, default=560)
    add("--video-frames", type=whole, default=16, help="frames of the cut the video model sees")
    add("--audio-fps", type=float, default=2.0, help="frames per second the audio model sees")
    add("--max-new-tokens", type=whole, default=256)
    add("--batch", type=whole, default=8, help="clips at once")
    add("--slice", type=parse_slice, default="0/1", metavar="K/N", help="every N-th clip from K")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def parse_slice(text: str) -> tuple[int, int]:
    first, _, step = text.partition("/")
    if not (first.isdigit() and step.isdigit() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"{text!r}: K/N with K from 0 to N-1")
    return int(first), int(step)


def load_captioner(job: CaptionJob, args: argparse.Namespace) -> Captioner:
    source = getattr(args, f"{job.kind}_model")
    with one_line_errors(DataError, f"{job.kind}_model={source}"):
        if job.kind == "video":
            return VideoCaptioner.from_folder(
                source, job.prompt, args.device, args.video_frames, args.max_new_tokens
            )
        return AudioCaptioner.from_folder(
            source, job.prompt, args.device, args.audio_fps, args.fps, args.max_new_tokens
        )


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    try:
        records, faults = read_records(args.manifest, "train")
        faults += check_windows(records)
        first, step = args.slice
        records = records[first::step]
        for job in build_jobs(args):
            load = functools.partial(load_captioner, job, args)
            counts = run_job(job, records, faults, args.manifest.parent, load, args.batch)
            print(f"{job.part}: {_tally(counts)}")
        both = join(args.out, [args.out.with_suffix(f".{kind}.jsonl") for kind in KINDS])
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {_tally(both)}")
    return 0


def _tally(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "nothing"


def _line(job: CaptionJob, record: Record, answer: Answer) -> Record:
    found = {"caption": answer.text, "truncated": answer.truncated}
    return {"id": record["id"]} | found | job.identity


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
