"""Masks from the pixels of an image: the object in a box or under scribbles, and the area that is alike around a point.

Images are uint8 (H, W, 3), points (x, y) in pixels, and holes bool (H, W), True = repaint.
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
"""Distance of black from white in CIELAB, with a margin for rounding."""


def grabcut(
    rgb: Rgb, box: Sequence[int] | None = None, keep: Any = None, repaint: Any = None, iterations: int = 5
) -> Hole:
    """Find the object in a box or under scribbles; the same call always gives the same bits.

    Args:
        rgb: the image (H, W, 3).
        box: (left, top, right, bottom); everything outside is kept, except for what `repaint` covers.
        keep: a mask (H, W) over pixels that are surely kept.
        repaint: a mask (H, W) over pixels that surely belong to the object.
        iterations: rounds of fitting the colours of both sides.

    Returns:
        The object as a hole (H, W).

    Raises:
        MaskError: there is neither a box nor `repaint`, they leave only one side, or one is invalid.
        SettingError: `iterations` is not a whole number from 1 to 1000, or the extra `mask` is not installed.

    Source: Rother et al. 2004, "GrabCut", in OpenCV's implementation.
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
            "MASK_SCRIBBLES", "Mask.grabcut: keep", found, expected="pixels of its own", hint="erase one of them there"
        )
    labels[kept], labels[repainted] = cv2.GC_BGD, cv2.GC_FGD
    _require_both_sides(_is_object(labels))

    def cut() -> None:
        cv2.grabCut(np.ascontiguousarray(rgb), labels, None, None, None, rounds, cv2.GC_INIT_WITH_MASK)

    # GrabCut draws from OpenCV's random generator, which cannot be reset; every new thread starts with a fresh one.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(cut).result()
    return _is_object(labels)


def flood(rgb: Rgb, point: Point, tolerance: float = 0.1) -> Hole:
    """Find the pixels that are coloured like a point and joined to it by edges of such pixels.

    Args:
        rgb: the image (H, W, 3).
        point: (x, y) in pixels.
        tolerance: largest distance in CIELAB from the colour at the point; 0 is the same colour, 1 is black to white.

    Returns:
        These pixels as a hole (H, W).

    Raises:
        MaskError: `point` is not inside the image.
        SettingError: `tolerance` is not from 0 to 1, or the extra `mask` is not installed.
    """
    color = require_extra("skimage.color", extra="mask", what="Mask.flood")
    segmentation = require_extra("skimage.segmentation", extra="mask", what="Mask.flood")
    limit = LAB_RANGE * check_number("tolerance", tolerance, 0, 1, of="Mask.flood")
    x, y = _pixel("Mask.flood: point", point, rgb)
    lab = color.rgb2lab(rgb)
    distance = color.deltaE_cie76(lab, lab[y, x])
    # edges only: across corners, the area would leak through a slanted line one pixel wide
    return segmentation.flood(distance, (y, x), connectivity=1, tolerance=limit)


def region(rgb: Rgb, point: Point, scale: float = 200.0, sigma: float = 0.8, min_size: int = 50) -> Hole:
    """Divide the image into regions along its edges, and find the region that holds a point.

    Args:
        rgb: the image (H, W, 3).
        point: (x, y) in pixels.
        scale: a larger value gives larger regions.
        sigma: width in pixels of the Gaussian that smooths the image first.
        min_size: pixels of the smallest region.

    Returns:
        The region as a hole (H, W).

    Raises:
        MaskError: `point` is not inside the image.
        SettingError: another argument is out of range, or the extra `mask` is not installed.

    Source: Felzenszwalb and Huttenlocher 2004, "Efficient graph-based image segmentation", in scikit-image's
    implementation.
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
    """Check that there is at least one point, and that all lie inside an image.

    Args:
        subject: name that an error gives to the points.
        points: a sequence of (x, y) in pixels.
        size: (height, width) of the image.

    Returns:
        The points as pairs of Python floats.

    Raises:
        MaskError: there is no point, or one lies outside.
    """
    height, width = size
    pairs = require_points(subject, points, 1)
    for x, y in pairs:
        if not (0 <= x < width and 0 <= y < height):
            expected = f"(x, y) with 0 <= x < {width} and 0 <= y < {height}"
            hint = "give pixels from the top left corner of the image, x before y"
            raise MaskError("MASK_POINTS", subject, f"({x:g}, {y:g})", expected=expected, hint=hint)
    return pairs


def require_box_inside(subject: str, box: Any, size: tuple[int, int]) -> Box:
    """Check that a box lies inside an image and holds at least one pixel.

    Args:
        subject: name that an error gives to the box.
        box: (left, top, right, bottom) in pixels.
        size: (height, width) of the image.

    Returns:
        The box.

    Raises:
        MaskError: the box is invalid, or does not lie inside.
    """
    height, width = size
    checked = require_box(subject, box)
    if checked.left < 0 or checked.top < 0 or checked.right > width or checked.bottom > height:
        expected = f"0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
        hint = "give pixels from the top left corner of the image"
        raise MaskError("MASK_BOX", subject, f"a box {tuple(checked)}", expected=expected, hint=hint)
    return checked


def _pixel(subject: str, point: Point, rgb: Rgb) -> tuple[int, int]:
    """Return the pixel (x, y) that a point lies in."""
    [(x, y)] = require_points_inside(subject, [point], rgb.shape[:2])
    return int(x), int(y)


def _scribble(argument: str, scribble: Any, size: tuple[int, int]) -> Hole:
    if scribble is None:
        return np.zeros(size, bool)
    drawn = np.asarray(scribble)
    if drawn.shape != size:
        found, expected = f"shape {drawn.shape}", f"{size}, as the image has"
        raise MaskError(
            "MASK_SIZE", f"Mask.grabcut: {argument}", found, expected=expected, hint="draw it over the image itself"
        )
    return drawn >= 0.5


def _is_object(labels: NDArray[np.uint8]) -> Hole:
    """Find OpenCV's labels GC_FGD and GC_PR_FGD, which are its odd ones."""
    return labels % 2 == 1


def _require_both_sides(repainted: Hole) -> None:
    if repainted.any() and not repainted.all():
        return
    found = "they leave nothing to keep" if repainted.any() else "they leave nothing to repaint"
    hint = "GrabCut fits the colours of both: leave room around the object, or scribble on both sides"
    raise MaskError(
        "MASK_ONE_SIDED", "Mask.grabcut: box, keep and repaint", found, expected="some pixels of both", hint=hint
    )
