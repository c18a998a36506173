"""What every way of making a mask checks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdinpaint.errors import MaskError
from sdinpaint.images.boxes import Box
from sdinpaint.images.files import MAX_PIXELS

__all__ = ["require_box", "require_points", "require_size"]

FARTHEST = 100_000
"""Coordinates beyond this are mistakes; Pillow would take minutes over an ellipse, and wrap around further out."""


def require_size(subject: str, size: Any) -> tuple[int, int]:
    """Height and width of at least a pixel each. Raises: MaskError naming `subject`."""
    sides = _numbers(size)
    if sides.shape != (2,) or (sides < 1).any() or (sides != np.rint(sides)).any() or sides.prod() > MAX_PIXELS:
        expected = f"(height, width) in whole pixels, at most {MAX_PIXELS} in all"
        raise MaskError("MASK_BAD_SIZE", subject, f"a size of {size!r}", expected=expected, hint="give picture.size")
    return int(sides[0]), int(sides[1])


def require_box(subject: str, box: Any) -> Box:
    """Whole pixels (left, top, right, bottom) with something inside. Raises: MaskError naming `subject`."""
    edges = _numbers(box)
    fine = edges.shape == (4,) and (edges == np.rint(edges)).all() and (np.abs(edges) <= FARTHEST).all()
    if not fine or edges[0] >= edges[2] or edges[1] >= edges[3]:
        expected = "whole pixels (left, top, right, bottom) with left < right and top < bottom"
        raise MaskError("MASK_BOX", subject, f"a box {box!r}", expected=expected, hint="x comes before y")
    return Box(*(int(edge) for edge in edges))


def require_points(subject: str, points: Any, at_least: int) -> list[tuple[float, float]]:
    """Points (x, y) in pixels. Raises: MaskError naming `subject`."""
    array = _numbers(points)
    expected = f"at least {at_least} points (x, y) in pixels, none beyond {FARTHEST}"
    if array.ndim != 2 or array.shape[1] != 2:
        found = f"no list of points: {points!r:.60}"
        raise MaskError("MASK_POINTS", subject, found, expected=expected, hint="[(x, y), (x, y), ...]")
    if len(array) < at_least or not (np.abs(array) <= FARTHEST).all():
        found = f"{len(array)} points: {points!r:.60}"
        raise MaskError("MASK_POINTS", subject, found, expected=expected, hint="give all corners as finite numbers")
    return [(float(x), float(y)) for x, y in array]


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    """The values as an array; an empty one for what is no regular nest of numbers."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return np.empty(0)
