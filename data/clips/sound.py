"""The sound of one cut: placed by its time stamps, stereo, at the target rate, from t0 on."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from data.clips.cut import CutSpec
from data.clips.probe import Probe
from data.clips.streams import TOLERANCE, frames_from
from data.reasons import Rejected

PREROLL = 0.5  # seconds of sound decoded before the cut: codecs need what came before
MARGIN = 0.05  # seconds of sound kept around the cut for the resampling filter


def mean_volume(audio: np.ndarray) -> float:
    """Mean volume of (N, 2) samples in dB of full scale; -inf for digital silence."""
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    return 10 * math.log10(power) if power > 0 else -math.inf


def digital_silence(audio: np.ndarray) -> float:
    """Share of (N, 2) samples that are exact zeros in both channels: sound that is not there."""
    return float(np.mean(np.all(audio == 0, axis=1)))


def read_audio(path: str | Path, found: Probe, t0: float, spec: CutSpec) -> np.ndarray:
    """(N, 2) float32: N = num_samples at the target rate from t0, zero where there is no sound."""
    if found.audio_index is None:
        return np.zeros((spec.num_samples, 2), np.float32)
    frames = frames_from(path, found, found.audio_index, t0, PREROLL)
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
