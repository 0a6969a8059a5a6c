"""What a folder or manifest will give, before any weights are loaded.

    python -m data.manifest.doctor ~/clips  # any folder: as `data.manifest folder`
    python -m data.manifest.doctor manifests/vggsound.jsonl --frames 121 --gpus 64 --sample 2000
    python -m data.manifest.doctor manifests/vggsound.jsonl --frames 121 --near-duplicates \\
        --out manifests/clean.jsonl

decodes every cut in parallel processes, by the code and settings of data.prepare, and says: usable
clips, rejects by reason, hours to encode on N GPUs, bytes of the result. `--out` writes the records
that stay, with what was found out, a ledger of all others next to it (clean.rejects.jsonl, with the
manifest's own in front) and the data card of both (clean.card/). `--sample N` looks at N clips
drawn by seed and scales up. Near-duplicates are looked for here, because encoding runs as
independent workers that see a slice each.
"""

import argparse
import collections
import dataclasses
import math
import os
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common.durations import in_words
from data.arguments import add_cut_flags, amount, positive
from data.clips.decode import CutSpec, read_cut
from data.manifest import (
    check_lengths,
    find_lacking,
    read_captions,
    read_manifest,
    read_records,
)
from data.manifest.data_card import build_card, write_card
from data.manifest.duplicates import Print, build_print, find_near_duplicates
from data.manifest.importers import list_folder
from data.manifest.records import (
    CutRule,
    Listing,
    Record,
    complete,
    read_ledger,
    spread,
    write_manifest,
)
from data.reasons import Rejected, reject
from data.schema import DataError, Metadata, columns

SETTINGS = ("fps", "frames", "height", "width", "min_source_fps", "silence_dbfs",
            "max_length_mismatch", "max_digital_silence")
THUMB = 48, 80  # height and width: the source is judged, whatever it is scaled to
TEXT_ROWS = 116  # mean tokens of a video caption in the paper, Section 3.3
# Wan2.2's VAE on an H200: 0.09 s for 49 frames of 192x320; computed from its FLOPs, not measured.
SECONDS_PER_PIXEL = 0.09 / (49 * 192 * 320)


class Judged(NamedTuple):
    """One clip: its record with facts or its ledger line, and what it took."""

    record: Record
    seconds: float
    look: Print | None


class Estimate(NamedTuple):
    clips: float  # usable ones of all that were given
    margin: float  # two standard errors of it; 0 if all were looked at
    gpu_seconds: float  # to encode them on one GPU
    decode_seconds: float  # to decode them in one process of this machine
    sample_bytes: int


def load(source: Path, captions: Path | None) -> Listing:
    """Records of a manifest or of every clip below a folder, paths of this machine; ledger lines.

    The ledger that the importer wrote next to the manifest is carried over. Captions are asked for
    only where their file is given.
    """
    texts = None if captions is None else read_captions(captions)
    if source.is_dir():
        found = list_folder(source)
        lacking = [find_lacking(record, texts) if texts else None for record in found.records]
        pairs = list(zip(found.records, lacking, strict=True))
        return Listing([record for record, fault in pairs if fault is None],
                       [reject(record, *fault) for record, fault in pairs if fault is not None])
    if texts is None:
        records, faults = read_records(source, "train")
    else:
        records, faults = read_manifest(source, "train", texts)
    rejects = [fault.as_reject() for fault in faults]
    for record in records:
        record["path"] = str(source.parent / record["path"])
    return Listing(records, [*read_ledger(source), *rejects])


def judge(record: Record, spec: CutSpec, near: bool) -> Judged:
    """Decode one cut as data.prepare will."""
    begun = time.perf_counter()
    if "sha256" not in record:  # no importer has looked into the file yet
        record = complete(record, CutRule(spec.frames, spec.fps))
        if "reason" in record:
            return Judged(record, time.perf_counter() - begun, None)
    small = dataclasses.replace(spec, height=THUMB[0], width=THUMB[1])
    try:
        cut = read_cut(record["path"], small, record.get("t0"))
    except Rejected as rejected:
        line = reject(record, rejected.reason, rejected.detail)
        return Judged(line, time.perf_counter() - begun, None)
    spent = time.perf_counter() - begun
    record = record | dataclasses.asdict(cut.facts)
    look = build_print(cut.frames, cut.audio, spec.duration, spec.sample_rate) if near else None
    return Judged(record, spent, look)


def examine(
    records: list[Record], spec: CutSpec, near: bool, workers: int
) -> tuple[Listing, float]:
    """(what stays and what goes, seconds of decoding per clip that stays)."""
    check_lengths(records, spec)
    job = partial(judge, spec=spec, near=near)
    judged = list(tqdm(spread(job, records, workers), total=len(records), unit="clip"))
    rejects = [one.record for one in judged if "reason" in one.record]
    kept = [one for one in judged if "reason" not in one.record]
    # What is held out stays rather than what is trained on; else the first does.
    order = sorted(range(len(kept)), key=lambda i: kept[i].record["split"] == "train")
    looks = [look for look in (kept[i].look for i in order) if look is not None]
    gone = {order[twin.later]: twin for twin in find_near_duplicates(looks)}
    for index, twin in sorted(gone.items()):
        detail = f"like {kept[order[twin.first]].record['id']}: {twin.detail}"
        rejects.append(reject(kept[index].record, "near_duplicate", detail))
    records = [one.record for index, one in enumerate(kept) if index not in gone]
    seconds = sum(one.seconds for one in judged) / max(1, len(records))
    return Listing(records, rejects), seconds


def sample_bytes(spec: CutSpec, text_rows: int) -> int:
    """Bytes of one stored sample before compression, from the columns of `data.schema`.

    The geometry is that of Wan2.2-TI2V-5B (VAE 48 channels, strides 4 and 16; umT5 4,096 wide) and
    TangoFlux (64 channels; Flan-T5 64 x 1,024). The record's JSON and the id come on top, about
    1 KB.
    """
    latents = [48, 1 + (spec.frames - 1) // 4, spec.height // 16, spec.width // 16]
    metadata = Metadata(
        fps=spec.fps,
        frames=spec.frames,
        height=spec.height,
        width=spec.width,
        sample_rate=spec.sample_rate,
        audio_hop=spec.hop,
        video_temporal_stride=4,
        video_spatial_stride=16,
        latents_mean=[],
        latents_std=[],
        video_latent_shape=latents,
        audio_latent_shape=[spec.padded_latents, 64],
        video_text_length=512,
        video_text_width=4096,
        audio_text_length=64,
        audio_text_width=1024,
    )
    total = text_rows * metadata.video_text_width * 2  # the one column whose shape is not fixed
    for encoding in columns(metadata).values():
        kind, *shape = encoding.split(":")[1:] or [encoding, "1"]
        if shape and kind in _WIDTHS:
            total += _WIDTHS[kind] * math.prod(map(int, shape[0].split(",")))
    return total


_WIDTHS = {"float16": 2, "uint16": 2, "uint8": 1}


def estimate(
    looked: int, given: int, usable: int, seconds: float, args: argparse.Namespace
) -> Estimate:
    """Scale what was seen in `looked` clips up to all `given`."""
    share = usable / looked
    spread_of = math.sqrt(share * (1 - share) / looked * (1 - looked / given))
    clips = share * given
    pixels = args.frames * args.height * args.width
    per_clip = args.encode_seconds or SECONDS_PER_PIXEL * pixels
    spec = _spec(args)
    return Estimate(clips, 2 * spread_of * given, clips * per_clip, clips * seconds,
                    sample_bytes(spec, args.text_rows))


def report(
    found: Estimate, looked: int, given: int, rejects: list[Record], args: argparse.Namespace
) -> str:
    """The doctor's words."""
    reasons = collections.Counter(line["reason"] for line in rejects)
    margin = f" +- {found.margin:,.0f}" if found.margin else ""
    scaled = f" (from a sample of {looked:,})" if looked < given else ""
    total = found.clips * found.sample_bytes
    one = found.gpu_seconds / max(1.0, found.clips)
    lines = [
        f"usable   {found.clips:,.0f}{margin} of {given:,} clips{scaled}, "
        f"{in_words(found.clips * args.frames / args.fps)} of cuts",
        *(f"rejected {count:8,} {reason}" for reason, count in reasons.most_common()),
        f"encode   {in_words(found.gpu_seconds / args.gpus)} on {args.gpus} GPUs at {one:.3f} s a "
        "clip"
        + ("" if args.encode_seconds else " (an H200, computed, not measured: --encode-seconds)"),
        f"decode   {in_words(found.decode_seconds)} of one process here, measured: "
        f"{math.ceil(found.decode_seconds / max(found.gpu_seconds, 1e-9))} processes keep a GPU "
        f"busy",
        f"bytes    {total / 1e9:,.2f} GB before compression: {found.sample_bytes:,} a sample with "
        f"{args.text_rows} rows of video text (--text-rows)",
    ]
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "data.manifest.doctor", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a folder of clips or a manifest")
    parser.add_argument("--captions", type=Path, help="clips without both are rejected")
    add_cut_flags(parser, SETTINGS)
    parser.add_argument("--keep-silent", action="store_true", help="as in data.prepare")
    parser.add_argument("--near-duplicates", action="store_true",
                        help="reject what looks and sounds like an earlier clip")
    parser.add_argument("--sample", type=positive, help="look at so many clips only")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--gpus", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--encode-seconds", type=amount, help="per clip on your GPU, if measured")
    parser.add_argument("--text-rows", type=positive, default=TEXT_ROWS,
                        help="default: %(default)s")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, help="manifest of what stays; see above")
    args = parser.parse_args(arguments)
    if args.sample and (args.out or args.near_duplicates):
        parser.error("--sample sees only some clips; leave it out for --out or --near-duplicates")
    return args


def _spec(args: argparse.Namespace) -> CutSpec:
    values = {name: getattr(args, name) for name in SETTINGS}
    return CutSpec(**values, keep_silent=args.keep_silent)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    try:
        spec = _spec(args)
        given, faults = load(args.source, args.captions)
        if not given:
            raise DataError(f"source={args.source}: no usable line or media file in it")
        looked = given
        if args.sample and args.sample < len(given):
            looked = random.Random(args.seed).sample(given, args.sample)
        kept, seconds = examine(looked, spec, args.near_duplicates, args.workers)
        rejects = [*faults, *kept.rejects]
        found = estimate(len(looked), len(given), len(kept.records), seconds, args)
        print(report(found, len(looked), len(given), rejects, args))
        if args.out:
            write_manifest(args.out, kept.records, rejects)
            card = build_card(kept.records, rejects, args.fps, args.frames)
            write_card(args.out.with_suffix(".card"), card)
            print(f"{args.out}: {len(kept.records)} records, ledger and card next to it")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
