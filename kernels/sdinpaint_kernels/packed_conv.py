"""oneDNN's convolution with weights in its own order, which is made once and replaces the weights in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sdinpaint_kernels.prepacked import prepacked

__all__ = ["by_packing", "convolution", "ordered_side", "packer"]

AREA = 64 * 320
"""Side times channels of the map that weights are ordered for, as in the UNets; the order holds for any map."""
LEAST_SIDE = 8


def ordered_side(channels: int) -> int:
    """Return the side of the map that weights are ordered for: one for all, whichever map comes first.

    Args:
        channels: of the input.

    Returns:
        The number of pixels.
    """
    return max(LEAST_SIDE, AREA // channels)


def by_packing(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """Apply a 3 x 3 convolution that keeps height and width, with weights that are ordered once.

    Args:
        x: feature map (B, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,), or None.
        residual: (B, O, H, W), added to the output; or None.

    Returns:
        The output (B, O, H, W).
    """
    return convolution(x, prepacked(weight, packer(1, 1)), bias, residual)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, stride: int = 1, padding: int = 1
) -> Tensor:
    """Apply oneDNN's convolution, which adds the residual before it rounds.

    Args:
        x: feature map (B, C, H, W).
        weight: (O, C, rows, columns), in any order.
        bias: (O,), or None.
        residual: (B, O, H', W'), or None.
        stride: of both axes.
        padding: rows and columns of zeros on each side.

    Returns:
        The output (B, O, H', W').
    """
    sides = [padding] * 2, [stride] * 2, [1, 1]
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *sides, 1, "none", [], "")
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, weight, bias, *sides, 1, "add", 1.0, None, [], None
    )


@functools.cache
def packer(stride: int, padding: int) -> Callable[[Tensor], Tensor]:
    """Return the function that orders weights; the same one for the same arguments, as the cache of forms asks for.

    Args:
        stride: of both axes.
        padding: rows and columns of zeros on each side.

    Returns:
        The function of weights (O, C, rows, columns).
    """

    def pack(weight: Tensor) -> Tensor:
        inputs, side = weight.shape[1], ordered_side(weight.shape[1])
        sides = [padding] * 2, [stride] * 2, [1, 1]
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *sides, 1, [1, inputs, side, side])

    return pack
