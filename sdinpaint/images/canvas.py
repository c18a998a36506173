"""The larger canvas of an outpainted picture, and the mask of what is new on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdinpaint.checks import check_choice, check_whole
from sdinpaint.errors import ImageError, SettingError
from sdinpaint.images.boxes import Box
from sdinpaint.images.files import MAX_PIXELS
from sdinpaint.images.fills import NEUTRAL
from sdinpaint.images.picture import Picture

__all__ = ["ANCHORS", "EXTENDING_FILLS", "OVERLAP", "canvas_for", "extend", "sides_for"]

Soft = NDArray[np.float32]

OVERLAP = 16
"""Two latent cells: wherever the old edge lies, one of them is wholly in the old picture and is painted to join it."""
MAX_SIDE = 2**20

PADDINGS: dict[str, dict[str, Any]] = {
    "edge": {"mode": "edge"},
    "reflect": {"mode": "reflect"},
    "neutral": {"mode": "constant", "constant_values": NEUTRAL},
}
EXTENDING_FILLS = tuple(PADDINGS)
"""What may stand on the new pixels before they are painted."""

START, MIDDLE, END = range(3)
ANCHORS = {
    "top-left": (START, START), "top": (START, MIDDLE), "top-right": (START, END),
    "left": (MIDDLE, START), "center": (MIDDLE, MIDDLE), "right": (MIDDLE, END),
    "bottom-left": (END, START), "bottom": (END, MIDDLE), "bottom-right": (END, END),
}  # fmt: skip
"""Where the old picture is on the canvas: along its height, along its width."""


def extend(
    picture: Picture,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    *,
    overlap: int = OVERLAP,
    fill: str = "edge",
) -> tuple[Picture, Soft]:
    """The picture with that many pixels more at its sides, and the mask (H, W) of what is to be painted there.

    The mask is 1 on the new pixels and on `overlap` pixels of the old picture along them. The new pixels are opaque
    and filled as `fill`, one of EXTENDING_FILLS, says; the old ones, their alpha and the profile stay as they are.
    Raises: SettingError naming the argument; ImageError where the canvas exceeds MAX_PIXELS.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    left, right, top, bottom = (check_whole(name, value, 0, MAX_SIDE) for name, value in sides.items())
    check_choice("fill", fill, EXTENDING_FILLS)
    if not any((left, right, top, bottom)):
        hint = "give pixels for at least one side; inpaint repaints what is inside"
        raise SettingError("SETTING_SIDES", ", ".join(sides), "all are 0", expected="a larger canvas", hint=hint)
    overlap = check_whole("overlap", overlap, 0, MAX_SIDE)
    height, width = picture.size
    _check_canvas(sides, (height + top + bottom, width + left + right))
    box = Box(left, top, left + width, top + height)
    old = box.slices
    known = (
        slice(old[0].start + overlap * (top > 0), old[0].stop - overlap * (bottom > 0)),
        slice(old[1].start + overlap * (left > 0), old[1].stop - overlap * (right > 0)),
    )
    if any(part.start >= part.stop for part in known):
        found = f"{overlap} pixels at each side that is extended, of a picture of {height} rows, {width} columns"
        raise SettingError("SETTING_OVERLAP", "overlap", found, expected="less, so that some of it stays known")
    widths = (top, bottom), (left, right)
    rgb = np.pad(picture.opaque(), (*widths, (0, 0)), **PADDINGS[fill])
    rgb[old] = picture.rgb
    alpha = None if picture.alpha is None else np.pad(picture.alpha, widths, constant_values=255)
    mask = np.ones(rgb.shape[:2], dtype=np.float32)
    mask[known] = 0
    return replace(picture, rgb=rgb, alpha=alpha, old=box), mask


def canvas_for(
    picture: Picture, *, size: Sequence[int] | None, anchor: str, overlap: int, fill: str, **sides: int
) -> tuple[Picture, Soft]:
    """`extend` to a `size` (H, W) with the picture at its `anchor`, or where that is None by `sides`."""
    check_choice("anchor", anchor, ANCHORS)
    if size is not None:
        if any(sides.values()):
            found = f"{size!r}, beside pixels for a side"
            raise SettingError("SETTING_SIZE", "size", found, expected="one of the two")
        sides = sides_for(picture.size, size, anchor)
    return extend(picture, **sides, overlap=overlap, fill=fill)


def sides_for(old: tuple[int, int], size: Sequence[int], anchor: str = "center") -> dict[str, int]:
    """What `extend` adds at left, right, top and bottom to make `size` (H, W) of the size `old`, both in pixels.

    anchor: one of ANCHORS, where the old picture is; an odd pixel goes to the right and the bottom.
    Raises: SettingError for another anchor, or a size that does not hold the picture.
    """
    check_choice("anchor", anchor, ANCHORS)
    if not isinstance(size, list | tuple) or len(size) != len(old):
        raise SettingError("SETTING_SIZE", "size", f"{size!r}", expected="(height, width) in pixels")
    height, width = (check_whole("size", side, 1, MAX_SIDE) for side in size)
    down, across = height - old[0], width - old[1]
    if down < 0 or across < 0:
        found, expected = f"{height} rows, {width} columns", f"at least the picture's {old[0]} rows, {old[1]} columns"
        raise SettingError("SETTING_SIZE", "size", found, expected=expected, hint="crop the picture first")
    place = ANCHORS[anchor]
    top, left = down * place[0] // END, across * place[1] // END
    return {"left": left, "right": across - left, "top": top, "bottom": down - top}


def _check_canvas(sides: dict[str, int], size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        widest = max(sides, key=lambda side: sides[side])
        found = f"{sides[widest]}, which makes a canvas of {size[0]} rows, {size[1]} columns"
        hint = "extend it by less, or scale the picture down"
        raise ImageError("IMAGE_TOO_LARGE", widest, found, expected=f"at most {MAX_PIXELS} pixels", hint=hint)
