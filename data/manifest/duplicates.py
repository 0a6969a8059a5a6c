"""Clips that are in a data set twice: by their names' metadata, or by how they look and sound.

The first of a pair stays, in the order of the manifest. The other filters judge one clip alone
and lie where it is read: data.clips.probe names them, data.clips.decode applies them. Used by
data.manifest (metadata) and data.manifest.doctor (content: encoding runs as independent workers
that see a slice each).
"""

import collections
from typing import Any, Literal, NamedTuple

import numpy as np

from data.clips.sound import mean_volume

Record = dict[str, Any]
Duplicates = Literal["exact", "overlap", "id"]

PICTURES = 4  # of a cut, evenly spread, 64 bits each
GRID = (8, 9)  # rows and columns of brightness; a bit says that it falls to the right
ENVELOPE = 64  # parts of the cut whose loudness is compared
LAG = 2  # parts by which two envelopes may be shifted
MAX_BITS = 10.0  # of 64 that may differ, mean over the pictures
MIN_LIKENESS = 0.9  # correlation of the envelopes


class Twin(NamedTuple):
    """`later` repeats `first`; both are positions in what was given."""

    first: int
    later: int
    detail: str


def find_duplicates(records: list[Record], mode: Duplicates) -> list[Twin]:
    """Clips of one recording that are the same again.

    exact: same recording, start and piece (same file and cut where the recording is unknown);
    overlap: also windows of one recording that overlap in time; id: every further clip of it.
    """
    twins, groups = [], collections.defaultdict(list)
    for index, record in enumerate(records):
        groups[_recording(record)].append(index)
    for name, indices in groups.items():
        kept: list[int] = []
        for index in sorted(indices, key=lambda i: _precedence(records[i], i)):
            same = (k for k in reversed(kept) if _same(records[k], records[index], mode))
            if (twin := next(same, None)) is None:
                kept.append(index)
                continue
            begin, end = _window(records[twin])
            detail = f"recording {name}: {records[twin]['id']} has {begin:g} to {end:g} s of it"
            twins.append(Twin(twin, index, detail))
    return sorted(twins, key=lambda twin: twin.later)


def _precedence(record: Record, index: int) -> tuple:
    """What is held out stays rather than what is trained on, then the earlier window."""
    return record.get("split") == "train", _window(record)[0], index


def _recording(record: Record) -> str:
    return record.get("origin") or record.get("sha256") or record["path"]


def _window(record: Record) -> tuple[float, float]:
    """Of the recording, in seconds: the whole file's, for names say no more; else the cut's."""
    if record.get("origin"):
        begin = record.get("origin_start", 0.0)
        return begin, begin + record["seconds"]
    return record.get("t0") or 0.0, record.get("t1") or float("inf")


def _same(first: Record, later: Record, mode: Duplicates) -> bool:
    if mode == "id":
        return True
    (begin, end), (other_begin, other_end) = _window(first), _window(later)
    if mode == "overlap":
        return min(end, other_end) - max(begin, other_begin) > 0.1  # encoders add some frames
    if begin != other_begin:
        return False
    same_piece = first.get("origin_part") == later.get("origin_part")
    return same_piece or first.get("sha256", first["path"]) == later.get("sha256")


class Print(NamedTuple):
    """What a cut looks and sounds like, small enough to compare with every other."""

    bits: np.ndarray  # (PICTURES,) uint64
    envelope: np.ndarray  # (ENVELOPE,) float32, dB, mean 0 and norm 1


def build_print(frames: np.ndarray, audio: np.ndarray, seconds: float, rate: int) -> Print:
    """Of a decoded cut: frames (T, H, W, 3) uint8, audio (N, 2), which may be padded behind."""
    chosen = np.linspace(0, len(frames) - 1, 2 * PICTURES + 1).round().astype(int)[1::2]
    bits = np.array([_picture_bits(frames[index]) for index in chosen], dtype=np.uint64)
    parts = np.array_split(audio[: round(seconds * rate)], ENVELOPE)
    levels = np.maximum([mean_volume(part) for part in parts], -80.0)  # below: coding noise
    levels = levels - levels.mean()
    return Print(bits, (levels / max(float(np.linalg.norm(levels)), 1e-6)).astype(np.float32))


def _picture_bits(frame: np.ndarray) -> int:
    """Difference hash: where brightness falls from one cell to the next; scale does not matter."""
    grey = frame.astype(np.float32).mean(axis=2)  # (H, W)
    rows = np.array_split(grey, GRID[0], axis=0)
    cells = np.array([[part.mean() for part in np.array_split(row, GRID[1], axis=1)]
                      for row in rows])  # (8, 9)
    falls = cells[:, :-1] > cells[:, 1:] + 0.5  # half a grey level: flat areas have no sign
    return int.from_bytes(np.packbits(falls).tobytes(), "big")


def find_near_duplicates(prints: list[Print]) -> list[Twin]:
    """Pairs that look alike (MAX_BITS) and sound alike (MIN_LIKENESS).

    Every pair is compared: 20,000 clips take 2 s, 100,000 one to two minutes. Sound decides
    between two takes of one still scene.
    """
    if not prints:
        return []
    bits = np.stack([p.bits for p in prints], axis=1)  # (PICTURES, n)
    twins: list[Twin] = []
    gone: set[int] = set()
    for first in range(len(prints) - 1):
        if first in gone:
            continue
        apart = np.zeros(len(prints) - first - 1, np.uint16)
        for picture in bits:
            apart += np.bitwise_count(picture[first + 1 :] ^ picture[first])
        for later in np.flatnonzero(apart <= MAX_BITS * PICTURES) + first + 1:
            likeness = _likeness(prints[first].envelope, prints[later].envelope)
            if int(later) not in gone and likeness >= MIN_LIKENESS:
                gone.add(int(later))
                mean = apart[later - first - 1] / PICTURES
                detail = f"{mean:.1f} of 64 bits apart, sound {likeness:.2f} alike"
                twins.append(Twin(first, int(later), detail))
    return sorted(twins, key=lambda twin: twin.later)


def _likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two envelopes at the best of the lags; 1 where both are flat."""
    if not one.any() and not other.any():
        return 1.0
    return max(float(np.dot(one, np.roll(other, lag))) for lag in range(-LAG, LAG + 1))
