"""Masks from what is seen in a picture: the object in a box or under scribbles, and what is alike around a point.

Pictures are uint8 (H, W, 3), points (x, y) in pixels, and holes bool (H, W), True where they are repainted.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdinpaint.checks import check_number, check_whole, require_extra
from sdinpaint.errors import MaskError
from sdinpaint.images.boxes import Box
from sdinpaint.masks.checks import require_box, require_points
from sdinpaint.masks.reading import Hole

__all__ = ["flood", "grabcut", "region", "require_box_inside", "require_points_inside"]

Rgb = NDArray[np.uint8]
Point = Sequence[float]

LAB_RANGE = 100.0 + 1e-6
"""How far black is from white in Lab, with room for its rounding."""


def grabcut(
    rgb: Rgb, box: Sequence[int] | None = None, keep: Any = None, repaint: Any = None, iterations: int = 5
) -> Hole:
    """The object in a box, or under scribbles (H, W) of what is surely kept and surely repainted, as a hole.

    Outside of the box is kept, but for what `repaint` covers. The same call gives the same bits at any time.
    Raises: MaskError or SettingError that names the argument.
    Source: Rother et al. 2004, "GrabCut", as OpenCV has it.
    """
    cv2 = require_extra("cv2", extra="mask", what="Mask.grabcut")
    size = rgb.shape[:2]
    rounds = check_whole("iterations", iterations, 1, 1000, of="Mask.grabcut")
    if box is None and repaint is None:
        found, expected = "neither a box nor repaint", "at least one of them"
        raise MaskError("MASK_NO_PROMPT", "Mask.grabcut", found, expected=expected, hint="draw a box around the object")
    labels = np.full(size, cv2.GC_PR_BGD, np.uint8)
    if box is not None:
        labels[:] = cv2.GC_BGD
        labels[require_box_inside("Mask.grabcut: box", box, size).slices] = cv2.GC_PR_FGD
    kept, repainted = _scribble("keep", keep, size), _scribble("repaint", repaint, size)
    if (kept & repainted).any():
        found = f"covers {(kept & repainted).sum()} pixels that repaint covers too"
        raise MaskError(
            "MASK_SCRIBBLES", "Mask.grabcut: keep", found, expected="pixels of its own", hint="erase either there"
        )
    labels[kept], labels[repainted] = cv2.GC_BGD, cv2.GC_FGD
    _require_both_sides(_is_object(labels))

    def cut() -> None:
        cv2.grabCut(np.ascontiguousarray(rgb), labels, None, None, None, rounds, cv2.GC_INIT_WITH_MASK)

    # It draws from OpenCV's generator, which cannot be read and put back: but every new thread has one of its own.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(cut).result()
    return _is_object(labels)


def flood(rgb: Rgb, point: Point, tolerance: float = 0.1) -> Hole:
    """The pixels coloured like `point`, and joined to it by edges of such pixels, as a hole.

    tolerance: the largest distance in Lab from the colour at the point; 0 is the same colour, 1 is black to white.
    Raises: MaskError or SettingError that names the argument.
    """
    color = require_extra("skimage.color", extra="mask", what="Mask.flood")
    segmentation = require_extra("skimage.segmentation", extra="mask", what="Mask.flood")
    limit = LAB_RANGE * check_number("tolerance", tolerance, 0, 1, of="Mask.flood")
    x, y = _pixel("Mask.flood: point", point, rgb)
    lab = color.rgb2lab(rgb)
    distance = color.deltaE_cie76(lab, lab[y, x])
    # not over corners: a slanted line one pixel wide would not hold it back
    return segmentation.flood(distance, (y, x), connectivity=1, tolerance=limit)


def region(rgb: Rgb, point: Point, scale: float = 200.0, sigma: float = 0.8, min_size: int = 50) -> Hole:
    """The region at `point`, of those that edges part a picture into, as a hole.

    scale: regions grow with it; sigma: width in pixels of the smoothing before; min_size: pixels of a region at least.
    Raises: MaskError or SettingError that names the argument.
    Source: Felzenszwalb and Huttenlocher 2004, "Efficient graph-based image segmentation", as scikit-image has it.
    """
    segmentation = require_extra("skimage.segmentation", extra="mask", what="Mask.region")
    settings = {
        "scale": check_number("scale", scale, 0, of="Mask.region"),
        "sigma": check_number("sigma", sigma, 0, max(rgb.shape), of="Mask.region"),
        "min_size": check_whole("min_size", min_size, 0, rgb.size, of="Mask.region"),
    }
    x, y = _pixel("Mask.region: point", point, rgb)
    regions = segmentation.felzenszwalb(rgb, **settings)
    return regions == regions[y, x]


def require_points_inside(subject: str, points: Any, size: tuple[int, int]) -> list[tuple[float, float]]:
    """At least one point (x, y), all inside a picture of (H, W) pixels. Raises: MaskError naming `subject`."""
    height, width = size
    pairs = require_points(subject, points, 1)
    for x, y in pairs:
        if not (0 <= x < width and 0 <= y < height):
            expected = f"(x, y) with 0 <= x < {width} and 0 <= y < {height}"
            hint = "give pixels of the picture from its top left, x before y"
            raise MaskError("MASK_POINTS", subject, f"({x:g}, {y:g})", expected=expected, hint=hint)
    return pairs


def require_box_inside(subject: str, box: Any, size: tuple[int, int]) -> Box:
    """A box inside a picture of (H, W) pixels, with some of them in it. Raises: MaskError naming `subject`."""
    height, width = size
    checked = require_box(subject, box)
    if checked.left < 0 or checked.top < 0 or checked.right > width or checked.bottom > height:
        expected = f"0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
        hint = "give pixels of the picture from its top left"
        raise MaskError("MASK_BOX", subject, f"a box {tuple(checked)}", expected=expected, hint=hint)
    return checked


def _pixel(subject: str, point: Point, rgb: Rgb) -> tuple[int, int]:
    """The pixel x, y that a point lies in."""
    [(x, y)] = require_points_inside(subject, [point], rgb.shape[:2])
    return int(x), int(y)


def _scribble(argument: str, scribble: Any, size: tuple[int, int]) -> Hole:
    if scribble is None:
        return np.zeros(size, bool)
    drawn = np.asarray(scribble)
    if drawn.shape != size:
        found, expected = f"shape {drawn.shape}", f"{size}, as the picture has"
        raise MaskError(
            "MASK_SIZE", f"Mask.grabcut: {argument}", found, expected=expected, hint="draw it over the picture itself"
        )
    return drawn >= 0.5


def _is_object(labels: NDArray[np.uint8]) -> Hole:
    """Where OpenCV's labels are GC_FGD or GC_PR_FGD, its odd ones."""
    return labels % 2 == 1


def _require_both_sides(repainted: Hole) -> None:
    if repainted.any() and not repainted.all():
        return
    found = "they leave nothing to keep" if repainted.any() else "they leave nothing to repaint"
    hint = "GrabCut learns the colours of both: leave room around the object, or scribble on both sides"
    raise MaskError(
        "MASK_ONE_SIDED", "Mask.grabcut: box, keep and repaint", found, expected="some pixels of either", hint=hint
    )
