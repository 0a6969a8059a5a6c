"""How the world looks: antialiased balls of four materials in a box, and three ambient scenes.

Everything is drawn in float RGB [0,1] with edges one pixel soft, so that sub-pixel motion is
visible. Balls are drawn as patches of their own size, all frames of one ball at once.
"""

import numpy as np

from playground.world.physics import FLOOR, FPS, HEIGHT, SECONDS, WALL, WIDTH, Body

FRAMES = round(FPS * SECONDS)
COLOURS = {
    "red": (0.88, 0.10, 0.12),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.12, 0.68, 0.18),
    "turquoise": (0.08, 0.78, 0.80),
    "blue": (0.14, 0.26, 0.90),
    "pink": (0.92, 0.22, 0.78),
}
BACKDROPS = {
    "light grey": (0.78, 0.78, 0.78),
    "dark grey": (0.24, 0.24, 0.25),
    "beige": (0.80, 0.75, 0.66),
    "slate": (0.40, 0.43, 0.47),
}


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Pixel centre coordinates x (1,W) and y (H,1)."""
    return np.arange(WIDTH)[None] + 0.5, np.arange(HEIGHT)[:, None] + 0.5


def backdrop(name: str) -> np.ndarray:
    """The empty box (H,W,3): side walls and floor darker than the wall behind."""
    x, y = _grid()
    image = np.ones((HEIGHT, WIDTH, 3)) * np.array(BACKDROPS[name])
    image *= (1.06 - 0.14 * y / HEIGHT)[..., None]
    wall = (x < WALL) | (x > WIDTH - WALL) | (y < WALL)
    image[np.broadcast_to(wall, image.shape[:2])] *= 0.72
    image[np.broadcast_to(y > HEIGHT - FLOOR, image.shape[:2])] *= 0.55
    return image


def _material(
    name: str, base: np.ndarray, u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Colour (T,P,P,3) and opacity (T,P,P) at ball coordinates u, v (unit disc)."""
    r2 = np.clip(u * u + v * v, 0, 1)
    light = np.clip(-0.55 * u - 0.65 * v + 0.55 * np.sqrt(1 - r2), -1, 1)[..., None]
    opaque = np.ones_like(r2)
    if name == "rubber":  # matt: flat colour, soft shade
        return base * (0.80 + 0.20 * light), opaque
    if name == "wood":  # grain: dark stripes
        stripe = 0.5 + 0.5 * np.cos(2 * np.pi * 1.3 * (v + 0.15 * np.sin(2.5 * u)))[..., None]
        return base * (0.85 + 0.10 * light) * (0.45 + 0.55 * stripe), opaque
    if name == "metal":  # strong contrast, hard highlight, dark underside
        shine = np.exp(-((u + 0.32) ** 2 + (v + 0.38) ** 2) / 0.08)[..., None]
        return np.clip(base * (0.50 + 0.62 * light) + 0.95 * shine, 0, 1), opaque
    rim = np.clip((np.sqrt(r2) - 0.62) / 0.25, 0, 1)  # glass: clear inside, coloured bright rim
    spot = np.exp(-((u + 0.35) ** 2 + (v + 0.40) ** 2) / 0.03)
    colour = np.clip(base + 0.35 * (1 - rim[..., None]) + spot[..., None], 0, 1)
    return colour, np.clip(0.42 + 0.55 * rim + spot, 0, 1)


def draw_balls(scene: str, bodies: list[Body], material: str, positions: np.ndarray) -> np.ndarray:
    """Frames (T,H,W,3) float in [0,1] of balls at `positions` (T,N,2) in front of a backdrop."""
    frames = np.repeat(backdrop(scene)[None], len(positions), axis=0)
    for index, body in enumerate(bodies):
        size = int(2 * body.radius) + 4
        corner = np.floor(positions[:, index] - size / 2).astype(int)  # (T,2)
        corner = np.clip(corner, 0, [WIDTH - size, HEIGHT - size])
        offset = np.arange(size) + 0.5
        dx = corner[:, :1] + offset - positions[:, index, :1]  # (T,P)
        dy = corner[:, 1:] + offset - positions[:, index, 1:]
        u, v = dx[:, None, :] / body.radius, dy[:, :, None] / body.radius
        u, v = np.broadcast_arrays(u, v)  # (T,P,P)
        cover = np.clip(body.radius + 0.5 - body.radius * np.hypot(u, v), 0, 1)
        colour, opacity = _material(material, np.array(COLOURS[body.colour]), u, v)
        alpha = (cover * opacity)[..., None]
        for frame, (left, top), ink, a in zip(frames, corner, colour, alpha, strict=True):
            patch = frame[top:top + size, left:left + size]
            patch += a * (ink - patch)
    return frames


def draw_rain(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Soft grey streaks falling past a dark sky and wet ground."""
    x, y = _grid()
    sky = np.array([0.34, 0.38, 0.45]) * (1.15 - 0.4 * y / HEIGHT)[..., None]
    image = np.broadcast_to(sky, (HEIGHT, WIDTH, 3)).copy()
    image[round(0.82 * HEIGHT):] = np.array([0.22, 0.24, 0.24])
    count = round(6 + 12 * strength)
    start = rng.uniform(0, 1, (count, 2)) * [WIDTH, HEIGHT]
    speed = rng.uniform(260, 340, count)
    frames = np.repeat(image[None], FRAMES, axis=0)
    for (x0, y0), fall in zip(start, speed, strict=True):
        depth = (y0 + fall * np.arange(FRAMES) / FPS) % (HEIGHT + 30) - 15  # (T,)
        across = np.exp(-((x - x0) / 2.4) ** 2)  # (1,W)
        along = np.exp(-((y[None, :, 0] - depth[:, None]) / 10.0) ** 4)  # (T,H)
        low, high = max(int(x0) - 7, 0), min(int(x0) + 8, WIDTH)
        streak = 0.22 * along[:, :, None] * across[:, low:high]
        frames[:, :, low:high] += streak[..., None]
    return frames


def draw_wind(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Tall green reeds that sway under a pale sky."""
    x, y = _grid()
    sky = np.array([0.72, 0.78, 0.80]) * np.ones((HEIGHT, WIDTH, 1))
    frames = np.repeat(sky[None], FRAMES, axis=0)
    time = np.arange(FRAMES)[:, None, None] / FPS
    height = np.clip((HEIGHT - y) / HEIGHT, 0, 1)[None]  # (1,H,1)
    roots = np.linspace(14, WIDTH - 14, 7) + rng.uniform(-7, 7, 7)
    for root in roots:
        tall = rng.uniform(0.62, 0.9)
        swing = (14 + 26 * strength) * np.sin(
            2 * np.pi * (0.5 + 0.6 * strength) * time + root / 60 + rng.uniform(0, 0.5)
        )
        colour = np.array([0.25, 0.48, 0.20]) * rng.uniform(0.8, 1.15)
        top = int((height[0, :, 0] >= tall).sum())  # the reed is drawn where it can be
        rise = height[:, top:] / tall
        bend = root + (12 + swing) * rise**2  # (T,H,1)
        left, right = max(0, int(bend.min()) - 7), max(0, int(bend.max()) + 7)
        width = 5.0 * (1 - rise) ** 0.5
        cover = np.clip(width - np.abs(x[None, :, left:right] - bend) + 0.5, 0, 1)
        patch = frames[:, top:, left:right]
        patch += cover[..., None] * (colour - patch)
    return frames


def draw_clouds(rng: np.random.Generator, strength: float) -> np.ndarray:
    """White clouds that drift sideways over a blue sky; `strength` sets speed and number."""
    x, y = _grid()
    sky = np.array([0.36, 0.60, 0.90]) + 0.18 * (y / HEIGHT)[..., None] * np.ones((1, WIDTH, 1))
    time = np.arange(FRAMES)[:, None, None] / FPS
    heading = 1.0 if rng.uniform() < 0.5 else -1.0
    mist = np.zeros((FRAMES, HEIGHT, WIDTH))
    for _ in range(2 + round(2 * strength)):
        left, top = rng.uniform(0, WIDTH), rng.uniform(18, HEIGHT - 30)
        speed = heading * rng.uniform(8, 14) * (1 + 2 * strength)
        for _ in range(3):
            cx = left + rng.uniform(-20, 20) + speed * time
            cy = top + rng.uniform(-5, 5)
            wide = rng.uniform(14, 24)
            cx = (cx + 40) % (WIDTH + 80) - 40
            mist += np.exp(-((x[None] - cx) / wide) ** 2) * np.exp(-((y - cy) / (wide / 2)) ** 2)
    cover = np.clip(mist, 0, 1)[..., None] * 0.92
    return sky[None] * (1 - cover) + cover


AMBIENT = {"rain": draw_rain, "wind": draw_wind, "clouds": draw_clouds}


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Float [0,1] to uint8 with rounding."""
    pixels = np.empty(frames.shape, np.uint8)
    for frame, out in zip(frames, pixels, strict=True):  # one at a time: it stays in the cache
        out[...] = np.clip(frame, 0, 1) * 255 + 0.5
    return pixels
