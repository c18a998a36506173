"""Fills of the hole, from which a run with strength below 1 starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sdinpaint.checks import check_choice, require_extra
from sdinpaint.on_demand import OnDemand

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch, F = OnDemand("torch"), OnDemand("torch.nn.functional")

__all__ = ["FILLS", "NEUTRAL", "Fill", "fill_hole", "spread"]

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]
Fill = Literal["original", "noise", "blur", "edge", "telea", "neutral"]
FILLS: tuple[Fill, ...] = get_args(Fill)

NEUTRAL = 128
"""Mid grey: the models' 0 lies between levels 127 and 128, and `to_uint8` rounds it to 128."""
TELEA_RADIUS = 3.0
"""Radius in pixels of the neighbourhood that cv2.inpaint uses, as in OpenCV's examples."""


def fill_hole(rgb: Bytes, hole: Hole, fill: Fill) -> Bytes:
    """Fill the hole of an image; known pixels stay bit for bit.

    "original" leaves the hole as it is. "blur" spreads the surrounding colours into it, "edge" repeats the nearest
    known pixel, and "telea" continues the lines that meet the hole; where nothing is known, these three fill with mid
    grey. "neutral" is mid grey. "noise" is mid grey here too, because the pipeline adds the noise to the latents.

    Args:
        rgb: the image (H, W, 3).
        hole: (H, W), True = repainted.
        fill: one of FILLS.

    Returns:
        The filled image (H, W, 3).

    Raises:
        SettingError: `fill` is unknown, or "edge" or "telea" lacks the extra `mask`.
    """
    check_choice("fill", fill, FILLS)
    if not hole.any():
        return rgb.copy()
    filled = (_neutral if hole.all() and fill in _FROM_KNOWN else _FILLERS[fill])(rgb, hole)
    return np.where(hole[..., None], filled, rgb)


def spread(values: NDArray[Any], known: Hole) -> NDArray[np.float32]:
    """Continue known values smoothly into the unknown ones.

    The image is halved by averages of known pixels until nothing is missing; then each size is filled from the coarser
    one.

    Args:
        values: (H, W, C).
        known: bool (H, W) with at least one True.

    Returns:
        The values (H, W, C), the known ones unchanged.

    Source: Gortler et al., The Lumigraph (1996), "pull-push".
    """
    channels = torch.from_numpy(np.where(known[..., None], values, 0).astype(np.float32)).permute(2, 0, 1)
    filled = _pull_push(channels[None], torch.from_numpy(known.copy())[None, None])[0]
    continued: NDArray[np.float32] = filled.permute(1, 2, 0).numpy()
    return continued


def _pull_push(values: Tensor, known: Tensor) -> Tensor:
    """Fill values (1, C, H, W), which are 0 where known (1, 1, H, W) is False."""
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
    # at the border of the image cv2 reads pixels of the hole itself, which must not be the old ones
    start = np.where(hole[..., None], _blur(rgb, hole), rgb)
    filled: Bytes = cv2.inpaint(start, hole.astype(np.uint8), TELEA_RADIUS, cv2.INPAINT_TELEA)
    return filled


_FROM_KNOWN: dict[Fill, Callable[[Bytes, Hole], Bytes]] = {"blur": _blur, "edge": _edge, "telea": _telea}
_FILLERS: dict[Fill, Callable[[Bytes, Hole], Bytes]] = {
    "original": _original,
    "noise": _neutral,
    "neutral": _neutral,
    **_FROM_KNOWN,
}
