"""The pictures of one cut: chosen by presentation time, upright, scaled to cover and cropped."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from av.video.reformatter import Colorspace, Interpolation

from data.clips.cut import CutSpec
from data.clips.probe import Probe
from data.clips.streams import TOLERANCE, frames_from
from data.reasons import Rejected

CLOSEST = 0.1  # of the picture, between two crops of one cut
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def read_frames(
    path: str | Path, found: Probe, t0: float, spec: CutSpec, crop: int = 0
) -> tuple[np.ndarray, tuple[int, int]]:
    """((T, H, W, 3) uint8, (height, width) as shown): at t0 + k/fps the picture then on screen.

    `crop` counts the spec's crops; Rejected("no_room") where a further one would show the same.
    """
    share = crop / (spec.crops - 1) if spec.crops > 1 else 0.5  # of what is cut off, before it
    wanted = t0 + np.arange(spec.frames) / spec.fps
    images: list[np.ndarray] = []
    previous, until, size = None, -math.inf, (0, 0)
    for time, frame in frames_from(path, found, found.video_index, t0):
        if previous is None:
            size = _check_landscape(frame, found.pixel_aspect)
            if crop:
                _check_room(size, spec)
        due = int(np.searchsorted(wanted, time - TOLERANCE))  # pictures due before this one
        if previous is not None and due > len(images):
            image = _resize(previous, found.pixel_aspect, spec, share)
            images.extend([image] * (due - len(images)))
        if due == spec.frames:
            break
        previous = frame
        until = time + (float((frame.duration or 0) * frame.time_base) or 1 / found.fps)
    missing = spec.frames - len(images)
    # Past its own end the last picture may stand in for one target frame, no more.
    if missing and (previous is None or wanted[-1] > until + 1 / spec.fps + TOLERANCE):
        raise Rejected("undecodable", f"only {len(images)} of {spec.frames} pictures decode")
    if missing:
        images.extend([_resize(previous, found.pixel_aspect, spec, share)] * missing)
    return np.stack(images), size


def _check_landscape(frame: Any, pixel_aspect: float) -> tuple[int, int]:
    """(height, width) as shown; Rejected("portrait") if it is higher than wide."""
    height, width = display_size(frame, pixel_aspect)
    if height > width:
        raise Rejected("portrait", f"{width}x{height} (width x height) as shown")
    return height, width


def display_size(frame: Any, pixel_aspect: float) -> tuple[int, int]:
    """(height, width) as shown: pixel aspect and rotation applied."""
    height, width = frame.height, max(1, round(frame.width * pixel_aspect))
    return (width, height) if round(frame.rotation / 90) % 2 else (height, width)


def _check_room(size: tuple[int, int], spec: CutSpec) -> None:
    """Rejected("no_room") unless the crops differ by CLOSEST of the picture at least."""
    height, width = _cover(size, spec)
    room = max((height - spec.height) / spec.height, (width - spec.width) / spec.width)
    if room < CLOSEST * (spec.crops - 1):
        raise Rejected("no_room", f"{room:.1%} is cropped; too little for {spec.crops} crops")


def _cover(size: tuple[int, int], spec: CutSpec) -> tuple[int, int]:
    """(height, width) of the shown picture scaled to cover the target."""
    scale = max(spec.height / size[0], spec.width / size[1])
    return max(spec.height, round(size[0] * scale)), max(spec.width, round(size[1] * scale))


def _resize(frame: Any, pixel_aspect: float, spec: CutSpec, share: float) -> np.ndarray:
    """(H, W, 3) uint8: scaled (antialiased) to cover, rotated upright, cropped.

    `share` of what is cut off lies above or left of the crop.
    """
    height, width = spec.height, spec.width
    size = _cover(display_size(frame, pixel_aspect), spec)
    turns = round(frame.rotation / 90) % 4
    coded = size[::-1] if turns % 2 else size
    # High-definition video that does not say so is BT.709; ffmpeg would take BT.601.
    untagged_hd = frame.colorspace == UNSPECIFIED and frame.height >= 720
    scaled = frame.reformat(
        height=coded[0],
        width=coded[1],
        format="rgb24",
        interpolation=SCALING,
        src_colorspace=Colorspace.ITU709 if untagged_hd else None,
    )
    image = np.rot90(scaled.to_ndarray(), turns)  # counter-clockwise, as the tag is meant
    top, left = int((size[0] - height) * share), int((size[1] - width) * share)
    return np.ascontiguousarray(image[top : top + height, left : left + width])
