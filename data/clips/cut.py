"""What every clip is cut to (`CutSpec`), what comes out (`Cut`) and what was found (`Facts`)."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


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
    keep_silent: bool = False  # clips without usable sound stay, marked; else they are rejected
    offsets: int = 1  # cuts per clip, spread over its length; the first is the record's t0
    crops: int = 1  # places of the crop per cut, from one end of what is cropped to the other

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
    def views(self) -> int:
        """Samples made of one clip."""
        return self.offsets * self.crops

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
    mean_dbfs: float | None  # over the cut; None without any sound
    sound_seconds: float  # of the cut that the source has sound for
    has_audio: bool  # False: no stream, or silent and kept all the same


@dataclass(frozen=True)
class Cut:
    """One decoded cut."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    audio: np.ndarray  # (N, 2) float32, zero where there is no sound
    facts: Facts
