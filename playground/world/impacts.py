"""How the world sounds: impacts as damped modes of their material, and ambient noise.

Tight class: an impact of impulse J at x starts the modes of its material at that very sample, with
loudness from J and an equal-power stereo pan from x. Loose class: rain, wind and birds are noise
processes that are not tied to anything visible.
"""

import numpy as np

from playground.world.physics import SECONDS, WIDTH, Event

SAMPLE_RATE = 48_000
SAMPLES = round(SAMPLE_RATE * SECONDS)
# material: (mode frequencies Hz, mode gains, decay time constant s of the first mode, click gain)
MODES = {
    "rubber": ((130.0, 260.0, 410.0), (1.0, 0.45, 0.2), 0.045, 0.10),
    "wood": ((520.0, 1240.0, 2150.0), (1.0, 0.6, 0.35), 0.035, 0.20),
    "metal": ((860.0, 2130.0, 3620.0, 5480.0), (0.8, 1.0, 0.7, 0.4), 0.28, 0.25),
    "glass": ((2450.0, 4320.0, 6610.0), (1.0, 0.7, 0.45), 0.085, 0.25),
}
REFERENCE_IMPULSE = {"rubber": 700.0, "wood": 500.0, "metal": 2000.0, "glass": 1350.0}
QUIETEST, LOUDEST = 0.10, 0.75


def loudness(event: Event, material: str) -> float:
    """Peak amplitude of one impact, 0.10 to 0.75, growing with its impulse."""
    relative = event.impulse / REFERENCE_IMPULSE[material]
    return float(np.clip(LOUDEST * relative, QUIETEST, LOUDEST))


def strike(material: str, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Unit-peak impulse response (n,) of one ball; a larger ball sounds lower."""
    frequencies, gains, decay, click = MODES[material]
    time = np.arange(round(SAMPLE_RATE * min(6 * decay, 1.2))) / SAMPLE_RATE
    pitch = 15.5 / radius
    sound = np.zeros_like(time)
    for order, (frequency, gain) in enumerate(zip(frequencies, gains, strict=True)):
        envelope = np.exp(-time * (1 + 0.5 * order) / decay)
        sound += gain * envelope * np.sin(2 * np.pi * frequency * pitch * time + 0.5)
    sound += click * rng.standard_normal(time.size) * np.exp(-time / 0.0015)
    sound[-240:] *= np.linspace(1, 0, 240)  # 5 ms: no second click where the tail ends
    return sound / np.abs(sound).max()


def pan(x: float) -> np.ndarray:
    """Equal-power gains (left, right) for a horizontal position in pixels."""
    angle = 0.5 * np.pi * np.clip(x / WIDTH, 0.0, 1.0)
    return np.array([np.cos(angle), np.sin(angle)])


def impacts(
    events: list[Event], radii: list[float], material: str, rng: np.random.Generator
) -> np.ndarray:
    """Stereo sound (N,2) of the event list; a pair of balls sounds as its first ball."""
    responses = [strike(material, radius, rng) for radius in radii]
    sound = np.zeros((SAMPLES, 2))
    for event in events:
        start = round(event.time * SAMPLE_RATE)
        response = responses[event.bodies[0]][: SAMPLES - start]
        gains = loudness(event, material) * pan(event.x)
        sound[start:start + response.size] += response[:, None] * gains
    sound += 3e-4 * rng.standard_normal(sound.shape)  # a room is never digitally silent
    return np.tanh(sound).astype(np.float32)


def _coloured_noise(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Unit-rms noise (N,2) between `low` and `high` Hz with soft edges, independent channels."""
    spectrum = np.fft.rfft(rng.standard_normal((SAMPLES, 2)), axis=0)
    frequency = np.fft.rfftfreq(SAMPLES, 1 / SAMPLE_RATE)[:, None]
    shape = 1 / (1 + (low / np.maximum(frequency, 1)) ** 4) / (1 + (frequency / high) ** 4)
    noise = np.fft.irfft(spectrum * shape, SAMPLES, axis=0)
    return noise / noise.std()


def _slow(rng: np.random.Generator, hertz: float) -> np.ndarray:
    """Smooth random curve (N,1) in [0,1] that changes about `hertz` times a second."""
    knots = rng.uniform(0, 1, round(SECONDS * hertz) + 3)
    position = np.linspace(0, knots.size - 1.001, SAMPLES)
    left = position.astype(int)
    blend = 0.5 - 0.5 * np.cos(np.pi * (position - left))
    return (knots[left] * (1 - blend) + knots[left + 1] * blend)[:, None]


def rain(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Hiss plus a dense patter of drops; `strength` in [0,1]."""
    sound = (0.02 + 0.05 * strength) * _coloured_noise(rng, 1200, 6000)
    drop = np.exp(-np.arange(360) / 70.0) * np.sin(np.arange(360) * 2 * np.pi * 2600 / SAMPLE_RATE)
    for start in rng.integers(0, SAMPLES - 360, round(60 + 240 * strength)):
        gain = rng.uniform(0.02, 0.16)
        sound[start:start + 360] += gain * drop[:, None] * pan(rng.uniform(0, WIDTH))
    return np.tanh(sound).astype(np.float32)


def wind(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Low gusts of noise with a whistling band."""
    gust = 0.35 + 0.65 * _slow(rng, 1.2)
    low = _coloured_noise(rng, 90, 420)
    whistle = _coloured_noise(rng, 700, 900)
    sound = (0.07 + 0.13 * strength) * gust * (low + 0.35 * gust * whistle)
    return np.tanh(sound).astype(np.float32)


def birds(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Chirps over a faint breeze; `strength` sets how many."""
    sound = 0.012 * _coloured_noise(rng, 120, 700)
    for start in rng.integers(0, SAMPLES - 9600, round(3 + 7 * strength)):
        time = np.arange(round(rng.uniform(0.08, 0.18) * SAMPLE_RATE)) / SAMPLE_RATE
        sweep = rng.uniform(2200, 4200) + rng.uniform(-6000, 6000) * time
        envelope = np.sin(np.pi * time / time[-1]) ** 2
        chirp = rng.uniform(0.08, 0.25) * envelope * np.sin(2 * np.pi * sweep * time)
        sound[start:start + time.size] += chirp[:, None] * pan(rng.uniform(0, WIDTH))
    return np.tanh(sound).astype(np.float32)


AMBIENT = {"rain": rain, "wind": wind, "clouds": birds}
