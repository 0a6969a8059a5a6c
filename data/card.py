"""The data card: what a data set holds and what was left out, to be held against the paper.

`build_card` counts, `write_card` writes data_card.json (every number), data_card.md (to be read)
and data_card.png (its plots). Called when a prepared folder is complete, with the records of its
samples.jsonl and its ledger of rejects, and by `python -m data.doctor` before anything is encoded.
"""

import json
from pathlib import Path
from typing import Any

CARD = "data_card"  # .json, .md, .png


def build_card(
    samples: list[dict[str, Any]],
    rejects: list[dict[str, Any]],
    fps: float = 24.0,
    frames: int = 49,
) -> dict[str, Any]:
    """All numbers of the card.

    Args:
        samples: manifest record | `data.decode.Facts` of every kept clip.
        rejects: the ledger's lines, {"id", "reason", "detail", ...}.
        fps, frames: of every cut.
    """
    return {"kept": len(samples), "rejected": len(rejects), "fps": fps, "frames": frames}


def write_card(root: Path, card: dict[str, Any]) -> None:
    """Write data_card.json, .md and .png into `root`."""
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    (root / f"{CARD}.json").write_text(text, encoding="utf-8")
