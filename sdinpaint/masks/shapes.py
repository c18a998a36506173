"""Masks drawn from coordinates, with hard edges. Points are (x, y), boxes (left, top, right, bottom), in pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sdinpaint.checks import check_whole
from sdinpaint.errors import MaskError, said
from sdinpaint.masks.checks import FARTHEST, require_box, require_points, require_size
from sdinpaint.masks.reading import Hole

__all__ = ["box", "ellipse", "polygon", "strokes"]

Points = Sequence[Sequence[float]]


def box(size: tuple[int, int], box: Sequence[int]) -> Hole:
    """Draw a filled box.

    Args:
        size: (height, width) of the mask.
        box: (left, top, right, bottom); right and bottom are exclusive.

    Returns:
        A bool array (H, W), True inside the box.

    Raises:
        MaskError: `size` or `box` is invalid, or no pixel of the box lies inside the mask.
    """
    left, top, right, bottom = require_box("Mask.box", box)
    return _drawn("Mask.box", size, lambda draw: draw.rectangle((left, top, right - 1, bottom - 1), fill=1))


def ellipse(size: tuple[int, int], box: Sequence[int]) -> Hole:
    """Draw the filled ellipse that touches the four sides of a box.

    Args:
        size: (height, width) of the mask.
        box: (left, top, right, bottom); right and bottom are exclusive.

    Returns:
        A bool array (H, W), True inside the ellipse.

    Raises:
        MaskError: `size` or `box` is invalid, or no pixel of the ellipse lies inside the mask.
    """
    left, top, right, bottom = require_box("Mask.ellipse", box)
    return _drawn("Mask.ellipse", size, lambda draw: draw.ellipse((left, top, right - 1, bottom - 1), fill=1))


def polygon(size: tuple[int, int], points: Points) -> Hole:
    """Draw a filled polygon with its outline.

    Args:
        size: (height, width) of the mask.
        points: the corners (x, y) in order, at least three.

    Returns:
        A bool array (H, W), True inside the polygon.

    Raises:
        MaskError: `size` or `points` is invalid, or no pixel of the polygon lies inside the mask.
    """
    corners = require_points("Mask.polygon", points, 3)
    return _drawn("Mask.polygon", size, lambda draw: draw.polygon(corners, fill=1))


def strokes(size: tuple[int, int], strokes: Iterable[Points], width: int) -> Hole:
    """Draw strokes of a round brush.

    Args:
        size: (height, width) of the mask.
        strokes: lists of points (x, y); a list with a single point makes a dot.
        width: diameter of the brush in whole pixels.

    Returns:
        A bool array (H, W), True on the strokes.

    Raises:
        MaskError: `size` or a stroke is invalid, or no pixel of the strokes lies inside the mask.
        SettingError: `width` is not a whole number from 1 on.
    """
    subject = "Mask.strokes"
    lines = [require_points(subject, stroke, 1) for stroke in _listed(subject, strokes)]
    diameter = check_whole("width", width, 1, FARTHEST, of=subject)

    def draw_strokes(draw: ImageDraw.ImageDraw) -> None:
        for line in lines:
            draw.point(line, fill=1)  # Pillow draws no circle at a width of 1
            draw.line(line, fill=1, width=diameter)
            for point in line:
                draw.circle(point, (diameter - 1) / 2, fill=1)

    return _drawn(subject, size, draw_strokes)


def _drawn(subject: str, size: tuple[int, int], draw: Callable[[ImageDraw.ImageDraw], None]) -> Hole:
    """Draw on an empty canvas of that size, which cuts off what lies beyond it."""
    height, width = require_size(subject, size)
    canvas = Image.new("1", (width, height))
    draw(ImageDraw.Draw(canvas))
    hole = np.asarray(canvas)
    if not hole.any():
        found, expected = "no pixel of it lies inside the image", f"some of 0 <= x < {width} and 0 <= y < {height}"
        hint = "sizes are (height, width), points (x, y)"
        raise MaskError("MASK_OUTSIDE", subject, found, expected=expected, hint=hint)
    return hole


def _listed(subject: str, strokes: Any) -> list[Any]:
    if not isinstance(strokes, Iterable) or isinstance(strokes, str) or getattr(strokes, "ndim", 1) == 0:
        found, expected = said(strokes), "a list of strokes, each a list of points (x, y)"
        raise MaskError("MASK_POINTS", subject, found, expected=expected, hint="[[(x, y), (x, y)], [(x, y)]]")
    return list(strokes)
