"""Decoded frames of one stream from an instant on, with their presentation times.

Shared by data.clips.pictures and data.clips.sound. Files are judged by what can be decoded: an
index that leads astray is not believed, damage before the cut does no harm, damage inside it is an
error.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from data.clips.probe import Probe, open_media

TOLERANCE = 0.002  # seconds; containers round time stamps to 1 ms


def frames_from(
    path: str | Path, found: Probe, index: int, t0: float, preroll: float = 0.0
) -> Iterator[tuple[float, Any]]:
    """(time, frame) of one stream from t0 - preroll (or a little earlier) on."""
    first = found.start if index == found.video_index else found.sound_start
    target = max(t0 - preroll, first)
    for seek in (True, False):
        with open_media(path) as container:
            stream = container.streams[index]
            stream.thread_type = "AUTO"
            if seek and not _seek(container, stream, target + found.origin + TOLERANCE):
                continue
            at_target = not seek
            for frame in _decode(container, stream, t0 + found.origin):
                time = float(frame.pts * frame.time_base) - found.origin
                at_target = at_target or time <= target + preroll / 2 + TOLERANCE
                if not at_target:  # the index led past the target: read from the beginning
                    break
                yield time, frame
            else:
                return


def _seek(container: Any, stream: Any, time: float) -> bool:
    """To the last key frame at or before `time`; False where the container cannot."""
    try:
        container.seek(math.floor(time / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


def _decode(container: Any, stream: Any, t0: float) -> Iterator[Any]:
    """Frames of one stream. Damage before t0 (container time) is skipped, later it is raised."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None or float(stamp * packet.time_base) >= t0:
                raise
            continue
        yield from (frame for frame in frames if frame.pts is not None)
