"""How like a picture is to a reference, over all of it or under a mask."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sdinpaint.errors import ImageError, MaskError
from sdinpaint.metrics.inputs import check_hole, check_pictures

__all__ = ["gaussian", "psnr", "smoothed", "ssim"]

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]

RADIUS, SIGMA = 5, 1.5
"""Of SSIM's windows of 11 x 11 pixels."""
MIDDLE = 127.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(reference: Bytes, picture: Bytes, mask: Hole | None = None) -> float:
    """Peak signal-to-noise ratio in decibel of pictures (H, W, 3), over the pixels in mask (H, W); inf if identical.

    Raises: ImageError for pictures of two sizes, MaskError for an empty mask.
    """
    check_pictures(reference, picture)
    where = _where(mask, reference)
    error = float(((reference[where].astype(np.float64) - picture[where]) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(reference: Bytes, picture: Bytes, mask: Hole | None = None) -> float:
    """Structural similarity of pictures (H, W, 3) in -1..1, the mean of the three channels; 1 if identical.

    The mean is over the Gaussian windows of 11 x 11 pixels (sigma 1.5) that lie wholly in the picture and, with a
    mask (H, W), have their centres in it.
    Raises: ImageError for pictures of two sizes or below 11 pixels, MaskError where no window's centre is in the mask.
    Source: Wang, Bovik, Sheikh and Simoncelli, 2004.
    """
    check_pictures(reference, picture)
    if min(reference.shape[:2]) < 2 * RADIUS + 1:
        found, expected = f"{reference.shape[0]} rows, {reference.shape[1]} columns", "at least 11 a side, a window"
        raise ImageError("IMAGE_TOO_SMALL", "reference", found, expected=expected)
    where = _where(mask, reference, RADIUS)
    # about 0, so that float32 holds the squares
    x, y = (torch.from_numpy(one - np.float32(MIDDLE)).permute(2, 0, 1) for one in (reference, picture))
    mean_x, mean_y, xx, yy, xy = smoothed(torch.cat([x, y, x * x, y * y, x * y]), gaussian(SIGMA, RADIUS)).split(3)
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + MIDDLE, mean_y + MIDDLE
    structure = (2 * cov + C2) / (var_x + var_y + C2)
    similarity = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1) * structure
    return float(similarity[:, torch.from_numpy(where)].double().mean())


def gaussian(sigma: float, radius: int) -> Tensor:
    """Weights (2 * radius + 1,) of a Gaussian that sum to 1."""
    places = torch.arange(-radius, radius + 1, dtype=torch.float32, device="cpu")
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    return weights / weights.sum()


def smoothed(maps: Tensor, weights: Tensor) -> Tensor:
    """maps (C, H, W) with `weights` (K,) along both axes -> (C, H - K + 1, W - K + 1)."""
    maps = maps[None].contiguous(memory_format=torch.channels_last)  # three times as fast
    with torch.autocast(maps.device.type, enabled=False):  # means of so many pixels need float32
        for shape in ((-1, 1, len(weights), 1), (-1, 1, 1, len(weights))):
            maps = F.conv2d(maps, weights.expand(maps.shape[1], -1).reshape(shape), groups=maps.shape[1])
    return maps[0]


def _where(mask: Hole | None, picture: Bytes, border: int = 0) -> Hole:
    """The pixels to count, of the picture without its border. Raises: MaskError where there are none."""
    height, width = picture.shape[:2]
    inner = slice(border, height - border), slice(border, width - border)
    if mask is None:
        return np.ones((height, width), dtype=np.bool_)[inner]
    check_hole(mask, picture, "mask")
    if not mask[inner].any():
        found = f"no True pixel is {border} or more from the borders" if mask.any() else "no pixel is True"
        raise MaskError("MASK_EMPTY", "mask", found, expected="a pixel to measure", hint="leave the mask out for all")
    return mask[inner]
