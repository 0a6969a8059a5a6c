"""Strict construction of the model's frozen config dataclasses from plain mappings.

The dataclasses live next to the modules that own them; this is the one function they share. An
unknown key, a wrong type or a wrong value is an error that names the key, the value and the fix.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")
SAME = {"learning_rate": "lr"}  # another project's word -> ours, where no letter is alike


def strict_config(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Build the dataclass ``cls`` from ``values``; ``where`` prefixes keys in error messages.

    Lists become tuples, because the dataclasses are hashable. Raises ValueError for an unknown
    key (naming the nearest known one) and TypeError for a value of another type than the default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in defaults:
            hint = nearest(key, list(defaults), f"{where}.")
            raise ValueError(f"{where}.{key} is not a known key; {hint}")
        arguments[key] = _matching_type(f"{where}.{key}", value, defaults[key])
    return cls(**arguments)


def nearest(word: str, known: list[str], prefix: str = "") -> str:
    """Hint for an unknown word; ``prefix``: the section it stands in, with its dot."""
    word = SAME.get(word, word)
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{prefix}{match[0]}'?" if match else "known: " + ", ".join(sorted(known))


def _matching_type(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if dataclasses.is_dataclass(default) or default is None:
        return value  # nested configs are built by their owner before they arrive here
    if type(value) is not type(default):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}; give {type(default).__name__} "
            f"like the default {default!r}"
        )
    return value
