"""The larger canvas of outpainting, and the mask of the pixels to generate on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sdinpaint.checks import check_choice, check_whole
from sdinpaint.errors import ImageError, SettingError, said
from sdinpaint.images.boxes import Box
from sdinpaint.images.fills import NEUTRAL
from sdinpaint.images.input_image import InputImage
from sdinpaint.images.reading import MAX_PIXELS

__all__ = ["ANCHORS", "EXTENDING_FILLS", "OVERLAP", "Anchor", "ExtendingFill", "canvas_for", "extend", "sides_for"]

Soft = NDArray[np.float32]

OVERLAP = 16
"""Two latent cells: wherever the old edge lies, one repainted cell is wholly in the old image, and joins the two."""
MAX_SIDE = 2**20

ExtendingFill = Literal["edge", "reflect", "neutral"]
EXTENDING_FILLS: tuple[ExtendingFill, ...] = get_args(ExtendingFill)
_PADDINGS: dict[ExtendingFill, dict[str, Any]] = {
    "edge": {"mode": "edge"},
    "reflect": {"mode": "reflect"},
    "neutral": {"mode": "constant", "constant_values": NEUTRAL},
}
"""Fill of the new pixels -> arguments of `np.pad`."""

Anchor = Literal[
    "top-left", "top", "top-right",
    "left", "center", "right",
    "bottom-left", "bottom", "bottom-right",
]  # fmt: skip
ANCHORS: tuple[Anchor, ...] = get_args(Anchor)
"""Positions of the old image on the canvas, in three rows of three."""


def extend(
    image: InputImage,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    *,
    overlap: int = OVERLAP,
    fill: ExtendingFill = "edge",
) -> tuple[InputImage, Soft]:
    """Extend an image at its sides, and make the mask of what is generated there.

    The new pixels are opaque. The old pixels, their alpha and the colour profile stay as they are.

    Args:
        image: the image.
        left: new pixels at the left.
        right: new pixels at the right.
        top: new pixels at the top.
        bottom: new pixels at the bottom.
        overlap: pixels of the old image along the new ones that are repainted too, so that they join.
        fill: content of the new pixels before the run, one of EXTENDING_FILLS.

    Returns:
        The extended image, and the mask float32 (H, W), 1 = repaint.

    Raises:
        SettingError: an argument is out of range, no side is extended, or `overlap` leaves nothing of the old image
            known.
        ImageError: the canvas exceeds MAX_PIXELS.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    left, right, top, bottom = (check_whole(name, value, 0, MAX_SIDE) for name, value in sides.items())
    check_choice("fill", fill, EXTENDING_FILLS)
    if not any((left, right, top, bottom)):
        hint = "give pixels for at least one side; use inpaint to repaint pixels inside"
        raise SettingError("SETTING_SIDES", ", ".join(sides), "all are 0", expected="a larger canvas", hint=hint)
    overlap = check_whole("overlap", overlap, 0, MAX_SIDE)
    height, width = image.size
    _check_canvas(sides, (height + top + bottom, width + left + right))
    box = Box(left, top, left + width, top + height)
    old = box.slices
    known = (
        slice(old[0].start + overlap * (top > 0), old[0].stop - overlap * (bottom > 0)),
        slice(old[1].start + overlap * (left > 0), old[1].stop - overlap * (right > 0)),
    )
    if any(part.start >= part.stop for part in known):
        found = f"{overlap} pixels at each side that is extended, of an image of {height} rows, {width} columns"
        raise SettingError("SETTING_OVERLAP", "overlap", found, expected="less, so that part of the image stays known")
    widths = (top, bottom), (left, right)
    rgb = np.pad(image.opaque(), (*widths, (0, 0)), **_PADDINGS[fill])
    rgb[old] = image.rgb
    alpha = None if image.alpha is None else np.pad(image.alpha, widths, constant_values=255)
    mask = np.ones(rgb.shape[:2], dtype=np.float32)
    mask[known] = 0
    return replace(image, rgb=rgb, alpha=alpha, old=box), mask


def canvas_for(
    image: InputImage, *, size: Sequence[int] | None, anchor: Anchor, overlap: int, fill: ExtendingFill, **sides: int
) -> tuple[InputImage, Soft]:
    """Extend an image to a size, or by pixels at its sides.

    Args:
        image: the image.
        size: (height, width) of the canvas; None uses `sides`.
        anchor: position of the image on the canvas, one of ANCHORS.
        overlap: as in `extend`.
        fill: as in `extend`.
        sides: left, right, top and bottom, as in `extend`.

    Returns:
        The extended image, and the mask float32 (H, W), 1 = repaint.

    Raises:
        SettingError: an argument is invalid, or both `size` and `sides` are given.
        ImageError: the canvas exceeds MAX_PIXELS.
    """
    check_choice("anchor", anchor, ANCHORS)
    if size is not None:
        if any(sides.values()):
            found = f"{said(size)} together with pixels for a side"
            raise SettingError("SETTING_SIZE", "size", found, expected="only one of them")
        sides = sides_for(image.size, size, anchor)
    return extend(image, **sides, overlap=overlap, fill=fill)


def sides_for(old: tuple[int, int], size: Sequence[int], anchor: Anchor = "center") -> dict[str, int]:
    """Compute how many pixels `extend` must add at each side to reach a size.

    Args:
        old: (height, width) of the image.
        size: (height, width) of the canvas.
        anchor: position of the image on the canvas, one of ANCHORS; an odd pixel goes to the right and the bottom.

    Returns:
        The pixels by side: left, right, top, bottom.

    Raises:
        SettingError: `anchor` is unknown, or `size` is invalid or smaller than the image.
    """
    check_choice("anchor", anchor, ANCHORS)
    if not isinstance(size, list | tuple) or len(size) != len(old):
        raise SettingError("SETTING_SIZE", "size", said(size), expected="(height, width) in pixels")
    height, width = (check_whole("size", side, 1, MAX_SIDE) for side in size)
    down, across = height - old[0], width - old[1]
    if down < 0 or across < 0:
        found, expected = f"{height} rows, {width} columns", f"at least the image's {old[0]} rows, {old[1]} columns"
        raise SettingError("SETTING_SIZE", "size", found, expected=expected, hint="crop the image first")
    row, column = divmod(ANCHORS.index(anchor), 3)
    top, left = down * row // 2, across * column // 2
    return {"left": left, "right": across - left, "top": top, "bottom": down - top}


def _check_canvas(sides: dict[str, int], size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        widest = max(sides, key=lambda side: sides[side])
        found = f"{sides[widest]}, which makes a canvas of {size[0]} rows, {size[1]} columns"
        hint = "extend it by less, or scale the image down"
        raise ImageError("IMAGE_TOO_LARGE", widest, found, expected=f"at most {MAX_PIXELS} pixels", hint=hint)
