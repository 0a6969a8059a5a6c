"""The built-in world: small clips with picture, sound, two captions and ground truth.

A clip is a pure function of (seed, index). Three of four clips are tight (balls of one material in
a box; each impact is heard when and where it is seen), the fourth is loose (rain, wind, drifting
clouds with sound that belongs to no single event). `python -m playground.world` writes them as mp4
files with a manifest, so that they enter through the same door as any user's clips.
"""

from typing import NamedTuple

import numpy as np

from playground.world import drawing, impacts, wording
from playground.world.physics import FPS, MOTION_NAMES, Event, Motion, draw_bodies, simulate

MATERIALS = tuple(impacts.MODES)
COLOURS = tuple(drawing.COLOURS)
SCENES = tuple(drawing.AMBIENT)
LOOSE_SHARE = 0.25
__all__ = ["COLOURS", "FPS", "MATERIALS", "SCENES", "Clip", "ClipFacts", "describe", "make_clip"]


class ClipFacts(NamedTuple):
    """Everything about a clip but picture and sound. Loose clips have no balls and no events."""

    id: str
    clip_class: str  # "tight" or "loose"
    scene: str  # backdrop name, or "rain" / "wind" / "clouds"
    material: str  # "" in loose clips
    colours: tuple[str, ...]
    radii: tuple[float, ...]
    motion: str
    events: list[Event]
    video_caption: str
    audio_caption: str


class Clip(NamedTuple):
    facts: ClipFacts
    frames: np.ndarray  # (72,128,192,3) uint8 at 24 fps
    audio: np.ndarray  # (144000,2) float32 at 48 kHz
    positions: np.ndarray  # (72,N,2) ball centres in pixels; N = 0 in loose clips
    energy: np.ndarray  # (72,)


def _stream(seed: int, index: int, name: str) -> np.random.Generator:
    """One generator per purpose, so that a new draw in one never moves another."""
    return np.random.default_rng([seed, index, *name.encode()])


def _is_loose(seed: int, index: int) -> bool:
    return bool(_stream(seed, index, "class").uniform() < LOOSE_SHARE)


def _describe_loose(seed: int, index: int) -> tuple[ClipFacts, float]:
    rng = _stream(seed, index, "scene")
    scene = SCENES[int(rng.integers(len(SCENES)))]
    # two separate levels, so that the words "light" and "heavy" are never a matter of taste
    strength = float(rng.uniform(0.0, 0.3) + 0.7 * rng.integers(2))
    video, audio = wording.ambient(_stream(seed, index, "caption"), scene, strength)
    name = f"playground-{seed}-{index:06d}"
    return ClipFacts(name, "loose", scene, "", (), (), "", [], video, audio), strength


def _describe_tight(seed: int, index: int) -> tuple[ClipFacts, list, Motion]:
    rng = _stream(seed, index, "scene")
    material = MATERIALS[int(rng.integers(len(MATERIALS)))]
    count = int(rng.integers(1, 4))
    colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))[:count]]
    motion = MOTION_NAMES[int(rng.integers(len(MOTION_NAMES)))]
    scene = list(drawing.BACKDROPS)[int(rng.integers(len(drawing.BACKDROPS)))]
    bodies = draw_bodies(rng, colours, material, motion)
    run = simulate(bodies, material)
    words = _stream(seed, index, "caption")
    video = wording.balls_video(words, colours, material, motion, scene)
    audio = wording.balls_audio(
        words, material, [impacts.loudness(event, material) for event in run.events]
    )
    radii = tuple(body.radius for body in bodies)
    name = f"playground-{seed}-{index:06d}"
    facts = ClipFacts(
        name, "tight", scene, material, tuple(colours), radii, motion, run.events, video, audio
    )
    return facts, bodies, run


def describe(seed: int, index: int) -> ClipFacts:
    """Captions and ground truth without drawing or synthesising anything (about 10 ms)."""
    return _describe_loose(seed, index)[0] if _is_loose(seed, index) else (
        _describe_tight(seed, index)[0]
    )


def make_clip(seed: int, index: int) -> Clip:
    """The whole clip: 3 s, 192 x 128 at 24 fps, stereo sound at 48 kHz."""
    noise = _stream(seed, index, "noise")
    if _is_loose(seed, index):
        facts, strength = _describe_loose(seed, index)
        frames = drawing.AMBIENT[facts.scene](_stream(seed, index, "draw"), strength)
        audio = impacts.AMBIENT[facts.scene](noise, strength)
        positions = np.zeros((drawing.FRAMES, 0, 2))
        return Clip(facts, drawing.to_uint8(frames), audio, positions, np.zeros(drawing.FRAMES))
    facts, bodies, run = _describe_tight(seed, index)
    frames = drawing.draw_balls(facts.scene, bodies, facts.material, run.positions)
    audio = impacts.impacts(run.events, list(facts.radii), facts.material, noise)
    return Clip(facts, drawing.to_uint8(frames), audio, run.positions, run.energy)
