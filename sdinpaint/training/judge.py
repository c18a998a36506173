"""Recognise the object that was generated in a hole, from the geometry of the scenes and without a network.

A pixel belongs to an object if it is closer to one of the object colours, in any light, than to the known background
behind it, in any shadow. The object's colour is the weighted majority of these pixels, and its shape is the silhouette
that overlaps them best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdinpaint.training.scenes import COLORS, SHAPES, inside

__all__ = ["NONE", "Verdict", "judge"]

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

NONE = "none"
_SMALLEST = 0.008  # fraction of the image's area; the smallest object of random_scene covers about twice as much
_LIGHT = (0.55, 1.15)  # how far light and shade scale an object's colour
_SHADOW = (0.45, 1.10)  # how far a shadow and an imprecise repaint scale the background


@dataclass(frozen=True)
class Verdict:
    """The object found in a hole: names from COLORS and SHAPES, or NONE for both."""

    color: str
    shape: str


def judge(image: NDArray[np.uint8], hole: Mask, background: NDArray[np.uint8]) -> Verdict:
    """Recognise the object in a hole.

    Args:
        image: the inpainted image, (S, S, 3).
        hole: the mask, (S, S), True = repainted.
        background: the scene without the object, (S, S, 3).

    Returns:
        Colour and shape of the object.
    """
    pixels = image[hole].astype(np.float64)
    from_background = _distance_to_ray(pixels, background[hole].astype(np.float64), _SHADOW)
    from_colors = np.stack([_distance_to_ray(pixels, np.array(rgb), _LIGHT) for rgb in COLORS.values()])
    region = np.zeros_like(hole)
    region[hole] = from_colors.min(0) < from_background
    region = _without_specks(region) & hole
    if region.mean() < _SMALLEST:
        return Verdict(NONE, NONE)
    # Pixels of a blurred edge are partly background: a pixel's vote is its distance from the background.
    found = region[hole]
    votes = np.bincount(from_colors.argmin(0)[found], weights=from_background[found], minlength=len(COLORS))
    return Verdict(list(COLORS)[int(votes.argmax())], _best_shape(region))


def _distance_to_ray(pixels: Floats, color: NDArray[Any], limits: tuple[float, float]) -> Floats:
    """Compute the RGB distance from pixels (..., 3) to the nearest lighter or darker version of a colour -> (...)."""
    scale = (pixels * color).sum(-1) / ((color * color).sum(-1) + 1e-9)
    return np.asarray(np.linalg.norm(pixels - np.clip(scale, *limits)[..., None] * color, axis=-1))


def _without_specks(region: Mask) -> Mask:
    """Set each pixel to the majority of its 3 x 3 neighbourhood."""
    padded = np.pad(region.astype(np.int64), 1)
    rows, columns = region.shape
    votes = sum(padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3))
    return np.asarray(votes >= 5)


def _unit_moments(shape: str) -> tuple[float, float, float]:
    """Compute area and centroid of a shape of radius 1."""
    u, v = np.meshgrid(np.linspace(-1.2, 1.2, 121), np.linspace(-1.2, 1.2, 121))
    within = inside(shape, u, v)
    return float(within.mean() * 2.4**2), float(u[within].mean()), float(v[within].mean())


_MOMENTS = {shape: _unit_moments(shape) for shape in SHAPES}
_SCALES, _SHIFTS_X, _SHIFTS_Y = (
    grid.reshape(-1, 1)
    for grid in np.meshgrid((0.86, 0.93, 1.0, 1.08, 1.16), (-0.12, 0.0, 0.12), (-0.12, 0.0, 0.12), indexing="ij")
)


def _best_shape(region: Mask) -> str:
    """Return the shape whose silhouette overlaps best, searched around the region's area and centroid."""
    area = region.sum()
    reach = int(np.sqrt(area)) + 4
    steps = np.linspace(-reach, reach, 32).round().astype(np.int64)
    y, x = (axis.astype(np.float64) for axis in np.nonzero(region))
    center_x, center_y = x.mean(), y.mean()
    near_x, near_y = (axis.ravel() for axis in np.meshgrid(steps + round(center_x), steps + round(center_y)))
    size = len(region)
    visible = (near_x >= 0) & (near_x < size) & (near_y >= 0) & (near_y < size)
    near_x, near_y = near_x[visible], near_y[visible]
    found = region[near_y, near_x]
    overlaps = {}
    for shape, (unit_area, unit_x, unit_y) in _MOMENTS.items():
        radius = np.sqrt(area / unit_area)
        u = ((near_x - center_x) / radius + _SHIFTS_X) / _SCALES + unit_x
        v = ((near_y - center_y) / radius + _SHIFTS_Y) / _SCALES + unit_y
        template = inside(shape, u, v)
        overlaps[shape] = ((template & found).sum(1) / (template | found).sum(1)).max()
    return max(overlaps, key=lambda shape: float(overlaps[shape]))
