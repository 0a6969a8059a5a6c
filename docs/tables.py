"""Writes the tables of docs/ that the code holds: `python docs/tables.py`.

tests/test_commands.py compares them. A table is found by its first line and ends at an empty one.
"""

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parent
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
sys.path.insert(0, str(DOCS.parent))

from common.events import KINDS  # noqa: E402
from config import RunConfig  # noqa: E402
from data.reasons import REASONS  # noqa: E402
from training.metrics.tags import SCALARS  # noqa: E402


def tables() -> dict[str, list[tuple[str, ...]]]:
    """Page -> its table, the header first."""
    return {
        "configs.md": [("key", "default", "values", "meaning"), *keys_of(RunConfig)],
        "run-directory.md": [("event", "always has", "says"), *(
            (f"`{name}`", ", ".join(f"`{key}`" for key in kind.keys), kind.sentence)
            for name, kind in KINDS.items())],
        "data.md": [("reason", "meaning"), *(
            (f"`{name}`", sentence) for name, sentence in REASONS.items())],
        "monitoring.md": [("tag", "meaning"), *(
            (f"`{tag}`", meaning) for tag, meaning in SCALARS.items())],
    }


def written(page: str, table: list[tuple[str, ...]]) -> str:
    """The page's text with this table in place of the one that has its header."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    text = (DOCS / page).read_text(encoding="utf-8")
    begin = text.index(lines[0] + "\n")
    return text[:begin] + "\n".join(lines) + text[text.index("\n\n", begin):]


def keys_of(cls: Any, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(key, default, bounds or choices, sentence) of every key; nested ones with their dots."""
    rows = []
    for one in dataclasses.fields(cls):
        annotation = typing.get_type_hints(cls, include_extras=True)[one.name]
        marks = getattr(annotation, "__metadata__", ())
        plain = typing.get_args(annotation)[0] if marks else annotation
        owner = next((kind for kind in (plain, *typing.get_args(plain))
                      if dataclasses.is_dataclass(kind) and typing.get_origin(plain) is not list),
                     None)
        if owner is not None:
            rows += keys_of(owner, f"{prefix}{one.name}.")
            continue
        sentence, bounds = "", []
        for mark in marks:  # a sentence alone, or pydantic's Field
            sentence = mark if isinstance(mark, str) else mark.description or sentence
            bounds += [f"{sign} {getattr(rule, name):g}" for rule in getattr(mark, "metadata", ())
                       for name, sign in SIGNS.items() if getattr(rule, name, None) is not None]
        if typing.get_origin(plain) is typing.Literal:
            bounds = [in_yaml(choice) for choice in typing.get_args(plain)]
        rows.append((f"`{prefix}{one.name}`", default_of(one), ", ".join(bounds), sentence))
    return rows


def default_of(one: Any) -> str:
    if one.default is not dataclasses.MISSING:
        return f"`{in_yaml(one.default)}`"
    return "`[]`" if one.default_factory is list else "required"


def in_yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value,
                          default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    for page, table in tables().items():
        (DOCS / page).write_text(written(page, table), encoding="utf-8")
