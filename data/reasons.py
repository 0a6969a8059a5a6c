"""Why a clip or a record is left out: the word that every list of rejects gives."""

from collections.abc import Mapping
from typing import Any

REASONS = {
    # Of the file and the cut, in the order in which they are tried; the first that applies is told.
    "undecodable": "The file cannot be opened, or its pictures or sound cannot be decoded.",
    "no_video": "The file has no video stream.",
    "no_audio": "The file has no audio stream, and clips without sound are not allowed.",
    "too_short": "The cut lacks more than one frame.",
    "low_fps": "The source has fewer frames per second than `--min-source-fps`.",
    "length_mismatch": "Picture and sound begin or end too far apart.",
    "portrait": "The picture is higher than wide.",
    "silent": "The cut's sound is below `--silence-dbfs`.",
    "digital_silence": "Too much of the cut's sound is exact zeros.",
    "not_finite": "An encoder gave latents that are not finite.",
    "no_room": "The picture or the clip has no room for another of the crops or cuts asked for.",
    # Of a record of a manifest or of a published list.
    "invalid_record": "The record lacks a key, or a value cannot be used.",
    "duplicate_id": "An earlier record has the same id.",
    "no_caption": "A caption is missing or empty.",
    "empty_caption": "The captioning model answered with nothing.",
    "missing_file": "The set's list names a file that is not there.",
    "unlisted": "The file is there, but the set's list does not name it.",
    "bad_marks": "The set's marks of events cannot be read.",
    # Of a clip next to others.
    "duplicate": "The same clip is in the set twice.",
    "overlap": "The window overlaps another of the same recording.",
    "near_duplicate": "It looks and sounds like an earlier clip.",
    "leak": "Its recording is validated on.",
}


class Rejected(Exception):
    """A clip that cannot be used: `reason` is one of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def reject(record: Mapping[str, Any], reason: str, detail: str) -> dict[str, Any]:
    """A record's line in a list of rejects."""
    assert reason in REASONS, reason
    where = {"path": str(record["path"])} if "path" in record else {}
    return {"id": record["id"], "reason": reason, "detail": detail, **where}
