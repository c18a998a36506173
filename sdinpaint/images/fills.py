"""What stands in the hole when a run starts from the picture: what strength below 1 begins with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sdinpaint.checks import check_choice, require_extra

__all__ = ["FILLS", "NEUTRAL", "fill_hole", "spread"]

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]

NEUTRAL = 128
"""Mid grey. The models' 0 lies between levels 127 and 128, and `images.to_uint8` makes 128 of it."""
TELEA_RADIUS = 3.0
"""Pixels around each one that cv2.inpaint looks at, as in OpenCV's own examples."""


def fill_hole(rgb: Bytes, hole: Hole, fill: str) -> Bytes:
    """rgb (H, W, 3) with its hole (H, W) filled as one of `FILLS` says; known pixels stay bit for bit.

    "original" leaves what is there. "blur" spreads the colours around the hole into it, "edge" gives each pixel the
    nearest known one's, "telea" continues the lines that meet the hole; these three fill a hole that covers everything
    with neutral. "neutral" is mid grey; so is "noise" here, because the pipeline puts that into the latents.
    Raises: SettingError for another fill, or where "edge" or "telea" lack the extra `mask`.
    """
    check_choice("fill", fill, FILLS)
    if not hole.any():
        return rgb.copy()
    filled = (_neutral if hole.all() and fill in _FROM_KNOWN else _PAINTERS[fill])(rgb, hole)
    return np.where(hole[..., None], filled, rgb)


def spread(values: NDArray[Any], known: Hole) -> NDArray[np.float32]:
    """Continue the known of values (H, W, C) smoothly into the rest; known (H, W) holds somewhere. -> (H, W, C).

    Halve the picture by averages of known pixels until nothing is missing, then fill each size from the coarser one.
    Source: Gortler et al., The Lumigraph (1996), "pull-push".
    """
    channels = torch.from_numpy(np.where(known[..., None], values, 0).astype(np.float32)).permute(2, 0, 1)
    filled = _pull_push(channels[None], torch.from_numpy(known.copy())[None, None])[0]
    continued: NDArray[np.float32] = filled.permute(1, 2, 0).numpy()
    return continued


def _pull_push(values: Tensor, known: Tensor) -> Tensor:
    """values (1, C, H, W), 0 where known (1, 1, H, W) is False -> known everywhere."""
    if bool(known.all()):
        return values
    height, width = values.shape[-2:]
    share = F.avg_pool2d(known.float(), 2, ceil_mode=True)
    coarse = _pull_push(F.avg_pool2d(values, 2, ceil_mode=True) / share.clamp(min=0.25), share > 0)
    fine = F.interpolate(coarse, scale_factor=2, mode="bilinear")[..., :height, :width]
    return torch.where(known, values, fine)


def _original(rgb: Bytes, hole: Hole) -> Bytes:
    return rgb


def _neutral(rgb: Bytes, hole: Hole) -> Bytes:
    return np.full_like(rgb, NEUTRAL)


def _blur(rgb: Bytes, hole: Hole) -> Bytes:
    return np.rint(spread(rgb, ~hole)).astype(np.uint8)


def _edge(rgb: Bytes, hole: Hole) -> Bytes:
    ndimage = require_extra("scipy.ndimage", extra="mask", what='fill="edge"')
    rows, columns = ndimage.distance_transform_edt(hole, return_distances=False, return_indices=True)
    return rgb[rows, columns]


def _telea(rgb: Bytes, hole: Hole) -> Bytes:
    cv2 = require_extra("cv2", extra="mask", what='fill="telea"')
    # where a hole touches the picture's border, cv2 looks at pixels of the hole itself: let it see no old ones
    start = np.where(hole[..., None], _blur(rgb, hole), rgb)
    filled: Bytes = cv2.inpaint(start, hole.astype(np.uint8), TELEA_RADIUS, cv2.INPAINT_TELEA)
    return filled


_FROM_KNOWN: dict[str, Callable[[Bytes, Hole], Bytes]] = {"blur": _blur, "edge": _edge, "telea": _telea}
_PAINTERS = {"original": _original, "noise": _neutral, "neutral": _neutral, **_FROM_KNOWN}

FILLS = ("original", "noise", "blur", "edge", "telea", "neutral")
"""The fills by name."""
