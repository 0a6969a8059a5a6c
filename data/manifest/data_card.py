"""The data card: what a data set holds and what was left out, to be held against the paper.

`build_card` counts, `write_card` writes data_card.json (every number), data_card.md (to be read)
and data_card.png (its plots). Called when a prepared folder is complete, with the records of its
samples.jsonl and its ledger of rejects, and by `python -m data.manifest.doctor` before anything is
encoded.
"""

import collections
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.files import write_json, write_text

CARD = "data_card"  # .json, .md, .png
SAME_RATE = 0.05  # fps; 23.976 counts as 24: one picture in 42 s is shown twice
# Table 1 and Section 4.1 of arXiv 2512.02457. VGGSound's splits leave 200 clips unaccounted for.
PAPER = {
    "avsync15": {"clips": 1499, "seconds": 2},
    "landscape": {"clips": 778, "seconds": 2},
    "greatest_hits": {"clips": 977, "seconds": 2},
    "vggsound": {"clips": 107_648, "seconds": 5},
    "ALT-Merge": {"clips": 3254, "seconds": 2, "train": 2954, "validation": 300},
    "VGGSound": {"clips": 107_648, "seconds": 5, "train": 106_717, "validation": 731},
}
ALT = ("avsync15", "landscape", "greatest_hits")
# Histogram -> (what, unit, edges); the outer bins hold all that lies beyond.
HISTOGRAMS: dict[str, tuple[str, str, list[float]]] = {
    "mean_dbfs": ("mean volume over the cut", "dBFS", [float(v) for v in range(-66, 3, 3)]),
    "source_fps": ("source frame rate", "fps", [0, 12, 14, 16, 18, 20, 22, 23.9, 24.1, 26, 28,
                                                29.9, 30.1, 40, 50, 61]),
    "source_seconds": ("length of the source", "s", [0, 2, 3, 4, 5, 6, 8, 10, 11, 15, 20, 30, 60,
                                                     120]),
    "video_words": ("video caption", "words", [float(v) for v in range(0, 210, 10)]),
    "audio_words": ("audio caption", "words", [float(v) for v in range(0, 105, 5)]),
}
Rows = list[dict[str, Any]]


def build_card(
    samples: Rows, rejects: Rows, fps: float = 24.0, frames: int = 49
) -> dict[str, Any]:
    """All numbers of the card.

    Args:
        samples: manifest record | `data.clips.decode.Facts` of every kept clip. What a record does
        not
            say (source, class, captions) counts as "" or is left out of its histogram.
        rejects: the ledger's lines, {"id", "reason", "detail", ...}.
        fps, frames: of every cut.
    """
    splits: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for sample in samples:
        splits[sample.get("source", "")][sample.get("split", "")] += 1
    values = {name: _values(samples, name) for name in HISTOGRAMS}
    rates = values["source_fps"]
    return {
        "kept": len(samples),
        "rejected": len(rejects),
        "reasons": dict(collections.Counter(line["reason"] for line in rejects).most_common()),
        "fps": fps,
        "frames": frames,
        "cut_seconds": frames / fps,
        "cut_hours": len(samples) * frames / fps / 3600,
        "upsampled": float(np.mean(rates < fps - SAME_RATE)) if len(rates) else None,
        "without_sound": sum(sample.get("has_audio") is False for sample in samples),
        "splits": {source: dict(counts) for source, counts in sorted(splits.items())},
        "subsets": _count(samples, "subset"),
        "classes": _count(samples, "class"),
        "paper": _against_paper(splits),
        "histograms": {name: _histogram(name, found) for name, found in values.items()},
    }


def _values(samples: Rows, name: str) -> np.ndarray:
    """(n,) of one quantity over the samples that have it."""
    if name.endswith("_words"):
        texts = (sample.get(name.replace("words", "caption")) for sample in samples)
        return np.array([len(text.split()) for text in texts if isinstance(text, str)], float)
    found = (sample.get(name) for sample in samples)
    return np.array([value for value in found if value is not None], float)


def _count(samples: Rows, key: str) -> dict[str, dict[str, int]]:
    """Value of `key` -> split -> clips."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for sample in samples:
        counts[str(sample.get(key) or "")][sample.get("split", "")] += 1
    return {name: dict(splits) for name, splits in sorted(counts.items())}


def _histogram(name: str, values: np.ndarray) -> dict[str, Any]:
    """Counts between the edges; what lies beyond them is in the outer bins."""
    what, unit, edges = HISTOGRAMS[name]
    inside = np.clip(values, edges[0], np.nextafter(edges[-1], -np.inf))
    counts, _ = np.histogram(inside, edges)
    low, middle, high = np.percentile(values, [5, 50, 95]) if len(values) else (None,) * 3
    mean = float(values.mean()) if len(values) else None
    return {"what": what, "unit": unit, "edges": edges, "counts": counts.tolist(), "mean": mean,
            "percentiles": {"5": low, "50": middle, "95": high}}


def _against_paper(splits: dict[str, collections.Counter]) -> Rows:
    """One row per set of the paper that is there: its numbers next to ours."""
    sets = {name: [name] for name in (*ALT, "vggsound")}
    rows = []
    for name, sources in (sets | {"ALT-Merge": list(ALT), "VGGSound": ["vggsound"]}).items():
        ours = sum((splits[source] for source in sources if source in splits),
                   collections.Counter())
        if not ours or not all(source in splits for source in sources):
            continue
        paper = PAPER[name]
        rows.append({"set": name, "clips": ours.total(), "paper_clips": paper["clips"]})
        for split in ("train", "validation"):
            if split in paper:
                rows[-1] |= {split: ours[split], f"paper_{split}": paper[split]}
    return rows


def write_card(root: Path, card: dict[str, Any]) -> None:
    """Write data_card.json, .md and .png into `root`, which is made if need be."""
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / f"{CARD}.json", card)
    write_text(root / f"{CARD}.md", _markdown(card))
    _plot(card["histograms"]).savefig(root / f"{CARD}.png", dpi=110)


def _markdown(card: dict[str, Any]) -> str:
    total = card["kept"] + card["rejected"]
    upsampled = "unknown" if card["upsampled"] is None else f"{card['upsampled']:.1%}"
    parts = [
        "# Data card",
        f"{card['kept']:,} of {total:,} clips kept: {card['cut_hours']:.2f} h in cuts of "
        f"{card['cut_seconds']:.3f} s ({card['frames']} frames at {card['fps']:g} fps). From "
        f"slower sources, with repeated pictures: {upsampled}. Kept without sound: "
        f"{card['without_sound']:,}.",
        "## Kept, by source and split",
        _split_table("source", card["splits"]),
        "## Left out, by reason",
        _table(["reason", "clips"], [[name, f"{n:,}"] for name, n in card["reasons"].items()]),
    ]
    if card["paper"]:
        parts += ["## Against the paper", _paper_table(card["paper"]),
                  "The paper gives no thresholds for its filters (arXiv 2512.02457, Table 1 and "
                  "Section 4.1), so a difference here is to be explained by the reasons above."]
    parts += ["## Distributions", f"![histograms]({CARD}.png)", _statistics(card["histograms"])]
    for title, key in (("subset", "subsets"), ("class", "classes")):
        if set(card[key]) - {""}:
            parts += [f"## By {title}", _split_table(title, card[key])]
    return "\n\n".join(parts) + "\n"


def _split_table(title: str, counts: dict[str, dict[str, int]]) -> str:
    """A row per name, a column per split, and the sum."""
    splits = sorted({split for row in counts.values() for split in row})
    rows = [[name or "(none)", *(f"{row.get(split, 0):,}" for split in splits),
             f"{sum(row.values()):,}"] for name, row in counts.items()]
    return _table([title, *splits, "all"], rows)


def _paper_table(rows: Rows) -> str:
    def pair(row: dict[str, Any], key: str) -> str:
        paper = row.get(f"paper_{key}")
        return "" if paper is None else f"{row[key]:,} / {paper:,}"

    keys = ("clips", "train", "validation")
    return _table(["set", *(f"{key}: ours / paper" for key in keys)],
                  [[row["set"], *(pair(row, key) for key in keys)] for row in rows])


def _statistics(histograms: dict[str, Any]) -> str:
    rows = []
    for found in histograms.values():
        if found["mean"] is not None:
            numbers = (found["mean"], *found["percentiles"].values())
            rows.append([f"{found['what']} ({found['unit']})", *(f"{n:.1f}" for n in numbers)])
    return _table(["", "mean", "5 %", "median", "95 %"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    cells = ([text.replace("|", "\\|") for text in row] for row in (header, rule, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _plot(histograms: dict[str, Any]) -> Figure:
    """A small panel per histogram that has values."""
    shown = [found for found in histograms.values() if found["mean"] is not None]
    figure = Figure(figsize=(9.6, 2.2 * -(-max(1, len(shown)) // 3)), layout="constrained")
    for place, found in enumerate(shown, start=1):
        axes = figure.add_subplot(-(-len(shown) // 3), 3, place)
        places = range(len(found["counts"]))  # bins of equal width: some edges are far apart
        axes.bar(places, found["counts"], width=0.92, align="edge", color="#3b6ea5")
        ticks = list(range(0, len(found["edges"]), len(found["edges"]) // 8 + 1))
        axes.set_xticks(ticks, [f"{found['edges'][tick]:g}" for tick in ticks], fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(f"{found['what']} ({found['unit']})", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
