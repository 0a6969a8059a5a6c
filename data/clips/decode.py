"""One cut of a clip: exactly `frames` pictures and the sound from the same instant t0.

Pictures are chosen by presentation time (the one a player shows at t0 + k/fps), sound is placed
by its time stamps and cut to whole audio latents. Files are judged by what can
be decoded, never by their header. Called by `data.prepare`, one clip at a time.
"""

import math
from pathlib import Path

import av
import numpy as np

from data.clips.cut import Cut, CutSpec, Facts
from data.clips.pictures import read_frames
from data.clips.probe import Probe, probe
from data.clips.sound import digital_silence, mean_volume, read_audio
from data.clips.streams import TOLERANCE
from data.reasons import Rejected

__all__ = ["Cut", "CutSpec", "Facts", "Rejected", "choose_t0", "digital_silence", "mean_volume",
           "read_cut"]

CLOSEST = 0.5  # seconds between two cuts of one clip; closer ones show the same


def read_cut(path: str | Path, spec: CutSpec, t0: float | None = None, view: int = 0) -> Cut:
    """Decode one cut; t0 in seconds from the clip's start, the centre window by default.

    `view` counts the cuts of one clip, crops first: 0 is the only one unless the spec asks for
    several offsets or crops. Raises Rejected with the first of `data.reasons.REASONS` that
    applies.
    """
    offset, crop = divmod(view, spec.crops)
    found = probe(path, need_sound=not spec.keep_silent)
    begin = choose_t0(found, spec, t0)
    if offset:
        begin = _shifted(found, spec, begin, offset)
    if found.fps < spec.min_source_fps - 1e-3:
        raise Rejected("low_fps", f"{found.fps:.3f} fps, below {spec.min_source_fps:g}")
    if found.length_mismatch > spec.max_length_mismatch:
        raise Rejected(
            "length_mismatch",
            f"picture from {found.start:.3f} to {found.end:.3f} s, sound from "
            f"{found.sound_start:.3f} to {found.sound_end:.3f} s",
        )
    try:
        frames, (height, width) = read_frames(path, found, begin, spec, crop)
        audio = read_audio(path, found, begin, spec)
    except (av.FFmpegError, ValueError) as error:  # PyAV refuses odd formats with a ValueError
        raise Rejected("undecodable", f"decoder: {error}") from error
    mean_dbfs = mean_volume(audio)
    fault = _check_sound(audio, mean_dbfs, begin, spec)
    if fault is not None:
        if not spec.keep_silent:
            raise fault
        audio = np.zeros_like(audio)  # too faint to count as sound
    facts = Facts(
        t0=begin,
        source_fps=found.fps,
        source_seconds=found.duration,
        source_width=width,
        source_height=height,
        mean_dbfs=mean_dbfs if math.isfinite(mean_dbfs) else None,
        sound_seconds=found.sound_within(begin, begin + spec.duration),
        has_audio=fault is None,
    )
    # Silence, not the source's further sound: the duration token says where the sound ends.
    padding = (spec.padded_latents - spec.num_latents) * spec.hop
    audio = np.pad(audio, ((0, padding), (0, 0)))
    return Cut(frames, audio, facts)


def _check_sound(
    audio: np.ndarray, mean_dbfs: float, begin: float, spec: CutSpec
) -> Rejected | None:
    """Why the cut's sound cannot be used, if it cannot."""
    if mean_dbfs < spec.silence_dbfs:
        return Rejected("silent", f"{mean_dbfs:.1f} dBFS over the cut at {begin:.3f} s")
    zeros = digital_silence(audio)
    if zeros > spec.max_digital_silence:
        return Rejected("digital_silence", f"{zeros:.1%} of the cut's sound is exact zeros")
    return None


def choose_t0(found: Probe, spec: CutSpec, t0: float | None) -> float:
    """Where the cut begins; Rejected("too_short") if more than one target frame is missing."""
    if t0 is None:
        t0 = _centre(found, spec)
    last_start = found.end - (spec.frames - 1) / spec.fps + TOLERANCE
    if t0 < found.start - TOLERANCE or t0 > last_start:
        raise Rejected(
            "too_short",
            f"{found.duration:.3f} s of picture from {found.start:.3f} s; the cut needs "
            f"{spec.duration:.3f} s (less one frame at most) from {t0:.3f} s",
        )
    return t0


def _shifted(found: Probe, spec: CutSpec, t0: float, offset: int) -> float:
    """Start of a further cut: `offsets` starts, evenly around the clip from t0 on.

    Rejected("no_room") where two of them would begin within half a second.
    """
    room = found.end - spec.duration - found.start
    step = room / spec.offsets
    if step < CLOSEST:
        raise Rejected(
            "no_room",
            f"{max(0.0, room):.3f} s of room hold no {spec.offsets} cuts {CLOSEST} s apart",
        )
    begin = found.start + (t0 - found.start + offset * step) % room
    return float(found.times[found.times <= begin + 0.5 / found.fps][-1])  # on a picture


def _centre(found: Probe, spec: CutSpec) -> float:
    """The window in the middle of the clip (picture and sound), moved to lie in the picture.

    It begins on a picture, so that a source at the target rate is copied one to one.
    """
    middle = (min(found.start, found.sound_start) + max(found.end, found.sound_end)) / 2
    begin = min(middle - spec.duration / 2, found.end - spec.duration)
    half = 0.5 / found.fps if found.fps else 0.0  # one picture of no length has no rate
    fits = found.times[found.times <= max(begin, found.start) + half]
    return float(fits[np.argmin(np.abs(fits - begin))])
