"""Checks of arguments that all ways of making a mask share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdinpaint.errors import MaskError, said
from sdinpaint.images.boxes import Box
from sdinpaint.images.reading import MAX_PIXELS

__all__ = ["require_box", "require_points", "require_size"]

FARTHEST = 100_000
"""Largest coordinate in pixels: Pillow takes minutes to draw a larger ellipse, and wraps around further out."""


def require_size(subject: str, size: Any) -> tuple[int, int]:
    """Check that a size is (height, width) in whole pixels, each at least 1.

    Args:
        subject: name that an error gives to the size.
        size: (height, width) in pixels.

    Returns:
        The size as two Python integers.

    Raises:
        MaskError: `size` is anything else, or has more than MAX_PIXELS pixels in all.
    """
    sides = _numbers(size)
    if sides.shape != (2,) or (sides < 1).any() or (sides != np.rint(sides)).any() or sides.prod() > MAX_PIXELS:
        expected = f"(height, width) in whole pixels, at most {MAX_PIXELS} in all"
        raise MaskError(
            "MASK_BAD_SIZE", subject, f"a size of {said(size)}", expected=expected, hint="height comes first"
        )
    return int(sides[0]), int(sides[1])


def require_box(subject: str, box: Any) -> Box:
    """Check that a box is (left, top, right, bottom) in whole pixels and holds at least one pixel.

    Args:
        subject: name that an error gives to the box.
        box: (left, top, right, bottom) in pixels.

    Returns:
        The box.

    Raises:
        MaskError: `box` is anything else, or lies beyond FARTHEST.
    """
    edges = _numbers(box)
    fine = edges.shape == (4,) and (edges == np.rint(edges)).all() and (np.abs(edges) <= FARTHEST).all()
    if not fine or edges[0] >= edges[2] or edges[1] >= edges[3]:
        expected = "whole pixels (left, top, right, bottom) with left < right and top < bottom"
        raise MaskError("MASK_BOX", subject, f"a box {said(box)}", expected=expected, hint="x comes before y")
    return Box(*(int(edge) for edge in edges))


def require_points(subject: str, points: Any, at_least: int) -> list[tuple[float, float]]:
    """Check that points are a list of (x, y) in pixels.

    Args:
        subject: name that an error gives to the points.
        points: a sequence of (x, y).
        at_least: smallest number of points.

    Returns:
        The points as pairs of Python floats.

    Raises:
        MaskError: `points` is anything else, is too short, or reaches beyond FARTHEST.
    """
    array = _numbers(points)
    expected = f"at least {at_least} points (x, y) in pixels, none beyond {FARTHEST}"
    if array.ndim != 2 or array.shape[1] != 2:
        found = f"no list of points: {said(points)}"
        raise MaskError("MASK_POINTS", subject, found, expected=expected, hint="[(x, y), (x, y), ...]")
    if len(array) < at_least or not (np.abs(array) <= FARTHEST).all():
        found = f"{len(array)} points: {said(points)}"
        raise MaskError("MASK_POINTS", subject, found, expected=expected, hint="give all corners as finite numbers")
    return [(float(x), float(y)) for x, y in array]


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    """Convert nested numbers to a float64 array, or return an empty one where that fails."""
    try:
        return np.asarray(values, dtype=np.float64)
    except Exception:  # whatever a class of the caller's does there
        return np.empty(0)
