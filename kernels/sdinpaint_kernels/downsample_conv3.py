"""A 3 x 3 convolution of every second row and column; on the CPU by oneDNN, with weights in its own order."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend
from sdinpaint_kernels.packed_conv import convolution, packer
from sdinpaint_kernels.prepacked import replaced

STRIDE = 2


def downsample_conv3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 1, *, kernels: str | None = None
) -> Tensor:
    """Apply a 3 x 3 convolution with a stride of 2.

    Args:
        x: feature map (B, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,), or None.
        padding: rows and columns of zeros on each side.
        kernels: "torch" for torch's own convolution, see `backend`.

    Returns:
        The output (B, O, H', W').
    """
    if kernels == "torch" or x.numel() == 0 or not backend.on_cpu(x, weight, bias):
        return F.conv2d(x, weight, bias, stride=STRIDE, padding=padding)
    ordered = replaced([weight], packer(STRIDE, padding))
    return convolution(x, weight if ordered is None else ordered, bias, stride=STRIDE, padding=padding)
