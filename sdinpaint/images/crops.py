"""Only the masked region: the part of a picture that a model is shown, and the way there and back.

A hole is bool (H, W), True = repainted; pixels that a soft mask holds below its threshold are in none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from sdinpaint.checks import require_extra
from sdinpaint.errors import ImageError, MaskError, SettingError
from sdinpaint.images.boxes import Box

__all__ = ["AUTO", "Crop", "crop_box", "pooled", "regions", "working_size"]

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]
Soft = NDArray[np.float32]
Size = tuple[int, int]

AUTO = "auto"
SMALLEST_CONTEXT = 1 / 8
"""Of the model's side: with that much around it, the smallest hole is enlarged fourfold, and more would be blur."""
MAX_ELONGATION = 2
"""Longer side over shorter. The models were trained on squares; in long strips they repeat what is asked for."""
NEAR = 0.05
"""Difference in scale that is not worth resampling for."""


def crop_box(hole: Hole, context: int | str | None, size: int, multiple: int = 8) -> Box:
    """The box around the hole (H, W) with `context` pixels on each side, for a model trained at `size` pixels a side.

    "auto" takes half of the hole's longer side, so that most of what the model sees is known, and at least an eighth
    of `size`; None takes the whole picture. The box is at most twice as long as wide, has sides in multiples of
    `multiple`, and is shifted inwards at the picture's borders: all three as far as the picture allows.
    Raises: MaskError for an empty hole; SettingError for a context that is none or exceeds the picture.
    """
    if not hole.any():
        hint = "make at least one pixel white: 128 of 255, or 0.5, and more is repainted"
        raise MaskError("MASK_EMPTY", "mask", "nothing in it is repainted", expected="a hole to crop around", hint=hint)
    if context is None:
        return Box(0, 0, hole.shape[1], hole.shape[0])
    rows, columns = _span(hole, axis=0), _span(hole, axis=1)
    extents = [high - low for low, high in (rows, columns)]
    around = _context(context, max(extents), hole.shape, size)
    lengths = [_multiple_from(extent + 2 * around, multiple) for extent in extents]
    shortest = _multiple_from(-(-max(lengths) // MAX_ELONGATION), multiple)
    top, bottom = _placed(rows, max(lengths[0], shortest), hole.shape[0])
    left, right = _placed(columns, max(lengths[1], shortest), hole.shape[1])
    return Box(left, top, right, bottom)


def working_size(box_size: Size, size: int, multiple: int = 8) -> Size:
    """What a box (h, w) is scaled to: its shape, about size * size pixels, multiples of `multiple`.

    Where the scale is within 5 % of 1 the box stays as it is. Multiples of 8 are a latent cell; the UNet takes any,
    and the 64 that would fill its coarsest level too would stretch a picture by up to 9 %.
    """
    scale = size / math.sqrt(math.prod(box_size))
    if abs(scale - 1) <= NEAR:
        return box_size
    height, width = (max(multiple, multiple * round(side * scale / multiple)) for side in box_size)
    return height, width


def regions(hole: Hole, gap: int) -> list[Hole]:
    """The connected regions of the hole (H, W), largest first; fewer than `gap` known pixels between two join them.

    Distances count a diagonal step as one. No two overlap, and together they are the hole.
    Raises: SettingError where `gap` is no whole number from 0, or without the extra `mask`.
    """
    if not _is_whole(gap) or gap < 0:
        raise SettingError("SETTING_GAP", "gap", f"{gap!r}", expected="a whole number of pixels, 0 or more")
    ndimage = require_extra("scipy.ndimage", extra="mask", what="splitting a mask into regions")
    # Squares of `gap` pixels around two pixels touch exactly where fewer than `gap` pixels are between them.
    grown = ndimage.maximum_filter(hole, size=max(gap, 1), mode="constant")
    labels = np.where(hole, ndimage.label(grown, structure=np.ones((3, 3)))[0], 0)
    areas = np.bincount(labels.ravel())[1:]
    return [labels == index + 1 for index in np.argsort(-areas, kind="stable")]


@dataclass(frozen=True)
class Crop:
    """A box of a picture and the size (h, w) at which a model works on it."""

    box: Box
    size: Size

    def cut(self, rgb: Bytes) -> Bytes:
        """The box of rgb (H, W, 3) at working size. Raises: ImageError where the box is not inside."""
        return _scaled(self._part(rgb, "image"), self.size)

    def cut_hole(self, hole: Hole) -> Hole:
        """The box of hole (H, W) at working size: a pixel that any repainted one touches is repainted."""
        return pooled(self._part(hole, "mask"), self.size) > 0

    def cut_soft(self, mask: Soft) -> Soft:
        """The box of mask (H, W) at working size; bilinear, because LANCZOS leaves [0, 1]."""
        part = Image.fromarray(self._part(mask, "mask"))
        return np.array(part.resize(self.size[::-1], Image.Resampling.BILINEAR))

    def put_back(self, generated: Bytes, into: Bytes) -> Bytes:
        """A copy of `into` (H, W, 3) with generated (h, w, 3) in the box; exact where the box has the working size.

        Raises: ImageError where `generated` has another size, or the box is not inside `into`.
        """
        if generated.shape != (*self.size, 3):
            expected = f"{(*self.size, 3)}, the crop's working size"
            found = f"an array {generated.shape}"
            raise ImageError("IMAGE_BAD_SHAPE", "generated", found, expected=expected, hint="crop the padding off")
        whole = into.copy()
        part = self._part(whole, "into")
        part[...] = _scaled(generated, self.box.size)
        return whole

    def _part(self, array: NDArray[Any], argument: str) -> NDArray[Any]:
        left, top, right, bottom = self.box
        height, width = array.shape[:2]
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            found = f"{height} rows, {width} columns, for {self.box}"
            hint = "make the crop for this picture's own mask"
            raise ImageError("IMAGE_BAD_SHAPE", argument, found, expected="a picture that holds the box", hint=hint)
        return array[self.box.slices]


def pooled(values: NDArray[Any], size: Size) -> Soft:
    """values (H, W) at another size (h, w): the largest of those that each pixel touches."""
    pixels = torch.from_numpy(values.astype(np.float32))
    largest: Soft = F.adaptive_max_pool2d(pixels[None], size)[0].numpy()
    return largest


def _scaled(rgb: Bytes, size: Size) -> Bytes:
    """rgb at another size (h, w); Pillow copies it bit for bit where that is its own."""
    return np.asarray(Image.fromarray(rgb).resize(size[::-1], Image.Resampling.LANCZOS))


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _context(context: Any, extent: int, shape: tuple[int, ...], size: int) -> int:
    """Pixels of context for a hole whose longer side is `extent`. Raises: SettingError."""
    if context == AUTO:
        return max(extent // 2, round(size * SMALLEST_CONTEXT))
    if not _is_whole(context):
        expected = f"{AUTO!r}, None, or a whole number of pixels"
        raise SettingError("SETTING_CROP", "crop", f"{context!r}", expected=expected)
    if not 0 <= context <= max(shape):
        found = f"{context} pixels around the hole, in a picture of {shape[0]} rows, {shape[1]} columns"
        expected = f"0 to {max(shape)} pixels, the picture's longer side"
        raise SettingError("SETTING_CROP", "crop", found, expected=expected, hint=f"crop={AUTO!r} chooses for you")
    return int(context)


def _span(hole: Hole, axis: int) -> tuple[int, int]:
    """Where the hole starts and stops along an axis; it is not empty."""
    where = np.flatnonzero(hole.any(axis=1 - axis))
    return int(where[0]), int(where[-1]) + 1


def _multiple_from(length: int, multiple: int) -> int:
    """The first multiple that is not below `length`, and not 0."""
    return max(1, -(-length // multiple)) * multiple


def _placed(span: tuple[int, int], length: int, whole: int) -> tuple[int, int]:
    """Start and stop of `length` pixels centred on the span, shifted inside 0 to `whole`, and no longer than that."""
    length = min(length, whole)
    start = min(max((sum(span) - length) // 2, 0), whole - length)
    return start, start + length
