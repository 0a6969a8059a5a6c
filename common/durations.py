"""Seconds in words, for people."""


def as_clock(seconds: float) -> str:
    """`1:02:03`: a time left, to be watched as it shrinks."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def in_words(seconds: float) -> str:
    """`90 s`, `34 min`, `5.2 h`, `3.5 d`: at least two of the unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.1f} d"
