"""Tell weights that hold NaN or infinity, and those that a smaller dtype cannot hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.files import FETCH_AGAIN


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: one pass, without temporaries."""
    # A finite sum has only finite terms, and is quicker than the extremes; these decide where the sum overflows.
    # Neither knows 8-bit floats.
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return tensor.numel() == 0 or math.isfinite(tensor.sum()) or all(map(math.isfinite, torch.aminmax(tensor)))


def stays_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether no value of a finite tensor is too large for a dtype: its extremes are not; nothing is cast but these."""
    if tensor.numel() == 0 or torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return True
    return is_finite(torch.stack(torch.aminmax(tensor)).to(dtype))


def nonfinite_error(subject: object, name: str, tensor: Tensor, stored: Tensor) -> CheckpointError:
    """The error for a tensor that is not finite; it tells whether it was so as `stored`, or became so by the cast."""
    bad = int((~torch.isfinite(stored.to(torch.float64))).sum())
    if bad:
        found = f"{name}: {bad} of {stored.numel()} values are NaN or infinite"
        hint = f"{FETCH_AGAIN}; or its training failed, and another file is needed"
        return CheckpointError("CKPT_NONFINITE", subject, found, hint=hint)
    lost = int((~torch.isfinite(tensor.to(torch.float64))).sum())
    kind = str(tensor.dtype).removeprefix("torch.")
    found = f"{name}: {lost} values are too large for {kind}, up to {float(stored.abs().max()):.6g}"
    return CheckpointError("CKPT_OVERFLOW", subject, found, hint="use float32 or bfloat16")
