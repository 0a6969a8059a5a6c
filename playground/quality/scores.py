"""How good the tiny backbones are: each metric as one function, used by `measure` and by the tests.

PSNR and ball centres of the video VAE, impact onsets of the audio VAE, linear probes of the text
encoders, and for both towers whether the right caption beats another clip's.
"""

from typing import NamedTuple

import numpy as np
import torch

from playground.backbones.audio_vae import WINDOW_START
from playground.backbones.clips import SAMPLE_RATE
from playground.world.clip import COLOURS, ClipFacts
from playground.world.drawing import COLOURS as RGB
from playground.world.impacts import loudness

MISSED_PIXELS = 20.0  # the error counted for a ball that is gone from the decoded picture
SEARCH_SECONDS = 0.060
ALONE_SECONDS = 0.080  # an impact is measured if no other sounds this close to it
CLEAR_LOUDNESS = 0.2


def psnr(decoded: np.ndarray, source: np.ndarray) -> float:
    """dB over all pixels; uint8 arrays of equal shape."""
    error = np.square(decoded.astype(np.float32) - source.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def colour_mass(frames: np.ndarray, colour: str) -> np.ndarray:
    """How much each pixel (T,H,W) is of this hue: its saturation where the hue is within 28 deg.

    The six ball colours are some 60 degrees apart, and walls, floor and wood grain (which only
    darkens) have no hue of their own.
    """
    rgb = frames.astype(np.float32) / 255  # (T,H,W,3)
    chroma = rgb.max(-1) - rgb.min(-1)
    plane = np.array([[1, -0.5, -0.5], [0, 3**0.5 / 2, -(3**0.5) / 2]], dtype=np.float32)
    hue = rgb @ plane.T  # (T,H,W,2)
    own = plane @ np.array(RGB[colour], dtype=np.float32)
    cosine = (hue @ own) / (np.linalg.norm(hue, axis=-1) * np.linalg.norm(own) + 1e-6)
    return np.where((cosine > np.cos(np.deg2rad(28))) & (chroma > 0.22), chroma, 0.0)


def centres(frames: np.ndarray, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Centre of mass (T,2) in pixels x, y of one colour, and its mass (T,)."""
    weight = colour_mass(frames, colour)
    mass = weight.sum(axis=(1, 2))
    y, x = np.mgrid[: weight.shape[1], : weight.shape[2]] + 0.5
    middle = np.stack([(weight * x).sum((1, 2)), (weight * y).sum((1, 2))], axis=1)
    return middle / np.maximum(mass, 1e-6)[:, None], mass


def centre_errors(decoded: np.ndarray, source: np.ndarray, facts: ClipFacts) -> np.ndarray:
    """Distance in pixels, decoded to source, for every ball and frame it is visible in."""
    errors = []
    for colour in facts.colours:
        ours, our_mass = centres(decoded, colour)
        theirs, their_mass = centres(source, colour)
        distance = np.linalg.norm(ours - theirs, axis=1)
        distance[our_mass < 0.25 * their_mass] = MISSED_PIXELS
        errors.append(distance[their_mass > 8])  # of 60 or more: not hidden by another ball
    return np.concatenate(errors) if errors else np.zeros(0)


def onset_curve(wave: np.ndarray) -> np.ndarray:
    """Rise of loudness per millisecond of a stereo wave (2,N): index = milliseconds.

    Energy in 8 ms Hann windows, log with a floor at the level of the quietest impacts, then the
    difference over 4 ms.
    """
    step, length = SAMPLE_RATE // 1000, 8 * SAMPLE_RATE // 1000
    window = np.hanning(length)
    energy = np.convolve(np.square(wave).sum(0), window / window.sum(), mode="same")[::step]
    level = 10 * np.log10(energy + 1e-5)
    rise = np.zeros_like(level)
    rise[2:-2] = level[4:] - level[:-4]
    return rise


def clear_events(facts: ClipFacts, samples: int) -> list[float]:
    """Times (s, in the window) of impacts that are loud enough and alone enough to be timed."""
    start = WINDOW_START / SAMPLE_RATE
    times = np.array([event.time for event in facts.events])
    found = []
    for event in facts.events:
        alone = (np.abs(times - event.time) < ALONE_SECONDS).sum() == 1
        time = event.time - start
        inside = SEARCH_SECONDS < time < samples / SAMPLE_RATE - SEARCH_SECONDS
        if alone and inside and loudness(event, facts.material) >= CLEAR_LOUDNESS:
            found.append(float(time))
    return found


def onset_errors(decoded: np.ndarray, source: np.ndarray, facts: ClipFacts) -> np.ndarray:
    """|time of the strongest rise near each clear impact|, decoded minus source, milliseconds."""
    curves = [onset_curve(wave) for wave in (decoded, source)]
    reach = round(1000 * SEARCH_SECONDS)
    errors = []
    for time in clear_events(facts, source.shape[1]):
        middle = round(1000 * time)
        near = [curve[middle - reach:middle + reach] for curve in curves]
        errors.append(abs(int(near[0].argmax()) - int(near[1].argmax())))
    return np.array(errors, dtype=float)


def probe(
    train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor
) -> torch.Tensor:
    """Whether a ridge-regression classifier names each test row's class: (M,) bool.

    x (N,D) states, y (N,) integer classes.
    """
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    ones = torch.ones(len(train_x), 1)
    a = torch.cat([(train_x - mean) / std, ones], 1).double()
    b = torch.cat([(test_x - mean) / std, torch.ones(len(test_x), 1)], 1).double()
    target = torch.nn.functional.one_hot(train_y).double()
    weights = torch.linalg.solve(a.T @ a + torch.eye(a.shape[1]), a.T @ target)
    return (b @ weights).argmax(1) == test_y


class CaptionGain(NamedTuple):
    """Mean flow loss with the right captions, with another clip's, and how often right wins."""

    right: float
    shuffled: float
    wins: float


def colour_set_right(rights: list[torch.Tensor]) -> float:
    """Share of captions whose whole set of colours was named right."""
    return float(torch.stack(rights[: len(COLOURS)]).all(0).float().mean())
