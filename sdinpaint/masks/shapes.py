"""Masks drawn by coordinates, with crisp edges. Points are (x, y) and boxes (left, top, right, bottom), in pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sdinpaint.checks import check_whole
from sdinpaint.errors import MaskError
from sdinpaint.masks.checks import FARTHEST, require_box, require_points, require_size
from sdinpaint.masks.reading import Hole

__all__ = ["box", "ellipse", "polygon", "strokes"]

Points = Sequence[Sequence[float]]


def box(size: tuple[int, int], box: Sequence[int]) -> Hole:
    """The pixels inside a box -> bool (H, W). Raises: MaskError."""
    left, top, right, bottom = require_box("Mask.box", box)
    return _drawn("Mask.box", size, lambda draw: draw.rectangle((left, top, right - 1, bottom - 1), fill=1))


def ellipse(size: tuple[int, int], box: Sequence[int]) -> Hole:
    """The ellipse that touches the four sides of a box -> bool (H, W). Raises: MaskError."""
    left, top, right, bottom = require_box("Mask.ellipse", box)
    return _drawn("Mask.ellipse", size, lambda draw: draw.ellipse((left, top, right - 1, bottom - 1), fill=1))


def polygon(size: tuple[int, int], points: Points) -> Hole:
    """The inside of a closed outline and the outline itself -> bool (H, W). Raises: MaskError."""
    corners = require_points("Mask.polygon", points, 3)
    return _drawn("Mask.polygon", size, lambda draw: draw.polygon(corners, fill=1))


def strokes(size: tuple[int, int], strokes: Iterable[Points], width: int) -> Hole:
    """Lines through points, `width` pixels wide with round ends and joints -> bool (H, W); one point makes a dot.

    Raises: MaskError, SettingError.
    """
    subject = "Mask.strokes"
    lines = [require_points(subject, stroke, 1) for stroke in _listed(subject, strokes)]
    diameter = check_whole("width", width, 1, FARTHEST, of=subject)

    def paint(draw: ImageDraw.ImageDraw) -> None:
        for line in lines:
            draw.point(line, fill=1)  # at a width of 1, a circle is none
            draw.line(line, fill=1, width=diameter)
            for point in line:
                draw.circle(point, (diameter - 1) / 2, fill=1)

    return _drawn(subject, size, paint)


def _drawn(subject: str, size: tuple[int, int], paint: Callable[[ImageDraw.ImageDraw], None]) -> Hole:
    """What is painted on an empty canvas; what lies beyond it is cut off."""
    height, width = require_size(subject, size)
    canvas = Image.new("1", (width, height))
    paint(ImageDraw.Draw(canvas))
    hole = np.asarray(canvas)
    if not hole.any():
        found, expected = "no pixel of it lies inside the picture", f"some of 0 <= x < {width} and 0 <= y < {height}"
        hint = "sizes are (height, width), points (x, y)"
        raise MaskError("MASK_OUTSIDE", subject, found, expected=expected, hint=hint)
    return hole


def _listed(subject: str, strokes: Any) -> list[Any]:
    if not isinstance(strokes, Iterable) or isinstance(strokes, str):
        found, expected = f"{strokes!r:.60}", "a list of strokes, each a list of points (x, y)"
        raise MaskError("MASK_POINTS", subject, found, expected=expected, hint="[[(x, y), (x, y)], [(x, y)]]")
    return list(strokes)
