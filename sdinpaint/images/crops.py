"""Cropping to the masked region: the part of an image that a model works on, and how it is cut and put back.

A hole is bool (H, W), True = repainted: where a mask reaches its threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdinpaint.checks import require_extra
from sdinpaint.errors import ImageError, MaskError, SettingError, said
from sdinpaint.images.boxes import Box

__all__ = ["AUTO", "Crop", "check_context", "crop_box", "pooled", "regions", "working_size"]

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]
Soft = NDArray[np.float32]
Size = tuple[int, int]

AUTO = "auto"
SMALLEST_CONTEXT = 1 / 8
"""Least context as a share of the model's side: with less, the smallest hole is enlarged more than fourfold."""
MAX_ELONGATION = 2
"""Largest ratio of the sides. The models were trained on squares; in long strips they repeat the subject."""
NEAR = 0.05
"""Largest difference of a scale from 1 at which a crop is not resampled."""


def crop_box(hole: Hole, context: int | str | None, size: int, multiple: int = 8) -> Box:
    """Compute the box around a hole that a model works on.

    The box is at most twice as long as wide, has sides in multiples of `multiple`, and is shifted inwards at the
    borders of the image, all three as far as the image allows.

    Args:
        hole: (H, W), True = repainted.
        context: pixels around the hole; "auto" is half of the hole's longer side, but at least an eighth of `size`;
            None gives the whole image.
        size: height and width in pixels at which the model was trained.
        multiple: pixels that the sides are multiples of.

    Returns:
        The box.

    Raises:
        MaskError: the hole is empty.
        SettingError: `context` is invalid, or exceeds the image.
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
    """Compute the size to which a box is scaled for the model: the same shape with about `size` * `size` pixels.

    A box whose scale is within 5 % of 1 is not resampled.

    Args:
        box_size: (height, width) of the box.
        size: height and width in pixels at which the model was trained.
        multiple: pixels that the sides are multiples of. A latent cell is 8 pixels; multiples of 64, which fill the
            UNet's coarsest level too, would distort an image by up to 9 %.

    Returns:
        (height, width) in pixels.
    """
    scale = size / math.sqrt(math.prod(box_size))
    if abs(scale - 1) <= NEAR:
        return box_size
    height, width = (max(multiple, multiple * round(side * scale / multiple)) for side in box_size)
    return height, width


def regions(hole: Hole, gap: int) -> list[Hole]:
    """Split a hole into its connected regions, the largest first.

    Args:
        hole: (H, W), True = repainted.
        gap: regions with fewer known pixels between them are joined; a diagonal step counts as one pixel.

    Returns:
        One hole (H, W) per region; none overlap, and together they are the hole.

    Raises:
        SettingError: `gap` is not a whole number from 0 on, or the extra `mask` is not installed.
    """
    if not _is_whole(gap) or gap < 0:
        raise SettingError("SETTING_GAP", "gap", said(gap), expected="a whole number of pixels, 0 or more")
    ndimage = require_extra("scipy.ndimage", extra="mask", what="splitting a mask into regions")
    # squares of `gap` pixels around two pixels touch exactly if fewer than `gap` pixels are between them
    grown = ndimage.maximum_filter(hole, size=max(gap, 1), mode="constant")
    labels = np.where(hole, ndimage.label(grown, structure=np.ones((3, 3)))[0], 0)
    areas = np.bincount(labels.ravel())[1:]
    return [labels == index + 1 for index in np.argsort(-areas, kind="stable")]


@dataclass(frozen=True)
class Crop:
    """A box of an image, and the size (height, width) at which a model works on it."""

    box: Box
    size: Size

    def cut(self, rgb: Bytes) -> Bytes:
        """Cut the box out of an image and scale it.

        Args:
            rgb: the image (H, W, 3).

        Returns:
            The crop (h, w, 3) at working size.

        Raises:
            ImageError: the box is not inside the image.
        """
        return _scaled(self._part(rgb, "image"), self.size)

    def cut_hole(self, hole: Hole) -> Hole:
        """Cut the box out of a hole and scale it; a pixel that touches any repainted pixel is repainted.

        Args:
            hole: (H, W), True = repainted.

        Returns:
            The crop (h, w) at working size.

        Raises:
            ImageError: the box is not inside the hole's image.
        """
        return pooled(self._part(hole, "mask"), self.size) > 0

    def cut_soft(self, mask: Soft) -> Soft:
        """Cut the box out of a soft mask and scale it, bilinearly because Lanczos would leave [0, 1].

        Args:
            mask: float32 (H, W) in [0, 1].

        Returns:
            The crop (h, w) at working size.

        Raises:
            ImageError: the box is not inside the mask's image.
        """
        part = Image.fromarray(self._part(mask, "mask"))
        return np.array(part.resize(self.size[::-1], Image.Resampling.BILINEAR))

    def put_back(self, generated: Bytes, into: Bytes) -> Bytes:
        """Put a generated crop back into an image; pixels are copied exactly where the box has the working size.

        Args:
            generated: the crop (h, w, 3) at working size.
            into: the image (H, W, 3).

        Returns:
            A copy of the image with the crop in the box.

        Raises:
            ImageError: `generated` has another size, or the box is not inside the image.
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
            hint = "make the crop from this image's own mask"
            raise ImageError("IMAGE_BAD_SHAPE", argument, found, expected="an image that holds the box", hint=hint)
        return array[self.box.slices]


def pooled(values: NDArray[Any], size: Size) -> Soft:
    """Scale a map by taking the largest of the values that each new pixel touches.

    Args:
        values: (H, W).
        size: the new (height, width).

    Returns:
        The map as float32 (h, w).
    """
    largest = values.astype(np.float32)
    for axis, (old, new) in enumerate(zip(values.shape[:2], size, strict=True)):
        edges = old * np.arange(new + 1)
        spans = np.stack([edges[:-1] // new, -(-edges[1:] // new)], axis=1)
        one_more = np.pad(largest, [(0, int(axis == at)) for at in range(2)])  # the end of a span must be an index
        largest = np.maximum.reduceat(one_more, spans.ravel(), axis).take(range(0, 2 * new, 2), axis)
    return largest


def _scaled(rgb: Bytes, size: Size) -> Bytes:
    """Scale rgb to a size (h, w); Pillow copies it bit for bit where the size stays the same."""
    return np.asarray(Image.fromarray(rgb).resize(size[::-1], Image.Resampling.LANCZOS))


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_context(context: Any, shape: Sequence[int]) -> None:
    """Check the pixels of context around a hole.

    Args:
        context: "auto", None, or a number of pixels.
        shape: (height, width) of the image in pixels.

    Raises:
        SettingError: it is something else, or more than the image's longer side.
    """
    if context is None or context == AUTO:
        return
    if not _is_whole(context):
        expected = f"{AUTO!r}, None, or a whole number of pixels"
        raise SettingError("SETTING_CROP", "crop", said(context), expected=expected)
    if not 0 <= context <= max(shape):
        found = f"{context} pixels around the hole, in an image of {shape[0]} rows, {shape[1]} columns"
        expected = f"0 to {max(shape)} pixels, the image's longer side"
        raise SettingError("SETTING_CROP", "crop", found, expected=expected, hint=f"crop={AUTO!r} chooses a number")


def _context(context: Any, extent: int, shape: Sequence[int], size: int) -> int:
    """Return the pixels of context for a hole whose longer side is `extent`."""
    check_context(context, shape)
    return max(extent // 2, round(size * SMALLEST_CONTEXT)) if context == AUTO else int(context)


def _span(hole: Hole, axis: int) -> tuple[int, int]:
    """Return the first and one past the last index of the hole along an axis."""
    where = np.flatnonzero(hole.any(axis=1 - axis))
    return int(where[0]), int(where[-1]) + 1


def _multiple_from(length: int, multiple: int) -> int:
    """Return the first positive multiple that is not below `length`."""
    return max(1, -(-length // multiple)) * multiple


def _placed(span: tuple[int, int], length: int, whole: int) -> tuple[int, int]:
    """Return start and stop of `length` pixels centred on the span, shifted into 0 to `whole`."""
    length = min(length, whole)
    start = min(max((sum(span) - length) // 2, 0), whole - length)
    return start, start + length
