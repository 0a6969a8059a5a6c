"""Numbers that command-line flags take. argparse names the flag; these say the rule."""

import argparse
import math
from collections.abc import Iterable

from data.clips.cut import CutSpec


def non_negative(text: str) -> int:
    """A whole number, 0 or more."""
    return _from(int(text), 0)


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    return _from(int(text), 1)


def amount(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be finite and above 0")
    return value


def finite(text: str) -> float:
    """Any number but NaN and infinities."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: must be finite")
    return value


def _from(value: int, least: int) -> int:
    if value < least:
        raise argparse.ArgumentTypeError(f"{value}: must be {least} or more")
    return value


def add_cut_flags(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """`--name` for each of these fields of CutSpec, with its default."""
    for name in names:
        default = getattr(CutSpec, name)
        kind = positive if isinstance(default, int) else amount if name == "fps" else finite
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default, help="default: %(default)s")
