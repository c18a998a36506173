"""Patches: an image or a crop of it as the models see it, its hole filled, padded to multiples of 8 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdinpaint.images.boxes import Box
from sdinpaint.images.crops import Crop
from sdinpaint.images.fills import Fill, fill_hole
from sdinpaint.images.input_image import pad_to_multiple, to_tensor
from sdinpaint.pipeline.requests import Item

__all__ = ["Patch", "cut_patch", "of_one_size", "whole"]


@dataclass(frozen=True, eq=False)
class Patch:
    """An image as the models see it: tensors (1, C, 8H, 8W), images in [-1, 1]."""

    item: Item
    crop: Crop
    image: Tensor
    start: Tensor
    """The image with its hole filled, from which a run of strength < 1 begins."""
    amount: Tensor
    """Strength of each pixel in [0, 1]; 0 and 1 for a mask that is not soft."""
    hint: Tensor | None
    """Conditioning image of a ControlNet in [0, 1], in place of the image."""


def cut_patch(
    item: Item,
    rgb: NDArray[np.uint8],
    hole: NDArray[np.bool_],
    crop: Crop,
    *,
    fill: Fill = "original",
    soft: bool = False,
) -> Patch:
    """Cut a patch out of an image as it is now.

    Args:
        item: the image as it was given, with what belongs to it.
        rgb: the image as it is now, uint8 (H, W, 3).
        hole: what is still to be repainted (H, W).
        crop: which part is shown, and at which size.
        fill: what the hole is filled with for a start from the image.
        soft: whether gray levels of the mask are kept.

    Returns:
        The patch.

    Raises:
        SettingError: the fill needs an extra that is not installed.
    """
    pixels, inside = crop.cut(rgb), crop.cut_hole(hole)
    amount = np.where(inside, crop.cut_soft(item.mask.array), 0) if soft else inside
    image = _padded(to_tensor(pixels))
    start = image if fill == "original" else _padded(to_tensor(fill_hole(pixels, amount >= 0.5, fill)))
    # reflected as the image is: pixels under the mask must not show in the padding
    amounts = _padded(torch.from_numpy(amount.astype(np.float32))[None, None])
    given = item.control_image
    hint = None if given is None else _padded(to_tensor(crop.cut(given.opaque()))) / 2 + 0.5
    return Patch(item, crop, image, start, amounts, hint)


def whole(size: tuple[int, int]) -> Crop:
    """Return the crop that is all of an image.

    Args:
        size: height and width in pixels.

    Returns:
        The crop, at the image's own size.
    """
    return Crop(Box(0, 0, size[1], size[0]), size)


def of_one_size(patches: dict[int, Patch], at_most: int | None = None) -> Iterator[dict[int, Patch]]:
    """Group patches by their padded size, as batches.

    Args:
        patches: patches by the indices of their images.
        at_most: largest number of patches in a batch.

    Yields:
        The patches of a batch by index.
    """
    groups: dict[torch.Size, list[int]] = {}
    for index, patch in patches.items():
        groups.setdefault(patch.image.shape, []).append(index)
    for indices in groups.values():
        length = at_most or len(indices)
        for start in range(0, len(indices), length):
            yield {index: patches[index] for index in indices[start : start + length]}


def _padded(image: Tensor) -> Tensor:
    padded, _ = pad_to_multiple(image)
    return padded
