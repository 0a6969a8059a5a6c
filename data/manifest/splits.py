"""Who is held out, and that nobody is held out and trained on: splits within and between sets."""

import collections
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from data.manifest.read import read_records
from data.manifest.records import Listing, Record, read_ledger
from data.reasons import reject
from data.schema import DataError

ALT_MERGE = {"avsync15": 120, "landscape": 80, "greatest_hits": 100}  # held out, of 3,254 clips


def hold_out(records: list[Record], count: int, seed: int, rest: str = "train") -> list[Record]:
    """The same records; `count` of them get split "validation", all others `rest`.

    Drawn by hashes of (seed, id), the same share of every class: first from the clips that the set
    itself holds out, then from its training clips, those first whose recording no other shares.
    DataError if there are too few.
    """
    if count >= len(records):
        raise DataError(
            f"held_out={count}: there are {len(records)} clips; hold out fewer, or none is left to "
            "train on"
        )
    shared = collections.Counter(r["origin"] for r in records if r.get("origin"))
    groups: dict[tuple[bool, str], list[Record]] = collections.defaultdict(list)
    for record in records:
        groups[record["split"] == "train", record.get("class", "")].append(record)
    ranks: list[tuple[bool, float, str]] = []  # (is training, share of the class before it, id)
    for (training, _), group in groups.items():
        group.sort(key=lambda r: (shared[r.get("origin", "")] > 1, _draw(seed, r["id"])))
        ranks += [(training, (k + 0.5) / len(group), r["id"]) for k, r in enumerate(group)]
    held = {clip_id for _, _, clip_id in sorted(ranks)[:count]}
    return [r | {"split": "validation" if r["id"] in held else rest} for r in records]


def _draw(seed: int, clip_id: str) -> str:
    return hashlib.sha256(f"{seed}/{clip_id}".encode()).hexdigest()


def drop_leaks(records: list[Record], others: Sequence[Record]) -> Listing:
    """Training clips go whose recording is held out, in these records or in `others`."""
    held: dict[str, Record] = {}
    for record in (*others, *records):
        if record["split"] != "train" and record.get("origin"):
            held.setdefault(record["origin"], record)
    kept = Listing([], [])
    for record in records:
        twin = held.get(record.get("origin", "")) if record["split"] == "train" else None
        if twin is None:
            kept.records.append(record)
        else:
            where = f"{twin.get('source', 'no source')}, {twin['id']}"
            detail = f"recording {record['origin']} is held out ({where})"
            kept.rejects.append(reject(record, "leak", detail))
    return kept


def read_whole(path: Path) -> list[Record]:
    """The records of a manifest; DataError if a line is faulty, for its leaks would go unseen."""
    records, faults = read_records(path, "train")
    if faults:
        raise DataError(
            f"{path}: line {faults[0].line}: {faults[0].detail} ({len(faults)} such lines): leaks "
            "of theirs cannot be seen; mend or delete them"
        )
    return records


def check_leaks(manifests: dict[Path, list[Record]]) -> dict[tuple[Path, Path], list[str]]:
    """(trained on, held out) -> recordings that both manifests hold so; empty if all is well."""
    sides: dict[Path, dict[bool, set[str]]] = {}
    for path, records in manifests.items():
        sides[path] = {True: set(), False: set()}
        for record in records:
            if record.get("origin"):
                sides[path][record["split"] == "train"].add(record["origin"])
    leaks = {(one, two): sorted(sides[one][True] & sides[two][False])
             for one in manifests for two in manifests}
    return {pair: found for pair, found in leaks.items() if found}


def merge_alt(
    manifests: list[Path], held_out: dict[str, int], seed: int, others: Sequence[Record] = ()
) -> Listing:
    """ALT-Merge: the manifests of its three sets as one, `held_out` of each set held out.

    Paths are of this machine again. What `others` hold out is not trained on. The sets' own ledgers
    come along. DataError if a set is absent or foreign, or if two manifests hold one id.
    """
    homes: dict[str, Path] = {}
    by_source: dict[str, list[Record]] = {source: [] for source in held_out}
    rejects: list[Record] = []
    for path in manifests:
        records, faults = read_records(path, "train")
        rejects += read_ledger(path)
        rejects += [fault.as_reject() for fault in faults]
        for record in records:
            if record.get("source") not in by_source:
                raise DataError(
                    f"{path}: source={record.get('source')!r}; ALT-Merge is made of "
                    f"{', '.join(held_out)}"
                )
            if (first := homes.get(record["id"])) is not None:
                raise DataError(f"id={record['id']!r}: both {first} and {path} have it; give each "
                                "set's manifest once")
            homes[record["id"]] = path
            record["path"] = os.path.join(path.parent, record["path"])
            by_source[record["source"]].append(record)
    absent = [source for source, records in by_source.items() if not records]
    if absent:
        raise DataError(f"alt_merge: no clip of {', '.join(absent)}; give its manifest too")
    merged = [record for source, count in held_out.items()
              for record in hold_out(by_source[source], count, seed)]
    kept = drop_leaks(merged, others)
    return Listing(kept.records, [*rejects, *kept.rejects])
