"""Random holes by kind, the same for training and for benchmarks.

Every length but the width of thin strokes is a fraction of the image's side; x points right, y points down.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sdinpaint.errors import SettingError, said

__all__ = ["KINDS", "Kind", "grid", "random_hole"]

Array = NDArray[np.floating[Any]]
Hole = NDArray[np.bool_]
Kind = Literal["thin", "thick", "box", "ellipse", "half", "full", "scattered"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MIN_SIZE = 8
"""Smallest size in pixels: at less, a disc or a stroke may fall between the pixels."""
THIN_AT = 512
"""The size at which thin strokes are 1 to 7 pixels wide: less than a latent cell of 8 pixels."""


def random_hole(rng: np.random.Generator, size: int, kind: Kind) -> Hole:
    """Draw a hole of one kind; the same state of `rng` gives the same hole.

    Args:
        rng: generator that all random numbers come from.
        size: height and width in pixels, at least 8.
        kind: one of KINDS.

    Returns:
        A bool array (size, size), True = repaint, that is never empty.

    Raises:
        SettingError: `kind` is unknown, or `size` is below 8.
    """
    if kind not in KINDS:
        raise SettingError("SETTING_KIND", "kind", said(kind), expected=f"one of {', '.join(KINDS)}")
    if size < MIN_SIZE:
        raise SettingError("SETTING_SIZE", "size", f"{size}", expected=f"at least {MIN_SIZE} pixels")
    return _DRAWN[kind](rng, size)


def grid(size: int) -> tuple[Array, Array]:
    """Return the coordinates of all pixel centres.

    Args:
        size: height and width in pixels.

    Returns:
        x (1, size) and y (size, 1) as float32, in fractions of the side.
    """
    at = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return at[None, :], at[:, None]


def _thin(rng: np.random.Generator, size: int) -> Hole:
    """Draw lines that are 1 to 7 pixels wide at 512 pixels: scratches and wires, which a latent cell hardly shows."""
    points = _points(rng)
    width = max(rng.integers(1, 8) / THIN_AT, 1 / size)
    return _brushed(points, width / 2, size)


def _thick(rng: np.random.Generator, size: int) -> Hole:
    """Draw strokes of a thick brush."""
    points = _points(rng)
    return _brushed(points, rng.uniform(0.05, 0.13), size)


def _points(rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw three to five points (N, 2)."""
    return rng.uniform(0.05, 0.95, (rng.integers(3, 6), 2))


def _brushed(points: NDArray[np.float64], radius: float, size: int) -> Hole:
    """Return all pixels within `radius` of the lines through `points`."""
    x, y = grid(size)
    brushed = np.zeros((size, size), dtype=np.bool_)
    for (x0, y0), (x1, y1) in pairwise(points):
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
        brushed |= (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2 <= radius**2
    return brushed


def _box(rng: np.random.Generator, size: int) -> Hole:
    x, y = grid(size)
    half_x, half_y = rng.uniform(0.1, 0.4, 2)
    center_x, center_y = rng.uniform(0.1, 0.9, 2)
    hole: Hole = (np.abs(x - center_x) <= half_x) & (np.abs(y - center_y) <= half_y)
    return hole


def _ellipse(rng: np.random.Generator, size: int) -> Hole:
    x, y = grid(size)
    half_x, half_y = rng.uniform(0.12, 0.45, 2)
    center_x, center_y = rng.uniform(0.1, 0.9, 2)
    hole: Hole = ((x - center_x) / half_x) ** 2 + ((y - center_y) / half_y) ** 2 <= 1
    return hole


def _half(rng: np.random.Generator, size: int) -> Hole:
    """Draw everything beyond a line across the image, on one of its four sides, as in outpainting."""
    along = grid(size)[rng.integers(2)]
    share = rng.uniform(0.25, 0.6)
    beyond = along < share if rng.random() < 0.5 else along > 1 - share
    return np.broadcast_to(beyond, (size, size)).copy()


def _full(rng: np.random.Generator, size: int) -> Hole:
    return np.ones((size, size), dtype=np.bool_)


def _scattered(rng: np.random.Generator, size: int) -> Hole:
    """Draw four to nine small discs, each in a different field of a 4 by 4 board."""
    x, y = grid(size)
    hole = np.zeros((size, size), dtype=np.bool_)
    for field in rng.choice(16, rng.integers(4, 10), replace=False):
        row, column = divmod(int(field), 4)
        center_x, center_y = (np.array([column, row]) + rng.uniform(0.4, 0.6, 2)) / 4
        radius = max(rng.uniform(0.03, 0.08), 0.75 / size)  # a pixel's centre is at most 0.71 pixels away
        hole |= (x - center_x) ** 2 + (y - center_y) ** 2 <= radius**2
    return hole


_DRAWN: dict[Kind, Callable[[np.random.Generator, int], Hole]] = {
    "thin": _thin,
    "thick": _thick,
    "box": _box,
    "ellipse": _ellipse,
    "half": _half,
    "full": _full,
    "scattered": _scattered,
}
