"""Does a sampled tight clip show what its caption asked for, and does it sound as it moves?

    python -m tools.sample RUN --prompts CLIPS/manifest.jsonl --split validation ...
    python -m playground.quality.recognise RUN/samples/step00001000_sampled

A tracker follows each ball colour through the decoded mp4. Judged are the set of colours and the
number of balls against the caption's clip, the acceleration of balls in free flight against the
world's gravity, and the lag between the impacts that are seen and heard, against the same clips
with their sounds exchanged. Colours are never repeated within a clip of this world.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data.clips.decode import CutSpec, read_cut
from playground.backbones.clips import FPS, HEIGHT, HOP, SAMPLE_RATE, WIDTH, WINDOW_FRAMES
from playground.quality.scores import centres, colour_mass, onset_curve
from playground.world.clip import COLOURS, ClipFacts, describe
from playground.world.physics import FLOOR, GRAVITY

BALL_MASS = 18.0  # chroma x pixels from which a colour is a ball: the smallest ball has about 60
BLOB_PIXELS = 10  # a smaller piece of colour is not a ball
RIM_SHARE = 1 / 3  # nor is one that touches a piece of another colour three times its size
SEEN_SHARE = 0.5  # of the frames in which a ball must be there
G = GRAVITY / 2 / FPS**2  # pixels of the 96 x 64 picture per frame^2: 0.451
FLIGHT = 3  # frames on either side of a measured acceleration
RATE = 100  # per second, of the curves of impacts
REACH = 0.3  # seconds of lag searched on either side
BLUR = 0.02  # seconds, the width of an impact in both curves
SHUFFLES = 2000


class Seen(NamedTuple):
    """What the tracker made of one clip; pixels of the 96 x 64 picture."""

    colours: tuple[str, ...]
    balls: int
    accelerations: np.ndarray  # per frame^2, downwards, one per measured moment of free flight
    impacts: np.ndarray  # strength of seen impacts, RATE per second


def look(frames: np.ndarray) -> Seen:
    """Track every colour through frames (T,64,96,3) uint8."""
    found, balls, accelerations = [], 0, [np.zeros(0)]
    strength = np.zeros(len(frames))
    masks = {colour: colour_mass(frames, colour) > 0 for colour in COLOURS}
    counts = [_count_balls({colour: mask[i] for colour, mask in masks.items()})
              for i in range(len(frames))]
    for colour, mask in masks.items():
        path, mass = centres(frames, colour)
        there = mass > BALL_MASS
        if there.mean() < SEEN_SHARE:
            continue
        found.append(colour)
        balls += round(float(np.median([counts[i][colour] for i in np.flatnonzero(there)])))
        radius = float(np.sqrt(np.median(mask.sum(axis=(1, 2))[there]) / np.pi))
        path = np.where(there[:, None], path, np.nan)
        accelerations.append(_free_flight(path, radius))
        strength += _jolts(path)
    return Seen(tuple(found), balls, np.concatenate(accelerations), _resample(strength))


def _count_balls(masks: dict[str, np.ndarray]) -> Counter[str]:
    """Colour -> balls in one picture: its pieces, less the rim or gleam on a ball of another."""
    whole, _ = ndimage.label(np.any(list(masks.values()), axis=0))
    pieces, largest = [], Counter[int]()
    for colour, mask in masks.items():
        labels, count = ndimage.label(mask)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        for label in range(1, count + 1):
            patch = int(whole[labels == label][0])  # all that touches, of any colour
            pieces.append((colour, sizes[label], patch))
            largest[patch] = max(largest[patch], int(sizes[label]))
    return Counter(colour for colour, size, patch in pieces
                   if size >= max(BLOB_PIXELS, RIM_SHARE * largest[patch]))


def _free_flight(path: np.ndarray, radius: float) -> np.ndarray:
    """Second differences of y (T,) where the ball is far from floor and walls for 2 FLIGHT + 1."""
    floor = HEIGHT - FLOOR / 2
    x, y = path[:, 0], path[:, 1]
    clear = 1.5 * radius + 2
    free = (y + radius < floor - 3) & (x > clear) & (x < WIDTH - clear) & (y > clear)
    inside = np.lib.stride_tricks.sliding_window_view(free, 2 * FLIGHT + 1).all(axis=1)
    bends = (y[2 * FLIGHT:] - 2 * y[FLIGHT:-FLIGHT] + y[: -2 * FLIGHT]) / FLIGHT**2
    return bends[inside & np.isfinite(bends)]


def _jolts(path: np.ndarray) -> np.ndarray:
    """Change of velocity beyond gravity's at each frame (T,), pixels per frame; 0 where unseen."""
    velocity = np.diff(path, axis=0)
    change = np.diff(velocity, axis=0) - [0, G]
    jolts = np.zeros(len(path))
    size = np.nan_to_num(np.linalg.norm(change, axis=1))
    jolts[1:-1] = np.maximum(size - 0.5, 0)  # the tracker itself trembles by half a pixel
    return jolts


def _resample(per_frame: np.ndarray) -> np.ndarray:
    times = np.arange(round(len(per_frame) / FPS * RATE)) / RATE
    return np.interp(times, np.arange(len(per_frame)) / FPS, per_frame)


def hear(wave: np.ndarray) -> np.ndarray:
    """Strength of heard impacts of a stereo wave (2,N), RATE per second."""
    rise = np.maximum(onset_curve(wave) - 3, 0)  # dB per 4 ms; less is noise
    step = 1000 // RATE
    count = len(rise) // step
    return rise[: count * step].reshape(count, step).max(axis=1)


def agreement(seen: np.ndarray, heard: np.ndarray) -> tuple[float, float]:
    """Lag in seconds (sound late: above 0) of the best correlation within REACH, and its value."""
    curves = []
    for curve in (seen, heard):
        smooth = ndimage.gaussian_filter1d(curve[: min(len(seen), len(heard))], BLUR * RATE)
        smooth = smooth - smooth.mean()
        curves.append(smooth / (np.linalg.norm(smooth) + 1e-9))
    reach = round(REACH * RATE)
    full = np.correlate(curves[1], curves[0], mode="full")
    near = full[len(curves[0]) - 1 - reach : len(curves[0]) + reach]
    return float(near.argmax() - reach) / RATE, float(near.max())


def judge_lag(seen: list[np.ndarray], heard: list[np.ndarray]) -> dict[str, float]:
    """Mean |lag| of clips with their own sound against the same clips with exchanged sounds.

    p: share of random shuffles whose mean |lag| is as small as the clips' own.
    """
    count = len(seen)
    table = np.array([[abs(agreement(a, b)[0]) for b in heard] for a in seen])
    own = float(np.diag(table).mean())
    generator = np.random.default_rng(0)
    orders = [generator.permutation(count) for _ in range(SHUFFLES)]
    shuffled = np.array([table[np.arange(count), order].mean() for order in orders])
    return {"clips": count, "own_ms": 1000 * own, "shuffled_ms": 1000 * float(shuffled.mean()),
            "p": float((1 + (shuffled <= own).sum()) / (1 + SHUFFLES))}


def judge(clips: list[tuple[ClipFacts, np.ndarray, np.ndarray]]) -> dict:
    """All figures of clips (facts asked for, frames (T,64,96,3), wave (2,N))."""
    looked = [look(frames) for _, frames, _ in clips]
    pairs = list(zip((facts for facts, _, _ in clips), looked, strict=True))
    colours = [set(facts.colours) == set(seen.colours) for facts, seen in pairs]
    counts = [len(facts.colours) == seen.balls for facts, seen in pairs]
    flights = np.concatenate([seen.accelerations for seen in looked])
    falling = [float(np.median(seen.accelerations)) > 0 for seen in looked
               if len(seen.accelerations)]
    timed = [(seen.impacts, hear(wave)) for seen, (_, _, wave) in zip(looked, clips, strict=True)]
    timed = [pair for pair in timed if pair[0].any() and pair[1].any()]
    return {
        "clips": len(clips),
        "colours_right": float(np.mean(colours)),
        "count_right": float(np.mean(counts)),
        "both_right": float(np.mean([a and b for a, b in zip(colours, counts, strict=True)])),
        "gravity": {
            "asked": G, "median": float(np.median(flights)) if len(flights) else None,
            "quartiles": np.percentile(flights, [25, 75]).tolist() if len(flights) else None,
            "moments": len(flights),
            "clips_that_fall": float(np.mean(falling)) if falling else None,
        },
        "lag": judge_lag([a for a, _ in timed], [b for _, b in timed]) if timed else None,
        "wrong": [facts.id for (facts, _), a, b in zip(pairs, colours, counts, strict=True)
                  if not (a and b)],
    }


def facts_of(name: str) -> ClipFacts:
    """Ground truth of a clip named playground-SEED-INDEX."""
    _, seed, index = name.split("-")
    return describe(int(seed), int(index))


def read_samples(folder: Path, count: int) -> list[tuple[ClipFacts, np.ndarray, np.ndarray]]:
    """The first `count` tight clips of a folder of sampled mp4 files."""
    spec = CutSpec(fps=FPS, frames=WINDOW_FRAMES, height=HEIGHT, width=WIDTH,
                   sample_rate=SAMPLE_RATE, hop=HOP, keep_silent=True)
    clips: list[tuple[ClipFacts, np.ndarray, np.ndarray]] = []
    for path in sorted(folder.glob("playground-*.mp4")):
        facts = facts_of(path.stem)
        if facts.clip_class == "tight" and len(clips) < count:
            cut = read_cut(path, spec)
            clips.append((facts, cut.frames, cut.audio.T))
    return clips


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m playground.quality.recognise")
    parser.add_argument("folder", type=Path, help="RUN/samples/stepXXXXXXXX")
    parser.add_argument("--count", type=int, default=50, help="tight clips to judge")
    arguments = parser.parse_args()
    clips = read_samples(arguments.folder, arguments.count)
    if not clips:
        print(f"error: {arguments.folder} holds no sampled tight clip (playground-*.mp4)",
              file=sys.stderr)
        return 78
    print(json.dumps(judge(clips), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
