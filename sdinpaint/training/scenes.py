"""Generate procedural scenes for training: coloured objects in front of a wall, with captions and holes.

Lengths are fractions of the image's side; x points right, y points down. Objects are drawn from signed distances, so
that edges are smooth at any size without supersampling. Every function is pure, given its numpy Generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sdinpaint.masks.generator import Kind, grid, random_hole

__all__ = [
    "COLORS",
    "EMPTY_CAPTIONS",
    "MASK_KINDS",
    "SHAPES",
    "Background",
    "Scene",
    "Thing",
    "captions",
    "empty_caption",
    "inside",
    "object_mask",
    "random_background",
    "random_mask",
    "random_scene",
    "render",
    "scene_caption",
    "silhouette",
    "without",
]

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]
RGB = tuple[float, float, float]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (218, 38, 42),
    "orange": (248, 134, 24),
    "yellow": (250, 214, 44),
    "green": (52, 168, 72),
    "blue": (40, 100, 222),
    "purple": (128, 58, 178),
    "pink": (250, 136, 186),
    "black": (44, 44, 50),
}

MOODS: tuple[tuple[RGB, RGB], ...] = (
    ((206, 212, 218), (168, 160, 152)),
    ((214, 202, 188), (176, 154, 134)),
    ((184, 198, 210), (150, 156, 166)),
    ((200, 208, 194), (164, 164, 144)),
    ((212, 198, 204), (168, 152, 158)),
    ((176, 186, 192), (196, 184, 166)),
    ((222, 214, 196), (150, 158, 160)),
    ((190, 184, 200), (170, 162, 170)),
)
"""Muted colours of wall and floor, which all differ clearly from the colours of objects."""


@dataclass(frozen=True)
class Thing:
    """An object: names of its shape and colour, and its centre and radius in fractions of the image's side."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Background:
    """Colours of wall and floor (0..255), height of their border, and side of the light (-1 left, +1 right)."""

    wall: RGB
    floor: RGB
    horizon: float
    light: float


@dataclass(frozen=True)
class Scene:
    """Objects in front of a background; an empty scene has none."""

    background: Background
    things: tuple[Thing, ...]


# --- shapes ---

Surface = tuple[Array, tuple[Array, Array, Array]]
"""The signed distance of points to a shape of radius 1 (negative inside), and its surface normals (x, y, z)."""


def _round_normal(nx: Array, ny: Array) -> tuple[Array, Array, Array]:
    return nx, ny, np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0))


def _polygon(u: Array, v: Array, corners: list[tuple[float, float]]) -> Array:
    """Compute the signed distance to a convex polygon with clockwise corners; it is exact along the edges."""
    distance = np.full_like(u, -np.inf)
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = np.hypot(u1 - u0, v1 - v0)
        distance = np.maximum(distance, ((v1 - v0) * (u - u0) - (u1 - u0) * (v - v0)) / length)
    return distance


def _ball(u: Array, v: Array) -> Surface:
    return np.hypot(u, v) - 1, _round_normal(u, v)


def _ring(u: Array, v: Array) -> Surface:
    rho = np.hypot(u, v) + 1e-6
    across = (rho - 0.74) / 0.26
    return np.abs(rho - 0.74) - 0.26, _round_normal(across * u / rho, across * v / rho)


def _cone(u: Array, v: Array) -> Surface:
    """Compute a cone, which has an elliptic base below its widest line and two slopes above it."""
    slopes = _polygon(u, v, [(0, -1), (0.84, 0.72), (-0.84, 0.72)])
    base = (np.hypot(u / 0.84, (v - 0.70) / 0.2) - 1) * 0.2
    across = np.clip(u / np.maximum((v + 1) * 0.49, 0.02), -1, 1)
    return np.minimum(slopes, base), _round_normal(across * 0.93, np.full_like(u, -0.3))


def _cube(u: Array, v: Array) -> Surface:
    """Compute a cube, seen slightly from above and from the right."""
    a, b, e = -0.73, 0.43, 0.30
    outline = _polygon(u, v, [(a, a + e), (a + e, a), (b + e, a), (b + e, b), (b, b + e), (a, b + e)])
    top = (v < a + e) & (v + u < b + a + e)
    side = ~top & (u > b)
    nx = np.where(side, np.float32(0.95), 0)
    ny = np.where(top, np.float32(-0.95), 0)
    return outline, _round_normal(nx, ny)


def _star(u: Array, v: Array) -> Surface:
    """Compute a five-pointed star of ten flat facets that rise to its middle."""
    fifth = 2 * np.pi / 5
    angle = np.arctan2(u, -v)
    sector = np.round(angle / fifth) * fifth
    folded = angle - sector
    rho = np.hypot(u, v)
    along, aside = rho * np.cos(folded), rho * np.abs(np.sin(folded))
    inner_u, inner_v = 0.47 * np.cos(fifth / 2), 0.47 * np.sin(fifth / 2)
    length = np.hypot(1 - inner_u, inner_v)
    n_along, n_aside = inner_v / length, (1 - inner_u) / length
    facet = sector + np.copysign(np.arctan2(n_aside, n_along), folded)
    return (along - 1) * n_along + aside * n_aside, _round_normal(0.75 * np.sin(facet), -0.75 * np.cos(facet))


_SURFACES: dict[str, tuple[Callable[[Array, Array], Surface], float]] = {  # with the depth of the base below the centre
    "ball": (_ball, 1.0),
    "cube": (_cube, 0.66),
    "cone": (_cone, 0.78),
    "star": (_star, 0.81),
    "ring": (_ring, 1.0),
}
SHAPES: tuple[str, ...] = tuple(_SURFACES)


# --- drawing ---


def _wall_and_floor(background: Background, size: int) -> Array:
    """Draw an empty scene -> float (size, size, 3) in 0..255, with a glow on the wall and a floor lighter in front."""
    x, y = grid(size)
    depth = (y - background.horizon) / (1 - background.horizon)
    floor_share = np.clip((y - background.horizon) * size + 0.5, 0, 1)
    glow = np.exp(-((x - 0.5 - 0.35 * background.light) ** 2 + (y - 0.25) ** 2) * 3.0)
    wall = 0.80 + 0.26 * glow
    floor = 0.84 + 0.16 * depth + 0.06 * background.light * (x - 0.5)
    near = np.exp(-np.abs(y - background.horizon) * 14) * 0.06
    tone_wall, tone_floor = (wall - near) * (1 - floor_share), (floor - near) * floor_share
    tones = np.stack([tone_wall, tone_floor], axis=-1)
    return tones @ np.array([background.wall, background.floor], dtype=np.float32)


def _window(thing: Thing, size: int, reach: float) -> tuple[slice, slice]:
    """Return the rows and columns within `reach` radii of an object's centre."""
    low = [max(int((c - reach * thing.radius) * size), 0) for c in (thing.y, thing.x)]
    high = [min(int(np.ceil((c + reach * thing.radius) * size)) + 1, size) for c in (thing.y, thing.x)]
    return slice(low[0], max(high[0], low[0])), slice(low[1], max(high[1], low[1]))


def _draw_shadow(canvas: Array, thing: Thing, light: float) -> None:
    size = len(canvas)
    rows, columns = _window(thing, size, reach=2.0)
    x, y = grid(size)
    base = thing.y + _SURFACES[thing.shape][1] * thing.radius
    u = (x[:, columns] - thing.x) / thing.radius + 0.25 * light
    v = (y[rows] - base) / (0.26 * thing.radius)
    distance = u * u + v * v
    canvas[rows, columns] *= 1 - 0.5 * np.exp(-distance * np.sqrt(distance))[..., None]


def _draw(canvas: Array, thing: Thing, light: float) -> None:
    size = len(canvas)
    rows, columns = _window(thing, size, reach=1.15)
    x, y = grid(size)
    u, v = np.broadcast_arrays((x[:, columns] - thing.x) / thing.radius, (y[rows] - thing.y) / thing.radius)
    distance, (nx, ny, nz) = _SURFACES[thing.shape][0](u, v)
    cover = np.clip(0.5 - distance * thing.radius * size, 0, 1)[..., None]
    lit = np.maximum(0.52 * light * nx - 0.60 * ny + 0.61 * nz, 0)
    gleam = np.maximum(0.30 * light * nx - 0.36 * ny + 0.88 * nz, 0) ** 40
    color = np.array(COLORS[thing.color], dtype=np.float32)
    paint = color * (0.60 + 0.46 * lit)[..., None] + (70 * gleam)[..., None]
    canvas[rows, columns] += cover * (paint - canvas[rows, columns])


def render(scene: Scene, size: int = 128) -> Pixels:
    """Render a scene; objects lower in the image are nearer and cover the others.

    Args:
        scene: the scene.
        size: height and width in pixels.

    Returns:
        The image, uint8 (size, size, 3).
    """
    canvas = _wall_and_floor(scene.background, size)
    for thing in scene.things:
        _draw_shadow(canvas, thing, scene.background.light)
    for thing in sorted(scene.things, key=lambda thing: thing.y):
        _draw(canvas, thing, scene.background.light)
    return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)


def inside(shape: str, u: Array, v: Array) -> Mask:
    """Tell which points lie inside a shape of radius 1 at the origin.

    Args:
        shape: name of the shape.
        u: coordinates to the right.
        v: coordinates downwards, of the same shape as `u`.

    Returns:
        True for points inside, of the same shape as `u`.
    """
    within: Mask = _SURFACES[shape][0](u, v)[0] <= 0
    return within


def silhouette(thing: Thing, size: int = 128) -> Mask:
    """Find the pixels of an object without its shadow.

    Args:
        thing: the object.
        size: height and width in pixels.

    Returns:
        True where the object covers at least half of a pixel, (size, size).
    """
    x, y = grid(size)
    u, v = np.broadcast_arrays((x - thing.x) / thing.radius, (y - thing.y) / thing.radius)
    return inside(thing.shape, u, v)


# --- scenes ---


def random_background(rng: np.random.Generator) -> Background:
    """Draw a random background: one of `MOODS`, slightly varied.

    Args:
        rng: the generator.

    Returns:
        The background.
    """
    wall, floor = (
        np.array(tone) + rng.uniform(-8, 8) + rng.uniform(-5, 5, 3) for tone in MOODS[rng.integers(len(MOODS))]
    )
    return Background(
        wall=(wall[0], wall[1], wall[2]),
        floor=(floor[0], floor[1], floor[2]),
        horizon=float(rng.uniform(0.46, 0.64)),
        light=float(rng.choice((-1.0, 1.0))),
    )


def _random_thing(rng: np.random.Generator, horizon: float, largest: float) -> Thing:
    """Draw a random object that stands on the floor and lies completely inside the image."""
    radius = float(rng.uniform(0.14, largest))
    lowest = 0.96 - radius
    return Thing(
        shape=str(rng.choice(SHAPES)),
        color=str(rng.choice(list(COLORS))),
        x=float(rng.uniform(0.04 + radius, 0.96 - radius)),
        y=float(rng.uniform(min(horizon + 0.08 - 0.7 * radius, lowest), lowest)),
        radius=radius,
    )


def _apart(one: Thing, other: Thing) -> bool:
    distance = np.hypot(one.x - other.x, one.y - other.y)
    return bool(distance > one.radius + other.radius + 0.08) and (one.shape, one.color) != (other.shape, other.color)


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a random scene of one object (55%) or two different, separate objects (45%).

    Args:
        rng: the generator.

    Returns:
        The scene; captions are for its first object.
    """
    background = random_background(rng)
    if rng.random() < 0.55:
        return Scene(background, (_random_thing(rng, background.horizon, largest=0.25),))
    while True:
        one, other = (_random_thing(rng, background.horizon, largest=0.20) for _ in range(2))
        if _apart(one, other):
            return Scene(background, (one, other))


def without(scene: Scene, thing: Thing) -> Scene:
    """Remove an object from a scene.

    Args:
        scene: the scene.
        thing: the object.

    Returns:
        The scene without the object.
    """
    return replace(scene, things=tuple(other for other in scene.things if other != thing))


# --- captions ---

EMPTY_CAPTIONS: tuple[str, ...] = (
    "empty scene",
    "an empty scene",
    "nothing",
    "remove the object",
    "empty background",
    "an empty room",
)


def empty_caption(rng: np.random.Generator) -> str:
    """Choose one of `EMPTY_CAPTIONS`, the prompts for no object at all.

    Args:
        rng: the generator.

    Returns:
        The caption.
    """
    return str(rng.choice(EMPTY_CAPTIONS))


def _name(thing: Thing) -> str:
    article = "an" if thing.color[0] in "aeiou" else "a"
    return f"{article} {thing.color} {thing.shape}"


def _place(thing: Thing) -> str:
    if thing.x < 0.4:
        return "on the left"
    return "on the right" if thing.x > 0.6 else "in the middle"


def captions(rng: np.random.Generator, scene: Scene, thing: Thing) -> str:
    """Choose one of several captions of an object; where it names another one too, the object comes first.

    Args:
        rng: the generator.
        scene: the scene.
        thing: the object of the scene to describe.

    Returns:
        The caption.
    """
    name = _name(thing)
    wordings = [
        name,
        f"{thing.color} {thing.shape}",
        f"a photo of {name}",
        f"{name} {_place(thing)}",
        f"{name} on the floor",
        f"a picture with {name} on the floor",
        *(f"{name} next to {_name(other)}" for other in scene.things if other != thing),
    ]
    return str(rng.choice(wordings))


def scene_caption(rng: np.random.Generator, scene: Scene) -> str:
    """Choose a caption of a whole scene, which names all its objects in random order, or says that it is empty.

    Args:
        rng: the generator.
        scene: the scene.

    Returns:
        The caption.
    """
    if not scene.things:
        return empty_caption(rng)
    if len(scene.things) == 1:
        return captions(rng, scene, scene.things[0])
    names = [_name(scene.things[index]) for index in rng.permutation(len(scene.things))]
    return str(rng.choice(("", "a photo of ", "a picture with "))) + str(rng.choice((" and ", " next to "))).join(names)


# --- masks: True = repaint ---


def object_mask(rng: np.random.Generator, scene: Scene, thing: Thing, size: int = 128) -> Mask:
    """Draw a hole that covers an object and its shadow with a margin.

    The outline is between an ellipse and a rounded box, with a random margin on each side. It does not depend on shape
    or colour, so that the hole does not reveal them. Other objects stay visible.

    Args:
        rng: the generator.
        scene: the scene.
        thing: the object to cover.
        size: height and width in pixels.

    Returns:
        The mask, (size, size), True = repaint.
    """
    x, y = grid(size)
    left, right, top, bottom = thing.radius + rng.uniform(0.03, 0.16, 4)
    u = (x - thing.x - (right - left) / 2) * 2 / (left + right)
    v = (y - thing.y - (bottom - top) / 2) * 2 / (top + bottom)
    power = rng.uniform(2, 8)
    hole: Mask = np.abs(u) ** power + np.abs(v) ** power <= 1
    from_center = (x - thing.x) ** 2 + (y - thing.y) ** 2
    hole |= from_center <= (thing.radius + 0.03) ** 2
    shift = 0.25 * scene.background.light * thing.radius
    hole |= ((x - thing.x + shift) / 1.5) ** 2 + ((y - thing.y - 0.88 * thing.radius) / 0.55) ** 2 <= thing.radius**2
    for other in scene.things:
        if other != thing:
            hole &= (x - other.x) ** 2 + (y - other.y) ** 2 > (1.1 * other.radius + 0.01) ** 2
    return hole


MASK_KINDS: dict[str, float] = {"box": 0.30, "ellipse": 0.20, "thick": 0.20, "half": 0.20, "full": 0.10}
"""Kinds of holes that do not depend on the scene, with their probabilities."""


def random_mask(rng: np.random.Generator, size: int = 128) -> Mask:
    """Draw a hole of a random kind, with the probabilities of `MASK_KINDS`.

    Args:
        rng: the generator.
        size: height and width in pixels.

    Returns:
        The mask, (size, size), True = repaint, never empty.
    """
    kind = str(rng.choice(list(MASK_KINDS), p=list(MASK_KINDS.values())))
    return random_hole(rng, size, cast(Kind, kind))
