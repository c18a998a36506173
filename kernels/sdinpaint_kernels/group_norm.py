"""GroupNorm, with the SiLU that usually follows it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, *, eps: float, silu: bool = False) -> Tensor:
    """Normalise every group of channels to zero mean and unit variance, scale and shift by channel, then SiLU if asked.

    x (N, C, H, W) in any memory format -> the same shape and format; weight and bias (C,). `eps` has no default:
    the released models use 1e-5 in some places and 1e-6 in others.
    Source: https://arxiv.org/abs/1803.08494, equations 1 to 3.
    """
    out = F.group_norm(x, groups, weight, bias, eps)
    # The norm's output is ours to overwrite, unless autograd still needs it.
    return F.silu(out, inplace=not out.requires_grad) if silu else out
