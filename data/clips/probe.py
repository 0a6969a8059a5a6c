"""What a media file holds, from its packets: streams, presentation times, rates. No decoding.

The header is not believed: a truncated file states its full duration, a streamed webm none at
all, a variable frame rate has no single number. Every time here is in seconds from the earliest
sample of the container (as players count), edit lists applied. Called by `data.clips.decode`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from data.reasons import Rejected

Span = tuple[float, float]  # (begin, length) in seconds


@dataclass(frozen=True)
class Probe:
    """One file's chosen streams and the times of its pictures."""

    video_index: int
    audio_index: int | None  # None: no sound, where that is allowed
    origin: float  # container time, in seconds, that counts as 0
    pixel_aspect: float  # width of a pixel over its height
    times: np.ndarray  # (frames,) presentation times, sorted
    end: float  # when the last picture has been shown
    sound_start: float  # the picture's, where there is no sound
    sound_end: float

    @property
    def start(self) -> float:
        return float(self.times[0])

    @property
    def duration(self) -> float:
        """Seconds of picture that can be read, whatever the header says."""
        return self.end - self.start

    @property
    def length_mismatch(self) -> float:
        """Seconds by which picture and sound begin or end apart, the larger of the two."""
        return max(abs(self.start - self.sound_start), abs(self.end - self.sound_end))

    def sound_within(self, begin: float, end: float) -> float:
        """Seconds of [begin, end] that the sound stream covers."""
        if self.audio_index is None:
            return 0.0
        return max(0.0, min(end, self.sound_end) - max(begin, self.sound_start))

    @property
    def fps(self) -> float:
        """Mean source frame rate over the whole stream."""
        if len(self.times) < 2:
            return 1.0 / self.duration if self.duration > 0 else 0.0
        return float((len(self.times) - 1) / (self.times[-1] - self.times[0]))


@contextmanager
def open_media(path: str | Path) -> Iterator[Any]:
    """The container, closed at the end; Rejected("undecodable") if it cannot be opened."""
    try:
        # Absolute: `a:b.mp4` alone would be read as the protocol `a`.
        container = av.open(str(Path(path).absolute()), metadata_errors="replace")
    except av.FFmpegError as error:
        raise Rejected("undecodable", f"cannot be opened: {error.strerror}") from error
    with container:
        yield container


def probe(path: str | Path, need_sound: bool = True) -> Probe:
    """Choose the streams and read all packet times; Rejected when there is nothing to decode."""
    with open_media(path) as container:
        video, audio = choose_video(container), choose_audio(container)
        pictures, sounds = _read_packets(container, video, audio)
        if not pictures:
            raise Rejected("undecodable", "the video stream holds no picture with a time stamp")
        if not sounds and need_sound:
            found = "no audio stream" if audio is None else "the audio stream is empty"
            raise Rejected("no_audio", found)
        origin = (container.start_time or 0) / av.time_base
        times = np.sort(np.array([begin for begin, _ in pictures])) - origin
        # Some containers leave packet durations out: the last picture then lasts a mean frame.
        mean_frame = (times[-1] - times[0]) / max(1, len(times) - 1)
        end = max(begin + (length or mean_frame) for begin, length in pictures) - origin
        return Probe(
            video_index=video.index,
            audio_index=audio.index if sounds else None,
            origin=origin,
            pixel_aspect=float(video.sample_aspect_ratio or 1),  # 0: the file does not say
            times=times,
            end=end,
            sound_start=min((b - origin for b, _ in sounds), default=float(times[0])),
            sound_end=max((b + length - origin for b, length in sounds), default=end),
        )


def choose_video(container: Any) -> Any:
    """The default, then the largest picture (ffmpeg's own choice), not counting cover art."""
    streams = [s for s in container.streams.video if not s.disposition & _ATTACHED]
    if not streams:
        raise Rejected("no_video", "no video stream")
    known = [s for s in streams if s.codec_context is not None]
    if not known:
        raise Rejected("undecodable", "no decoder for the video stream")
    return max(known, key=_video_rank)


def choose_audio(container: Any) -> Any:
    """The default, then the most channels, then the first."""
    streams = [s for s in container.streams.audio if s.codec_context is not None]
    return max(streams, key=_audio_rank, default=None)


_ATTACHED = av.stream.Disposition.attached_pic
_DEFAULT = av.stream.Disposition.default


def _video_rank(stream: Any) -> tuple:
    return bool(stream.disposition & _DEFAULT), stream.width * stream.height, -stream.index


def _audio_rank(stream: Any) -> tuple:
    return bool(stream.disposition & _DEFAULT), stream.channels, -stream.index


def _read_packets(container: Any, video: Any, audio: Any) -> tuple[list[Span], list[Span]]:
    """(begin, length) of every shown picture and of every sound packet, in container time."""
    pictures: list[Span] = []
    sounds: list[Span] = []
    streams = [video] if audio is None else [video, audio]
    packets = container.demux(streams)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return pictures, sounds
        except av.FFmpegError:  # the file ends inside a packet: what was read so far counts
            return pictures, sounds
        stamp = packet.pts if packet.pts is not None else packet.dts
        if not packet.size or stamp is None or packet.is_discard:  # discard: cut by an edit list
            continue
        span = float(stamp * packet.time_base), float((packet.duration or 0) * packet.time_base)
        (pictures if packet.stream_index == video.index else sounds).append(span)
