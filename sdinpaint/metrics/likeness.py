"""Similarity of an image to a reference, over the whole image or under a mask."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sdinpaint.errors import ImageError, MaskError
from sdinpaint.metrics.inputs import check_hole, check_images

__all__ = ["gaussian", "psnr", "smoothed", "ssim"]

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]

RADIUS, SIGMA = 5, 1.5
"""Radius and standard deviation in pixels of SSIM's windows of 11 x 11 pixels."""
MIDDLE = 127.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(reference: Bytes, image: Bytes, mask: Hole | None = None) -> float:
    """Compute the peak signal-to-noise ratio in decibels; it is infinite for identical images.

    Args:
        reference: uint8 (H, W, 3).
        image: uint8 (H, W, 3).
        mask: bool (H, W) of the pixels that count; None is all of them.

    Returns:
        The ratio in dB.

    Raises:
        ImageError: the images differ in size.
        MaskError: the mask is empty.
    """
    check_images(reference, image)
    where = _where(mask, reference)
    error = float(((reference[where].astype(np.float64) - image[where]) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(reference: Bytes, image: Bytes, mask: Hole | None = None) -> float:
    """Compute the structural similarity in -1..1 as the mean of the three channels; it is 1 for identical images.

    The mean is over the Gaussian windows of 11 x 11 pixels (sigma 1.5) that lie wholly in the image and, with a mask,
    have their centres in it.

    Args:
        reference: uint8 (H, W, 3).
        image: uint8 (H, W, 3).
        mask: bool (H, W) of the centres that count; None is all of them.

    Returns:
        The similarity.

    Raises:
        ImageError: the images differ in size, or have a side below 11 pixels.
        MaskError: no window has its centre in the mask.

    Source: Wang, Bovik, Sheikh and Simoncelli, 2004.
    """
    check_images(reference, image)
    if min(reference.shape[:2]) < 2 * RADIUS + 1:
        found, expected = (
            f"{reference.shape[0]} rows, {reference.shape[1]} columns",
            "at least 11 pixels a side, the size of a window",
        )
        raise ImageError("IMAGE_TOO_SMALL", "reference", found, expected=expected)
    where = _where(mask, reference, RADIUS)
    # centred on 0, so that float32 holds the squares
    x, y = (torch.from_numpy(one - np.float32(MIDDLE)).permute(2, 0, 1) for one in (reference, image))
    mean_x, mean_y, xx, yy, xy = smoothed(torch.cat([x, y, x * x, y * y, x * y]), gaussian(SIGMA, RADIUS)).split(3)
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + MIDDLE, mean_y + MIDDLE
    structure = (2 * cov + C2) / (var_x + var_y + C2)
    similarity = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1) * structure
    return float(similarity[:, torch.from_numpy(where)].double().mean())


def gaussian(sigma: float, radius: int) -> Tensor:
    """Compute the weights of a Gaussian window, which sum to 1.

    Args:
        sigma: standard deviation in pixels.
        radius: pixels from the centre to the end.

    Returns:
        float32 (2 * radius + 1,).
    """
    places = torch.arange(-radius, radius + 1, dtype=torch.float32, device="cpu")
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    return weights / weights.sum()


def smoothed(maps: Tensor, weights: Tensor) -> Tensor:
    """Filter maps by the same weights along both axes.

    Args:
        maps: (C, H, W).
        weights: (K,).

    Returns:
        The filtered maps (C, H - K + 1, W - K + 1).
    """
    maps = maps[None].contiguous(memory_format=torch.channels_last)  # three times as fast
    with torch.autocast(maps.device.type, enabled=False):  # means of many pixels need float32
        for shape in ((-1, 1, len(weights), 1), (-1, 1, 1, len(weights))):
            maps = F.conv2d(maps, weights.expand(maps.shape[1], -1).reshape(shape), groups=maps.shape[1])
    return maps[0]


def _where(mask: Hole | None, image: Bytes, border: int = 0) -> Hole:
    """Return the pixels that count, of the image without its border."""
    height, width = image.shape[:2]
    inner = slice(border, height - border), slice(border, width - border)
    if mask is None:
        return np.ones((height, width), dtype=np.bool_)[inner]
    check_hole(mask, image, "mask")
    if not mask[inner].any():
        found = f"no True pixel is {border} or more from the borders" if mask.any() else "no pixel is True"
        raise MaskError(
            "MASK_EMPTY",
            "mask",
            found,
            expected="at least one pixel to measure",
            hint="omit the mask to measure all pixels",
        )
    return mask[inner]
