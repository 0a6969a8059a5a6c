"""A data set as it was downloaded -> manifest.jsonl, one record per cut.

    python -m data.manifest avsync15 ~/AVSync15 --out manifests/avsync15.jsonl --leaks keep
    python -m data.manifest landscape ~/Landscapes --out manifests/landscape.jsonl --leaks keep
    python -m data.manifest greatest_hits ~/vis-data --out manifests/greatest_hits.jsonl
    # all three
    python -m data.manifest.doctor manifests/avsync15.jsonl --out manifests/avsync15.clean.jsonl
    python -m data.manifest alt_merge manifests/{avsync15,landscape,greatest_hits}.clean.jsonl \\
        --out manifests/alt_merge.jsonl                  # so that 300 usable clips are held out
    python -m data.manifest vggsound ~/VGGSound --leaks keep --out manifests/vggsound.jsonl
    python -m data.manifest hold_out manifests/vggsound.clean.jsonl \\
        --keep-out manifests/alt_merge.jsonl --out manifests/vggsound.split.jsonl
    python -m data.manifest folder ~/clips --captions captions.csv --out manifests/mine.jsonl
    python -m data.manifest playground runs/clips --out manifests/playground.jsonl
    python -m data.manifest check manifests/*.jsonl      # exit code 1 where sets leak

x.rejects.jsonl, next to x.jsonl, lists what is left out, with its reason. Records hold id,
source, class, split, subset, path, origin and origin_start (the recording), width, height,
rotation, fps, vfr, frames, seconds, audio_rate, channels, t0, t1, sha256, captions if known, and
marks if the set has them. Splits are train and validation. VGGSound's is drawn from its official
test clips, so many of AV-Tight, AV-Loose and neither; the others are trained on, as the paper's
106,717 of 107,648 say, or not (--official-test test). Training clips of a recording that is held
out are a leak and go, unless alt_merge or hold_out draws the splits again, which belongs after the
doctor: what is held out should be usable. The cut is the centre, in The Greatest Hits and the
playground the window with the most marks. Content is judged by data.manifest.doctor.
"""

import argparse
import collections
import os
import sys
from pathlib import Path
from typing import Any

from data.arguments import amount, non_negative, positive
from data.manifest.duplicates import find_duplicates
from data.manifest.importers import (
    VERSIONS,
    list_avsync15,
    list_folder,
    list_greatest_hits,
    list_landscape,
    list_playground,
    list_vggsound,
)
from data.manifest.read import read_captions
from data.manifest.records import (
    CutRule,
    Listing,
    Record,
    complete_all,
    ledger_path,
    read_ledger,
    write_manifest,
)
from data.manifest.splits import (
    ALT_MERGE,
    check_leaks,
    drop_leaks,
    hold_out,
    merge_alt,
    read_whole,
)
from data.reasons import reject
from data.schema import DataError

MADE_OF = ("alt_merge", "hold_out")  # manifests
SETS = ("avsync15", "landscape", "greatest_hits", "vggsound", "folder", "playground")
# What the paper does where it says it, and our choice where it does not.
DEFAULTS: dict[str, dict[str, Any]] = {
    "avsync15": {},
    "landscape": {},
    "greatest_hits": {"cut": "marks"},
    # AV-Tight, AV-Loose, neither: what the percentages of the paper's Dynamic Degree are made of.
    "vggsound": {"frames": 121, "duplicates": "overlap", "held_out": [138, 554, 39]},
    "folder": {},
    "playground": {"cut": "marks"},
    "alt_merge": {"held_out": list(ALT_MERGE.values())},
    "hold_out": {"held_out": [138, 554, 39]},
    "check": {},
}
# Flag -> who uses it; to the others it says nothing, so they refuse it.
USED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("frames", "fps", "cut", "duplicates", "leaks", "workers"), SETS),
    **dict.fromkeys(("out", "captions", "held_out", "keep_out", "seed"), (*SETS, *MADE_OF)),
    "version": ("greatest_hits",),
    "table": ("vggsound",),
    "official_test": ("vggsound", "hold_out"),
}
COMMON = {"frames": 49, "cut": "centre", "duplicates": "exact", "held_out": None}


def import_set(args: argparse.Namespace) -> Listing:
    """Everything but writing: list, look into the files, drop duplicates, split, drop leaks."""
    found = _list(args)
    rule = CutRule(args.frames, args.fps, args.cut, args.seed)
    done = complete_all(found.records, rule, args.workers)
    records, rejects = done.records, [*found.rejects, *done.rejects]
    twins = {t.later: t.detail for t in find_duplicates(records, args.duplicates)}
    reason = "duplicate" if args.duplicates != "overlap" else "overlap"
    rejects += [reject(records[i], reason, detail) for i, detail in twins.items()]
    records = [record for i, record in enumerate(records) if i not in twins]
    if args.set == "vggsound":
        records = hold_out_tests(records, args) if args.leaks == "drop" else records
    elif args.held_out is not None:
        records = hold_out(records, args.held_out[0], args.seed)
    if args.leaks == "keep":
        return Listing(records, rejects)
    kept = drop_leaks(records, _read_others(args.keep_out))
    return Listing(kept.records, [*rejects, *kept.rejects])


def _read_others(paths: list[Path]) -> list[Record]:
    """The records of --keep-out."""
    others: list[Record] = []
    for path in paths:
        others += (records := read_whole(path))
        note_unknown(path, records)
    return others


def _list(args: argparse.Namespace) -> Listing:
    [root] = args.roots
    if args.set == "greatest_hits":
        return list_greatest_hits(root, args.version)
    if args.set == "vggsound":
        return list_vggsound(root, args.table)
    return {
        "avsync15": list_avsync15,
        "landscape": list_landscape,
        "folder": list_folder,
        "playground": list_playground,
    }[args.set](root)


def hold_out_tests(records: list[Record], args: argparse.Namespace) -> list[Record]:
    """VGGSound: among its official test clips, so many of each subset or of all of them.

    The rest gets the split `args.official_test`. DataError if there are too few.
    """
    test = [record for record in records if record["split"] == "test"]
    parts = {"": test}
    if len(args.held_out) > 1:
        parts = {f" in {name or 'neither subset'}": [r for r in test if r["subset"] == name]
                 for name in ("AV-Tight", "AV-Loose", "")}
    most = [min(n, len(part)) for n, part in zip(args.held_out, parts.values(), strict=True)]
    done = [record for record in records if record["split"] != "test"]
    for count, (where, part) in zip(args.held_out, parts.items(), strict=True):
        if count > len(part):
            raise DataError(
                f"held_out={count}: {args.roots[0]} has only {len(part)} of VGGSound's official "
                f"test clips{where}; use --held-out {' '.join(map(str, most))} or less"
            )
        if count == len(part):
            done += [record | {"split": "validation"} for record in part]
        else:
            done += hold_out(part, count, args.seed, rest=args.official_test)
    return done


def hold_out_usable(args: argparse.Namespace) -> Listing:
    """Of a manifest of VGGSound that drew none: from what is left of its official test clips."""
    [path] = args.roots
    records = read_whole(path)
    for record in records:
        record["path"] = os.path.join(path.parent, record["path"])
    kept = drop_leaks(hold_out_tests(records, args), _read_others(args.keep_out))
    return Listing(kept.records, [*read_ledger(path), *kept.rejects])


def add_captions(records: list[Record], path: Path) -> None:
    """Join the captions of a file by id; says how many fit nowhere."""
    captions = read_captions(path)
    for record in records:
        record |= captions.pop(record["id"], {})
    if captions:
        print(f"note: {len(captions)} ids of {path} are in no record, such as "
              f"{next(iter(captions))!r}", file=sys.stderr)


def report(records: list[Record], rejects: list[Record], out: Path) -> None:
    """What there is now, in a few lines."""
    splits = collections.Counter((r["source"], r.get("subset", ""), r["split"]) for r in records)
    for (source, subset, split), count in sorted(splits.items()):
        print(f"{source:14} {subset:14} {split:11} {count:7}")
    reasons = collections.Counter(entry["reason"] for entry in rejects)
    shown = ", ".join(f"{name} {count}" for name, count in sorted(reasons.items())) or "none"
    captioned = sum("video_caption" in r and "audio_caption" in r for r in records)
    print(f"{out}: {len(records)} cuts, {captioned} with captions; left out: {shown}"
          + (f" ({ledger_path(out)})" if rejects else ""))
    note_unknown(out, records)


def note_unknown(path: Path, records: list[Record]) -> None:
    """Says how many records name no recording."""
    unknown = sum(not record.get("origin") for record in records)
    if unknown:
        print(f"note: {path}: the recording of {unknown} clips is unknown: no leak of theirs can "
              "be seen", file=sys.stderr)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "data.manifest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=DEFAULTS)
    parser.add_argument("roots", metavar="ROOT", type=Path, nargs="+",
                        help="folder of the set; manifests for alt_merge and check")
    parser.add_argument("--out", type=Path, help="manifest to write; ROOT/manifest.jsonl")
    parser.add_argument("--captions", type=Path, help="JSONL or CSV: id, video_caption, ...")
    parser.add_argument("--frames", type=positive, help="of a cut: 49, VGGSound 121")
    parser.add_argument("--fps", type=amount, default=24.0, help="default: %(default)s")
    parser.add_argument("--cut", choices=("centre", "marks"), help="see above")
    parser.add_argument("--duplicates", choices=("exact", "overlap", "id"),
                        help="what goes: same start (default), overlapping windows of a recording "
                        "(VGGSound's default), all but one clip of a recording")
    parser.add_argument("--held-out", type=non_negative, nargs="+", metavar="N",
                        help="clips to hold out: VGGSound 138 554 39 (AV-Tight, AV-Loose, neither) "
                        "or one number, alt_merge 120 80 100, else what the set's own lists say")
    parser.add_argument("--official-test", choices=("train", "test"), default="train",
                        help="split of VGGSound's official test clips that are not held out; "
                        "default: %(default)s")
    parser.add_argument("--keep-out", type=Path, nargs="+", default=[], metavar="MANIFEST",
                        help="do not train on recordings that these hold out")
    parser.add_argument("--leaks", choices=("drop", "keep"), default="drop",
                        help="keep: for manifests that alt_merge or hold_out splits again")
    parser.add_argument("--version", choices=VERSIONS, default="denoised",
                        help="The Greatest Hits' file of a take; default: %(default)s")
    parser.add_argument("--table", type=Path, help="VGGSound's csv; ROOT/vggsound.csv")
    parser.add_argument("--seed", type=int, default=0, help="of every draw; default: %(default)s")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes")
    args = parser.parse_args(arguments)
    for name, users in USED_BY.items():
        if args.set not in users and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')}: {args.set} does not use it; leave it out")
    for name, common in COMMON.items():
        if getattr(args, name) is None:
            setattr(args, name, DEFAULTS[args.set].get(name, common))
    if args.set in (*SETS, "hold_out") and len(args.roots) != 1:
        parser.error(f"{args.set} takes one ROOT, not {len(args.roots)}")
    if args.leaks == "keep" and args.keep_out:
        parser.error("--leaks keep and --keep-out contradict each other; leave one out")
    counts = {"alt_merge": (3,), "vggsound": (1, 3), "hold_out": (1, 3)}.get(args.set, (1,))
    if args.held_out and len(args.held_out) not in counts:
        parser.error(f"--held-out {args.held_out}: {' or '.join(map(str, counts))} numbers for "
                     f"{args.set}")
    if args.set in MADE_OF and args.out is None:
        parser.error(f"{args.set} needs --out")
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    try:
        if args.set == "check":
            return _check(args.roots)
        if args.set == "alt_merge":
            held_out = dict(zip(ALT_MERGE, args.held_out, strict=True))
            found = merge_alt(args.roots, held_out, args.seed, _read_others(args.keep_out))
        elif args.set == "hold_out":
            found = hold_out_usable(args)
        else:
            found = import_set(args)
        if args.captions:
            add_captions(found.records, args.captions)
        out = args.out or args.roots[0] / "manifest.jsonl"
        write_manifest(out, found.records, found.rejects)
        report(found.records, found.rejects, out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check(paths: list[Path]) -> int:
    manifests = {path: read_whole(path) for path in paths}
    for path, records in manifests.items():
        note_unknown(path, records)
    leaks = check_leaks(manifests)
    for (one, two), found in leaks.items():
        print(f"error: {one} trains on {len(found)} recordings that {two} holds out, such as "
              f"{found[0]}; import it again with --keep-out {two}", file=sys.stderr)
    if not leaks:
        print(f"{len(paths)} manifests: no recording is both held out and trained on")
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
