"""Contact sheets: images beside each other with captions, and the difference that a run made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFont

from sdinpaint.errors import ImageError
from sdinpaint.images.boxes import Box
from sdinpaint.images.crops import pooled

__all__ = ["Cell", "Row", "contact_sheet", "heat_map", "review_row", "tinted"]

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]
Cell = tuple[Image.Image, str]
"""An image and its caption."""
Row = Sequence[Cell]

PAPER, INK, GREY, FRAME = (250, 249, 246), (34, 36, 40), (122, 124, 128), (214, 212, 206)
TINT = (255, 0, 140)
MARGIN, GAP, CAPTION_GAP = 48, 28, 10
TITLE_SIZE, CAPTION_SIZE, LEADING = 30, 17, 1.35

CELL_SIDE = 320
"""Pixels of the longer side of a cell in a review."""
MAX_CROPS = 3
HEAT = {
    0: (255, 255, 255),
    1: (255, 240, 190),
    8: (254, 204, 112),
    32: (240, 118, 62),
    96: (178, 30, 72),
    255: (44, 8, 56),
}
"""Levels of change -> colour, the darker the larger, interpolated in between. White is no change at all."""
HEAT_KEY = "levels: yellow 8, orange 32, red 96"


def tinted(image: NDArray[np.uint8], hole: NDArray[np.bool_]) -> Image.Image:
    """Show a hole over an image in a bright colour.

    Args:
        image: uint8 (H, W, 3).
        hole: bool (H, W).

    Returns:
        The RGB image.
    """
    mixed = np.where(hole[..., None], 0.4 * image + 0.6 * np.array(TINT), image)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def heat_map(original: Bytes, image: Bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """Show how far two images differ; the colours of HEAT are fixed, so that maps compare.

    The difference of a pixel is that of its channel that differs most, 0 to 255 levels.

    Args:
        original: uint8 (H, W, 3).
        image: uint8 (H, W, 3).
        size: (height, width) of the map, in which each pixel shows the largest difference under it; None is the size of
            the images.

    Returns:
        The map as an RGB image.

    Raises:
        ImageError: the sizes differ.
    """
    _check_shapes(original, image)
    levels = _levels(original, image)
    if size is not None:
        levels = pooled(levels, size)
    channels = zip(*HEAT.values(), strict=True)
    colours = [np.interp(levels, list(HEAT), channel) for channel in channels]
    return Image.fromarray(np.rint(np.stack(colours, axis=2)).astype(np.uint8))


def review_row(original: Bytes, hole: Hole, image: Bytes, *, boxes: Sequence[Box] = (), caption: str = "") -> Row:
    """Make the row of a contact sheet that reviews a run: original, hole, result, difference and crops.

    Cells have at most CELL_SIDE pixels a side; smaller images are enlarged by a whole factor.

    Args:
        original: the original image, uint8 (H, W, 3).
        hole: (H, W), True = repainted.
        image: the result, uint8 (H, W, 3).
        boxes: the crops that the model worked on; they are outlined over the hole, and the result is shown in the first
            MAX_CROPS of them.
        caption: caption of the result.

    Returns:
        The cells of the row.

    Raises:
        ImageError: the sizes differ.
    """
    _check_shapes(original, image, hole)
    boxes = [box for box in boxes if box.size != hole.shape]
    size = _cell_size(hole.shape)
    before = _fitted(original, size)
    known = np.count_nonzero(_levels(original, image)[~hole])
    over = tinted(np.asarray(before), pooled(hole, size) > 0)
    crops = [
        (_fitted(image[box.slices], _cell_size(box.size)), f"the crop\n{box.size[1]} x {box.size[0]} pixels")
        for box in boxes[:MAX_CROPS]
    ]
    return [
        (before, f"the image\n{hole.shape[1]} x {hole.shape[0]} pixels"),
        (_outlined(over, boxes, max(size) / max(hole.shape)), f"the hole\n{hole.sum()} pixels, {hole.mean():.1%}"),
        (_fitted(image, size), caption or "the result"),
        (heat_map(original, image, size), f"the difference\nknown pixels changed: {known}\n{HEAT_KEY}"),
        *crops,
    ]


def contact_sheet(rows: Sequence[Row], *, title: str = "", scale: int = 2) -> Image.Image:
    """Lay out rows of images on a light ground, each with its caption below.

    The first line of a caption is dark, and further lines are grey; long lines are wrapped to the width of the image.

    Args:
        rows: cells (image, caption) by row.
        title: text at the top.
        scale: factor by which the images are enlarged.

    Returns:
        The sheet as an RGB image.
    """
    cells = [cell for row in rows for cell in row]
    width = scale * max(image.width for image, _ in cells)
    font = ImageFont.load_default(CAPTION_SIZE)
    captions = {caption: _wrapped(caption, font, width) for _, caption in cells}
    line = round(CAPTION_SIZE * LEADING)
    heights = [
        max(scale * image.height + CAPTION_GAP + line * len(captions[caption]) for image, caption in row) + GAP
        for row in rows
    ]
    head = MARGIN + (2 * TITLE_SIZE if title else 0)
    size = 2 * MARGIN + max(map(len, rows)) * (width + GAP) - GAP, head + sum(heights) - GAP + MARGIN
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - TITLE_SIZE // 4), title, fill=INK, font=ImageFont.load_default(TITLE_SIZE))
    for row, top in zip(rows, accumulate(heights, initial=head), strict=False):
        for column, (image, caption) in enumerate(row):
            left = MARGIN + column * (width + GAP)
            large = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
            sheet.paste(large, (left, top))
            bottom = top + large.height
            draw.rectangle((left - 1, top - 1, left + large.width, bottom), outline=FRAME)
            for number, (text, color) in enumerate(captions[caption]):
                draw.text((left, bottom + CAPTION_GAP + number * line), text, fill=color, font=font)
    return sheet


def _wrapped(
    caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[tuple[str, tuple[int, int, int]]]:
    """Wrap a caption to lines with their colours, none wider than `width` unless a single word is."""
    lines = []
    for paragraph, color in zip(caption.split("\n"), [INK] + [GREY] * caption.count("\n"), strict=True):
        text = ""
        for word in paragraph.split():
            longer = f"{text} {word}".strip()
            if text and font.getlength(longer) > width:
                lines.append((text, color))
                longer = word
            text = longer
        lines.append((text, color))
    return lines


def _check_shapes(original: Bytes, image: Bytes, hole: Hole | None = None) -> None:
    size = original.shape[:2]
    if not original.shape == image.shape == (*size, 3) or (hole is not None and hole.shape != size):
        given = f"{image.shape}" if hole is None else f"{image.shape} and a hole {hole.shape}"
        found = f"an array {given}, for an original {original.shape}"
        expected, hint = "(height, width, 3) of one size", "compare with its own original"
        raise ImageError("IMAGE_BAD_SHAPE", "image", found, expected=expected, hint=hint)


def _levels(original: Bytes, image: Bytes) -> NDArray[Any]:
    """Return the largest difference of the channels of pixels (H, W, 3): (H, W), 0 to 255."""
    difference = ImageChops.difference(Image.fromarray(original), Image.fromarray(image))
    return np.asarray(reduce(ImageChops.lighter, difference.split()))


def _cell_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Return the size in a cell: a whole multiple of a small image, or a large image scaled down."""
    height, width = size
    longer = max(size)
    if longer <= CELL_SIDE:
        factor = CELL_SIDE // longer
        return height * factor, width * factor
    return max(1, round(height * CELL_SIDE / longer)), max(1, round(width * CELL_SIDE / longer))


def _fitted(rgb: Bytes, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(rgb).resize(size[::-1], Image.Resampling.LANCZOS)


def _outlined(image: Image.Image, boxes: Sequence[Box], scale: float) -> Image.Image:
    """Draw the outlines of boxes, given in pixels of the image before it was scaled."""
    draw = ImageDraw.Draw(image)
    for box in boxes:
        left, top, right, bottom = (round(side * scale) for side in box)
        corners = left, top, max(left, right - 1), max(top, bottom - 1)
        draw.rectangle(corners, outline=PAPER, width=4)
        draw.rectangle(corners, outline=INK, width=2)
    return image
