"""One cut of a clip: exactly `frames` pictures and the sound from the same instant t0.

Pictures are chosen by presentation time (the one a player shows at t0 + k/fps), sound is placed
by its time stamps and cut to whole audio latents (backbones.md 7). Files are judged by what can
be decoded, never by their header. Called by `data.prepare`, one clip at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation

from data.probe import Probe, Rejected, open_media, probe

TOLERANCE = 0.002  # seconds; containers round time stamps to 1 ms
PREROLL = 0.5  # seconds of sound decoded before the cut: codecs need what came before
MARGIN = 0.05  # seconds of sound kept around the cut for the resampling filter
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class CutSpec:
    """What every clip of a data set is cut to, and what makes a source unfit for it."""

    fps: float = 24.0
    frames: int = 49  # 4k+1; "2 s"
    height: int = 192
    width: int = 320
    sample_rate: int = 44100
    hop: int = 2048  # samples per audio latent
    min_source_fps: float = 12.0
    silence_dbfs: float = -60.0  # mean volume over the cut
    audio_pad_seconds: float = 0.0  # zeros after the cut's sound up to here; TangoFlux saw 30 s
    max_length_mismatch: float = 1.0  # seconds between the ends of picture and sound
    max_digital_silence: float = 1.0  # share of exact zeros in the cut; 1: synthetic sound has many

    @property
    def duration(self) -> float:
        """Seconds, frames / fps."""
        return self.frames / self.fps

    @property
    def num_latents(self) -> int:
        """Audio latents that cover the pictures: ceil(frames/fps * sample_rate/hop)."""
        return math.ceil(Fraction(self.frames) / Fraction(self.fps) * self.sample_rate / self.hop)

    @property
    def num_samples(self) -> int:
        return self.num_latents * self.hop

    @property
    def padded_latents(self) -> int:
        """Audio latents as stored, whole ones: 30 s are the 645 that TangoFlux was trained on."""
        padded = math.floor(Fraction(self.audio_pad_seconds) * self.sample_rate / self.hop)
        return max(self.num_latents, padded)


@dataclass(frozen=True)
class Facts:
    """What was found out about the source and the cut."""

    t0: float  # seconds from the clip's start
    source_fps: float
    source_seconds: float
    source_width: int  # as shown: after rotation and pixel aspect
    source_height: int
    mean_dbfs: float  # over the cut


@dataclass(frozen=True)
class Cut:
    """One decoded cut."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    audio: np.ndarray  # (N, 2) float32, zero where the source or the cut has ended
    facts: Facts


def read_cut(path: str | Path, spec: CutSpec, t0: float | None = None) -> Cut:
    """Decode one cut; t0 in seconds from the clip's start, the centre window by default.

    Raises Rejected with the first of `data.probe.REASONS` that applies.
    """
    found = probe(path)
    begin = choose_t0(found, spec, t0)
    if found.fps < spec.min_source_fps - 1e-3:
        raise Rejected("low_fps", f"{found.fps:.3f} fps, below {spec.min_source_fps:g}")
    if found.length_mismatch > spec.max_length_mismatch:
        raise Rejected(
            "length_mismatch",
            f"picture from {found.start:.3f} to {found.end:.3f} s, sound from "
            f"{found.sound_start:.3f} to {found.sound_end:.3f} s",
        )
    try:
        frames, (height, width) = _read_frames(path, found, begin, spec)
        audio = _read_audio(path, found, begin, spec)
    except (av.FFmpegError, ValueError) as error:  # PyAV refuses odd formats with a ValueError
        raise Rejected("undecodable", f"decoder: {error}") from error
    mean_dbfs = mean_volume(audio)
    if mean_dbfs < spec.silence_dbfs:
        raise Rejected("silent", f"{mean_dbfs:.1f} dBFS over the cut at {begin:.3f} s")
    zeros = digital_silence(audio)
    if zeros > spec.max_digital_silence:
        raise Rejected("digital_silence", f"{zeros:.1%} of the cut's sound is exact zeros")
    facts = Facts(begin, found.fps, found.duration, width, height, mean_dbfs)
    # Silence, not the source's further sound: the duration token says where the sound ends.
    padding = (spec.padded_latents - spec.num_latents) * spec.hop
    audio = np.pad(audio, ((0, padding), (0, 0)))
    return Cut(frames, audio, facts)


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


def _centre(found: Probe, spec: CutSpec) -> float:
    """The window in the middle of the clip (picture and sound), moved to lie in the picture.

    It begins on a picture, so that a source at the target rate is copied one to one.
    """
    middle = (min(found.start, found.sound_start) + max(found.end, found.sound_end)) / 2
    begin = min(middle - spec.duration / 2, found.end - spec.duration)
    fits = found.times[found.times <= max(begin, found.start) + 0.5 / found.fps]
    return float(fits[np.argmin(np.abs(fits - begin))])


def mean_volume(audio: np.ndarray) -> float:
    """Mean volume of (N, 2) samples in dB of full scale; -inf for digital silence."""
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    return 10 * math.log10(power) if power > 0 else -math.inf


def digital_silence(audio: np.ndarray) -> float:
    """Share of (N, 2) samples that are exact zeros in both channels: sound that is not there."""
    return float(np.mean(np.all(audio == 0, axis=1)))


def _read_frames(
    path: str | Path, found: Probe, t0: float, spec: CutSpec
) -> tuple[np.ndarray, tuple[int, int]]:
    """((T, H, W, 3) uint8, (height, width) as shown): at t0 + k/fps the picture then on screen."""
    wanted = t0 + np.arange(spec.frames) / spec.fps
    images: list[np.ndarray] = []
    previous, until, size = None, -math.inf, (0, 0)
    for time, frame in _frames_from(path, found, found.video_index, t0):
        if previous is None:
            size = _check_landscape(frame, found.pixel_aspect)
        due = int(np.searchsorted(wanted, time - TOLERANCE))  # pictures due before this one
        if previous is not None and due > len(images):
            images.extend([_resize(previous, found.pixel_aspect, spec)] * (due - len(images)))
        if due == spec.frames:
            break
        previous = frame
        until = time + (float((frame.duration or 0) * frame.time_base) or 1 / found.fps)
    missing = spec.frames - len(images)
    # Past its own end the last picture may stand in for one target frame, no more.
    if missing and (previous is None or wanted[-1] > until + 1 / spec.fps + TOLERANCE):
        raise Rejected("undecodable", f"only {len(images)} of {spec.frames} pictures decode")
    if missing:
        images.extend([_resize(previous, found.pixel_aspect, spec)] * missing)
    return np.stack(images), size


def _check_landscape(frame: Any, pixel_aspect: float) -> tuple[int, int]:
    """(height, width) as shown; Rejected("portrait") if it is higher than wide."""
    height, width = display_size(frame, pixel_aspect)
    if height > width:
        raise Rejected("portrait", f"{width}x{height} (width x height) as shown")
    return height, width


def _read_audio(path: str | Path, found: Probe, t0: float, spec: CutSpec) -> np.ndarray:
    """(N, 2) float32: N = num_samples at the target rate from t0, zero where there is no sound."""
    frames = _frames_from(path, found, found.audio_index, t0, PREROLL)
    samples, rate = _place_audio(frames, t0, spec)  # (2, n) from t0 - MARGIN
    if rate != spec.sample_rate:
        samples = _resample(samples, rate, spec.sample_rate)
    first = round(MARGIN * spec.sample_rate)
    samples = samples[:, first : first + spec.num_samples]
    samples = np.pad(samples, ((0, 0), (0, spec.num_samples - samples.shape[1])))
    return np.ascontiguousarray(samples.T, dtype=np.float32)  # (N, 2)


def _place_audio(
    frames: Iterator[tuple[float, Any]], t0: float, spec: CutSpec
) -> tuple[np.ndarray, int]:
    """((2, n) samples at the source's rate from t0 - MARGIN on, that rate)."""
    track, rate, expected = np.zeros((2, 0), np.float32), spec.sample_rate, math.nan
    seconds = spec.num_samples / spec.sample_rate + 2 * MARGIN
    for time, frame in frames:
        if math.isnan(expected):
            rate = frame.sample_rate
            track = np.zeros((2, math.ceil(seconds * rate)), np.float32)
        if frame.sample_rate != rate:
            raise Rejected("undecodable", f"sound changes from {rate} to {frame.sample_rate} Hz")
        # Rounded time stamps must not tear the sound apart; a real gap must.
        position = (time - t0 + MARGIN) * rate
        if not abs(position - expected) <= TOLERANCE * rate:
            expected = round(position)
        samples = _to_stereo(frame)  # (2, n)
        begin, skip = max(0, int(expected)), max(0, -int(expected))
        part = samples[:, skip : skip + max(0, track.shape[1] - begin)]
        track[:, begin : begin + part.shape[1]] = part
        expected += samples.shape[1]
        if expected >= track.shape[1]:
            break
    return track, rate


def _to_stereo(frame: Any) -> np.ndarray:
    """(2, n) float32: mono duplicated at full level, more channels mixed down without clipping."""
    if frame.layout.nb_channels == 1:
        mixer = av.AudioResampler("fltp", frame.layout)
    else:
        mixer = av.AudioResampler("fltp", "stereo", options={"rematrix_maxval": "1.0"})
    samples = np.concatenate([block.to_ndarray() for block in mixer.resample(frame)], axis=1)
    return np.broadcast_to(samples, (2, samples.shape[1]))


def _resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """(2, n) at `rate` -> (2, about n * target / rate); sample 0 stays where it is."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", "stereo")
    frame.sample_rate = rate
    resampler = av.AudioResampler("fltp", "stereo", target, options={"filter_size": "64"})
    blocks = resampler.resample(frame) + resampler.resample(None)
    return np.concatenate([block.to_ndarray() for block in blocks], axis=1)


def _frames_from(
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


def display_size(frame: Any, pixel_aspect: float) -> tuple[int, int]:
    """(height, width) as shown: pixel aspect and rotation applied."""
    height, width = frame.height, max(1, round(frame.width * pixel_aspect))
    return (width, height) if round(frame.rotation / 90) % 2 else (height, width)


def _resize(frame: Any, pixel_aspect: float, spec: CutSpec) -> np.ndarray:
    """(H, W, 3) uint8: scaled (antialiased) to cover, rotated upright, centre-cropped."""
    height, width = spec.height, spec.width
    shown_height, shown_width = display_size(frame, pixel_aspect)
    scale = max(height / shown_height, width / shown_width)
    size = max(height, round(shown_height * scale)), max(width, round(shown_width * scale))
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
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])
