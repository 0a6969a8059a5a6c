"""Clips -> encoded shards: probe, cut, encode, write MDS.

    python -m data.prepare manifest.jsonl out/ --wan W --tangoflux T --frames 49 --fps 24

makes out/{train,validation}/ (MDS, zstd, hashes), dataset.json, text.safetensors (the encoded ""
and negative prompts), samples.jsonl, rejects.jsonl and the data card. A clip that cannot be used
is named in rejects.jsonl with its reason; nothing aborts the run and nothing disappears. The
folder appears when it is complete.

Many workers: start the same command in a Slurm array, under torchrun, or with --worker K
--workers N, on any machines that share the folder; who finishes last merges. Killed, at any time:
the same command again goes on, and redoes one shard per worker at most. The same command with
--status shows how far all workers are.

A manifest line: {"id", "path" (relative to the manifest), "video_caption", "audio_caption" ("" for
a clip that stays without sound)} and, if wanted, "split" ("train"), "t0" (seconds; the centre
window), "t1" (which must agree with --frames and --fps), and any key of your own.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from data.arguments import add_cut_flags, non_negative, positive
from data.clips.cut import CutSpec
from data.manifest import check_lengths, read_captions, read_manifest
from data.manifest.records import read_ledger
from data.prepare.encoding import Encoders
from data.prepare.job import Job, begun, clip_settings, partial_folder, refuse_change
from data.prepare.merge import merge, tally
from data.prepare.progress import status
from data.prepare.work import prepare
from data.schema import METADATA_FILE, DataError
from model.encoders import VIDEO_TEXT_LENGTH

SPEC_FLAGS = (
    "fps", "frames", "height", "width", "min_source_fps", "silence_dbfs", "audio_pad_seconds",
    "max_length_mismatch", "max_digital_silence", "offsets", "crops",
)


def place(
    environment: Mapping[str, str], worker: int | None, workers: int | None
) -> tuple[int, int]:
    """(this worker, number of workers): given, or from a Slurm array and torchrun, also both.

    DataError if they contradict each other.
    """
    if (worker is None) != (workers is None):
        raise DataError(f"worker={worker}, workers={workers}: give both or none")
    if worker is not None and workers is not None:
        index, count = worker, workers
    else:
        index, count = 0, 1
        if "SLURM_ARRAY_TASK_ID" in environment:
            first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{n}", d)) for n, d in
                           (("MIN", 0), ("STEP", 1)))
            index = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
            count = int(environment["SLURM_ARRAY_TASK_COUNT"])
        if "RANK" in environment and "WORLD_SIZE" in environment:
            world = int(environment["WORLD_SIZE"])
            index, count = index * world + int(environment["RANK"]), count * world
    if not 0 <= index < count:
        raise DataError(
            f"worker={index} of workers={count}: must be 0 to workers - 1; a part of an array "
            f"needs --worker and --workers"
        )
    return index, count


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wan", help="Wan2.2 diffusers folder or hub id")
    parser.add_argument("--tangoflux", help="TangoFlux folder or hub id")
    add_cut_flags(parser, SPEC_FLAGS)
    parser.add_argument("--keep-silent", action="store_true",
                        help="keep clips without sound, marked; the loss hears nothing of them")
    parser.add_argument("--captions", type=Path, help="JSONL or CSV, joined by id")
    parser.add_argument("--video-text-length", type=positive, default=VIDEO_TEXT_LENGTH)
    parser.add_argument("--split", default="train", help="of records that name none")
    parser.add_argument("--device", default=_device())
    parser.add_argument("--worker", type=non_negative, help="which of --workers this is, from 0")
    parser.add_argument("--workers", type=positive)
    parser.add_argument("--decoders", type=positive, default=2,
                        help="threads; default: %(default)s")
    parser.add_argument("--clips-per-shard", type=non_negative, default=0,
                        help="default: 64 MB a shard")
    parser.add_argument("--merge", action="store_true", help="only the last step, no weights")
    parser.add_argument("--status", action="store_true", help="only say how far all workers are")
    args = parser.parse_args(arguments)
    if not (args.merge or args.status or (args.wan and args.tangoflux)):
        parser.error("--wan and --tangoflux are needed to encode")
    return args


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one process per GPU under torchrun


def read_job(args: argparse.Namespace) -> Job | None:
    """The job that has been begun, from its folder; DataError if the manifest is another."""
    stored = begun(args.out)
    if stored is None or (args.out / METADATA_FILE).is_file():
        return None
    spec = CutSpec(**{name: getattr(args, name) for name in SPEC_FLAGS})
    given = clip_settings(args.manifest, args.captions, args.split, spec)
    inputs = {name: given[name] for name in ("manifest", "captions", "split")}
    refuse_change(args.out, stored, inputs)
    return Job(args.manifest, args.out, stored, args.captions)


def encode(args: argparse.Namespace) -> str:
    """One worker's share; the line to say at the end."""
    worker, workers = place(os.environ, args.worker, args.workers)
    values = {name: getattr(args, name) for name in SPEC_FLAGS} | {"keep_silent": args.keep_silent}
    records, _ = read_manifest(  # before minutes go into loading weights
        args.manifest, args.split, args.captions and read_captions(args.captions)
    )
    check_lengths(records, CutSpec(**values))
    read_ledger(args.manifest)  # which the merge will need
    stored = begun(args.out)
    if stored is not None:
        given = clip_settings(args.manifest, args.captions, args.split, CutSpec(**values))
        given |= {name: values[name] for name in ("fps", "frames", "height", "width")}
        refuse_change(args.out, stored, given)
    encoders = Encoders.load(args.wan, args.tangoflux, args.device, args.video_text_length)
    audio = encoders.audio_vae
    spec = CutSpec(**values, sample_rate=audio.sample_rate, hop=audio.hop)
    metadata = prepare(
        args.manifest, args.out, encoders, spec, args.split, args.captions, worker, workers,
        args.clips_per_shard, args.decoders,
    )
    if metadata is None:
        return f"{args.out}: not complete yet; {partial_folder(args.out)} waits for other workers"
    return f"{args.out}: {tally(metadata.counts)}; rejected: {tally(metadata.rejected)}"


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    try:
        if not (args.merge or args.status):
            print(encode(args))
            return 0
        job = read_job(args)
        if args.merge and job is not None:
            merge(job)
        print(status(None if args.merge else job, args.out))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
