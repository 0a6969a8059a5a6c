"""Manifests: how clips enter. `python -m data.manifest SET ROOT` writes one, `read_manifest` reads.

One JSON object a line and one cut each: id, source, class, split, subset, path (relative to the
manifest), t0 and t1 in seconds, captions, facts about the streams, sha256.
"""

from data.manifest.read import (
    Fault,
    check_lengths,
    check_text,
    find_lacking,
    read_captions,
    read_manifest,
    read_records,
)

__all__ = [
    "Fault",
    "check_lengths",
    "check_text",
    "find_lacking",
    "read_captions",
    "read_manifest",
    "read_records",
]
