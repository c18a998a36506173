"""Pixels doubled along both sides, then a 3 x 3 convolution; on the CPU in one, on the map as it was.

Of the 3 x 3 pixels under the window, four at the most differ, and which they are repeats with every other pixel of the
output. So the weights that meet the same pixel are added up beforehand: to a 4 x 4 kernel that is laid out from every
pixel of the input with a stride of 2, a transposed convolution. It takes 16 products where the doubled map takes 36.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend
from sdinpaint_kernels.conv3 import conv3
from sdinpaint_kernels.prepacked import prepacked

LEAST_PIXELS = 32 * 32
"""In a picture of the input: with fewer, torch's order of the weights costs more than the products."""

# Rows: which of the three weights meet each of the four pixels that one pixel of the input is laid out to.
MET = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def upsample_conv3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, size: Sequence[int] = (), *, kernels: str | None = None
) -> Tensor:
    """Repeat pixels up to `size`, or to twice as many, and convolve with one row and column of zeros around.

    x (B, C, H, W), weight (O, C, 3, 3), bias (O,), size (H', W') -> (B, O, H', W') or (B, O, 2H, 2W).
    `kernels`: "torch" for torch's own, see `backend`.
    """
    doubled = [2 * side for side in x.shape[2:]]
    size = list(size) or doubled
    small = x.numel() == 0 or x.shape[2:].numel() < LEAST_PIXELS
    if kernels == "torch" or size != doubled or small or not backend.on_cpu(x, weight, bias):
        return conv3(F.interpolate(x, size=size, mode="nearest"), weight, bias, kernels=kernels)
    return F.conv_transpose2d(x, prepacked(weight, _laid_out), bias, stride=2, padding=1)


def _laid_out(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (C, O, 4, 4), added up in float32 or better."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    once = torch.tensor(MET, dtype=wide, device=weight.device)
    made = weight.to(wide).transpose(0, 1).flatten(2) @ torch.kron(once, once).T
    return made.to(weight.dtype).unflatten(2, (4, 4)).contiguous(memory_format=torch.channels_last)
