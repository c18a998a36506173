"""Nearest-neighbour upsampling by two, then a 3 x 3 convolution; on the CPU fused, on the map before upsampling.

A 3 x 3 window on the upsampled map covers at most four different pixels, in a pattern that depends on whether the row
and column of the output are even or odd. So the weights that meet the same pixel are added up beforehand, which gives a
transposed convolution with a 4 x 4 kernel and a stride of 2. It takes 16 products where the upsampled map takes 36.
In float32 the same sums can be computed by Winograd's large tiles, see `winograd`, in fewer products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend
from sdinpaint_kernels.conv3 import conv3, sizes
from sdinpaint_kernels.forms import PLAIN, Form, compute
from sdinpaint_kernels.packed_conv import ordered_side
from sdinpaint_kernels.prepacked import prepacked
from sdinpaint_kernels.winograd import UPSAMPLED, by_large_tiles, has_large_tiles

# The weights (columns) that are summed for each of the four rows of the transposed kernel.
SUMMED = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def upsample_conv3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, size: Sequence[int] = (), *, kernels: str | None = None
) -> Tensor:
    """Upsample to the nearest pixel, and apply a 3 x 3 convolution with zero padding of 1.

    Args:
        x: feature map (B, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,), or None.
        size: height and width of the output; empty for (2H, 2W).
        kernels: "torch" for torch's own operations, see `backend`.

    Returns:
        The output (B, O, *size).
    """
    doubled = [2 * side for side in x.shape[2:]]
    size = list(size) or doubled
    if kernels == "torch" or size != doubled or x.numel() == 0 or not backend.on_cpu(x, weight, bias):
        return conv3(F.interpolate(x, size=size, mode="nearest"), weight, bias, kernels=kernels)
    return compute("upsample_conv3", FORMS, sizes(x, weight), x, weight, bias)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def _transposed_kernel(weight: Tensor) -> Tensor:
    """Sum weights (O, C, 3, 3) to those of the transposed convolution (C, O, 4, 4), in float32 or better."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    once = torch.tensor(SUMMED, dtype=wide, device=weight.device)
    summed = weight.to(wide).transpose(0, 1).flatten(2) @ torch.kron(once, once).T
    return summed.to(weight.dtype).unflatten(2, (4, 4)).contiguous(memory_format=torch.channels_last)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    packed = prepacked(weight, _packed_kernel)
    return torch.ops.mkldnn._convolution_transpose_pointwise(x, packed, bias, *SIDES, 1, "none", [], "")


def _packed_kernel(weight: Tensor) -> Tensor:
    """Order the weights of the transposed convolution as oneDNN reads them."""
    side = ordered_side(weight.shape[1])
    size = [1, weight.shape[1], side, side]
    return torch.ops.mkldnn._reorder_convolution_transpose_weight(_transposed_kernel(weight), *SIDES, 1, size)


SIDES = [1, 1], [0, 0], [2, 2], [1, 1]
"""Padding, padding of the output, stride and dilation of the transposed convolution."""
FORMS = {
    "packed_transposed": Form(_packed),
    "large_tiles": Form(partial(by_large_tiles, scheme=UPSAMPLED), has_large_tiles),
    PLAIN: Form(_plain),
}
"""The forms of `upsample_conv3` on the CPU."""
