"""Balls in a box: gravity, walls, floor and each other, with an exact list of impacts.

Positions are pixels of the 192 x 128 picture (x right, y down), time in seconds. Flight follows the
exact parabola between sub-steps of about 1 ms, so energy only changes at contacts.
"""

from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 192, 128
FPS, SECONDS = 24, 3.0
WALL, FLOOR = 6.0, 10.0  # thickness of the side walls and of the floor, pixels
GRAVITY = 520.0  # pixels / s^2: a fall through the box takes about 0.6 s
SUBSTEPS = 40  # per frame: 1.04 ms
AUDIBLE_SPEED = 45.0  # pixels / s of normal speed below which a contact is rest, not an impact
RESTITUTION = {"rubber": 0.84, "wood": 0.60, "metal": 0.70, "glass": 0.76}
MOTION_NAMES = ("drop", "throw_left", "throw_right", "toss")
DENSITY = {"rubber": 1.0, "wood": 0.8, "metal": 3.0, "glass": 2.0}


class Body(NamedTuple):
    """One ball at t = 0: radius, mass and velocity in pixels, relative mass, pixels / s."""

    colour: str
    radius: float
    mass: float
    x: float
    y: float
    vx: float
    vy: float


class Event(NamedTuple):
    """One impact. `bodies` are ball indices, or a ball and "floor"/"left"/"right"/"ceiling"."""

    time: float
    bodies: tuple[int, int | str]
    impulse: float
    x: float
    y: float


class Motion(NamedTuple):
    positions: np.ndarray  # (T, N, 2) ball centres at each frame
    energy: np.ndarray  # (T,) kinetic + potential
    events: list[Event]


class _World:
    """State of one run, plain floats: for three balls that is faster than arrays."""

    def __init__(self, bodies: list[Body], restitution: float):
        self.bodies = bodies
        self.restitution = restitution
        self.state = [[b.x, b.y, b.vx, b.vy] for b in bodies]
        self.time = 0.0
        self.events: list[Event] = []

    def energy(self) -> float:
        pairs = zip(self.bodies, self.state, strict=True)
        return sum(
            b.mass * (0.5 * (s[2] ** 2 + s[3] ** 2) + GRAVITY * (HEIGHT - s[1])) for b, s in pairs
        )

    def step(self, dt: float) -> None:
        self.time += dt
        for s in self.state:
            s[0] += s[2] * dt
            s[1] += s[3] * dt + 0.5 * GRAVITY * dt * dt
            s[3] += GRAVITY * dt
        for index in range(len(self.bodies)):
            self._hit_box(index)
        for first in range(len(self.bodies)):
            for second in range(first + 1, len(self.bodies)):
                self._hit_pair(first, second)

    def _bounce(self, index: int, axis: int, inward: float, side: str) -> None:
        """Reflect velocity component `axis`; `inward` is +1 or -1, the way back into the box."""
        body, s = self.bodies[index], self.state[index]
        speed = -s[2 + axis] * inward
        if speed <= 0:
            return
        if speed < AUDIBLE_SPEED:  # comes to rest: rolling friction instead of a bounce
            s[2 + axis] = 0.0
            s[3 - axis] *= 0.9995
            return
        s[2 + axis] = inward * speed * self.restitution
        x = s[0] - inward * body.radius if axis == 0 else s[0]
        y = s[1] - inward * body.radius if axis == 1 else s[1]
        impulse = body.mass * speed * (1 + self.restitution)
        self.events.append(Event(self.time, (index, side), impulse, x, y))

    def _hit_box(self, index: int) -> None:
        r, s = self.bodies[index].radius, self.state[index]
        limits = (WALL + r, WIDTH - WALL - r, WALL + r, HEIGHT - FLOOR - r)
        sides = ((0, 1.0, "left"), (0, -1.0, "right"), (1, 1.0, "ceiling"), (1, -1.0, "floor"))
        for limit, (axis, inward, side) in zip(limits, sides, strict=True):
            if (s[axis] - limit) * inward < 0:
                s[axis] = limit
                self._bounce(index, axis, inward, side)

    def _hit_pair(self, first: int, second: int) -> None:
        a, b = self.bodies[first], self.bodies[second]
        s, u = self.state[first], self.state[second]
        dx, dy = u[0] - s[0], u[1] - s[1]
        reach = a.radius + b.radius
        if dx * dx + dy * dy >= reach * reach:
            return
        distance = max((dx * dx + dy * dy) ** 0.5, 1e-9)
        nx, ny = dx / distance, dy / distance
        overlap = reach - distance
        total = a.mass + b.mass
        s[0] -= nx * overlap * b.mass / total
        u[0] += nx * overlap * a.mass / total
        s[1] -= ny * overlap * b.mass / total
        u[1] += ny * overlap * a.mass / total
        speed = (s[2] - u[2]) * nx + (s[3] - u[3]) * ny
        if speed <= 0:
            return
        bounce = self.restitution if speed >= AUDIBLE_SPEED else 0.0
        impulse = (1 + bounce) * speed * a.mass * b.mass / total
        for state, mass, sign in ((s, a.mass, -1.0), (u, b.mass, 1.0)):
            state[2] += sign * impulse * nx / mass
            state[3] += sign * impulse * ny / mass
        if bounce:
            x, y = s[0] + nx * a.radius, s[1] + ny * a.radius
            self.events.append(Event(self.time, (first, second), impulse, x, y))


def simulate(bodies: list[Body], material: str) -> Motion:
    """Run the world for SECONDS; returns centres (T,N,2), energy (T,) and the impacts."""
    world = _World(bodies, RESTITUTION[material])
    frames = round(FPS * SECONDS)
    positions, energy = [], []
    for _ in range(frames):
        positions.append([s[:2] for s in world.state])
        energy.append(world.energy())
        for _ in range(SUBSTEPS):
            world.step(1.0 / (FPS * SUBSTEPS))
    return Motion(np.array(positions), np.array(energy), world.events)


def draw_bodies(
    rng: np.random.Generator, colours: list[str], material: str, motion: str
) -> list[Body]:
    """Place one ball per colour; `motion` is "drop", "throw_left", "throw_right" or "toss"."""
    slots = rng.permutation(3)[: len(colours)]
    bodies = []
    for colour, slot in zip(colours, slots.tolist(), strict=True):
        radius = float(rng.uniform(13.0, 18.0))
        x = WALL + (slot + 0.5) * (WIDTH - 2 * WALL) / 3 + float(rng.uniform(-8, 8))
        y = float(rng.uniform(WALL + radius + 2, 62))
        vx, vy = float(rng.uniform(-30, 30)), 0.0
        if motion in ("throw_left", "throw_right"):
            vx = float(rng.uniform(130, 240)) * (-1 if motion == "throw_left" else 1)
            vy = float(rng.uniform(-90, 0))
        elif motion == "toss":
            y, vy = float(rng.uniform(80, 95)), float(rng.uniform(-280, -200))
        mass = DENSITY[material] * (radius / 15.0) ** 2
        bodies.append(Body(colour, radius, mass, x, y, vx, vy))
    return bodies
