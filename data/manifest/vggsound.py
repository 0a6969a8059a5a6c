"""VGGSound: `vggsound.csv` (no header: id, start, label, split) and clips of ten seconds.

A clip is called `<id>_<start, 6 digits>.mp4` in seconds, or `<id>_<start>_<end>.mp4` in
milliseconds (or seconds). A YouTube id has 11 characters, may begin with `-` and hold `_`; labels
that hold commas are quoted. Ours: id `<id>_<start, 6 digits>`, whatever the file is called.
"""

import csv
import json
import re
from pathlib import Path
from typing import NamedTuple

from data.manifest.records import Listing, Record, find_media, reject
from data.schema import DataError

NAME = re.compile(r"(?P<id>.{11})_(?P<start>\d+)(?:_(?P<end>\d+))?", re.ASCII)
SUBSETS = Path(__file__).with_name("vggsound_subsets.json")  # Table 6, in stat.csv's spelling


class Entry(NamedTuple):
    label: str
    split: str  # the csv's: train or test


def list_vggsound(root: Path, table: Path | None = None) -> Listing:
    """Every clip below root that the table names; `table` is root/vggsound.csv by default.

    The official test clips get split "test"; which of them are held out is said later.
    """
    table = table or next((p for p in (root / "vggsound.csv", root / "data/vggsound.csv")
                           if p.is_file()), root / "vggsound.csv")
    rows, rejects = read_table(table)
    subsets = {label: name for name, labels in load_subsets().items() for label in labels}
    records: dict[str, Record] = {}
    for path in find_media(root):
        record: Record = {"id": path.stem, "path": str(path)}
        parsed = parse_name(path.stem)
        row = rows.get(parsed) if parsed else None
        if parsed is None or row is None:
            detail = "no VGGSound file name" if parsed is None else f"not in {table.name}"
            rejects.append(reject(record, "unlisted", detail))
            continue
        clip_id = f"{parsed[0]}_{parsed[1]:06d}"
        record |= {
            "id": clip_id,
            "source": "vggsound",
            "class": row.label,
            "split": row.split,
            "subset": subsets.get(row.label, ""),
            "origin": parsed[0],
            "origin_start": float(parsed[1]),
        }
        first = records.setdefault(clip_id, record)
        if first is not record:
            rejects.append(reject(record, "duplicate", f"same id and start as {first['path']}"))
    for origin, start in sorted(set(rows) - {(r["origin"], r["origin_start"])
                                             for r in records.values()}):
        absent = {"id": f"{origin}_{start:06d}"}
        rejects.append(reject(absent, "missing_file", f"{table.name} names it; no file has it"))
    if not records:
        raise DataError(f"root={root}: no file of {table} lies below it; unpack the archives there")
    return Listing(list(records.values()), rejects)


def read_table(path: Path) -> tuple[dict[tuple[str, int], Entry], list[Record]]:
    """(id, start) -> label and split; odd lines as ledger lines."""
    if not path.is_file():
        raise DataError(f"table={path}: no such file; give VGGSound's csv with --table")
    rows: dict[tuple[str, int], Entry] = {}
    rejects = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True)
        try:
            for cells in reader:
                line = reader.line_num
                if len(cells) == 4 and cells[1].isdecimal() and cells[3] in ("train", "test"):
                    clip = cells[0], int(cells[1])
                    entry = Entry(cells[2], cells[3])
                    if rows.setdefault(clip, entry) != entry:
                        detail = f"{path.name} line {line}: another label or split than before"
                        rejects.append(reject({"id": cells[0]}, "duplicate", detail))
                elif cells:
                    detail = f"{path.name} line {line}: not `id,start,label,train|test`"
                    rejects.append(reject({"id": cells[0]}, "invalid_record", detail))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"table={path}: no UTF-8 csv ({error}); fetch it again") from error
    return rows, rejects


def parse_name(stem: str) -> tuple[str, int] | None:
    """(id, start in whole seconds) of a file name of either convention."""
    found = NAME.fullmatch(stem)
    if found is None:
        return None
    start = int(found["start"])
    # Ten seconds are 10 or 10,000 between both numbers: that tells the unit.
    milliseconds = found["end"] is not None and int(found["end"]) - start >= 1000
    return found["id"], start // 1000 if milliseconds else start


def load_subsets() -> dict[str, list[str]]:
    """{"AV-Tight": labels, "AV-Loose": labels}."""
    return json.loads(SUBSETS.read_text(encoding="utf-8"))
