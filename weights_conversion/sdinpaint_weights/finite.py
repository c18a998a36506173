"""Find weights with NaN or infinity, and weights that a smaller dtype cannot represent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.files import FETCH_AGAIN


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no value is NaN or infinite, mostly in one pass without temporaries.

    Args:
        tensor: a tensor of any shape and dtype.

    Returns:
        True where all values are finite.
    """
    # A finite sum has only finite terms, and is faster than the extremes; these decide where the sum overflows.
    # Neither supports 8-bit floats.
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return tensor.numel() == 0 or math.isfinite(tensor.sum()) or all(map(math.isfinite, torch.aminmax(tensor)))


def stays_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a finite tensor stays finite in another dtype; only its extremes are cast.

    Args:
        tensor: a tensor without NaN and infinity.
        dtype: the dtype to cast to.

    Returns:
        True where no value is too large for the dtype.
    """
    if tensor.numel() == 0 or torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return True
    return is_finite(torch.stack(torch.aminmax(tensor)).to(dtype))


def nonfinite_error(subject: object, name: str, tensor: Tensor, stored: Tensor) -> CheckpointError:
    """Make the error for a tensor that is not finite.

    Args:
        subject: the file that the error names.
        name: name of the tensor.
        tensor: the tensor after the cast.
        stored: the tensor as stored, which decides whether the file or the cast is to blame.

    Returns:
        An error to raise, CKPT_NONFINITE or CKPT_OVERFLOW.
    """
    bad = int((~torch.isfinite(stored.to(torch.float64))).sum())
    if bad:
        found = f"{name}: {bad} of {stored.numel()} values are NaN or infinite"
        hint = f"{FETCH_AGAIN}; or its training failed, and another file is needed"
        return CheckpointError("CKPT_NONFINITE", subject, found, hint=hint)
    lost = int((~torch.isfinite(tensor.to(torch.float64))).sum())
    kind = str(tensor.dtype).removeprefix("torch.")
    found = f"{name}: {lost} values are too large for {kind}, up to {float(stored.abs().max()):.6g}"
    return CheckpointError("CKPT_OVERFLOW", subject, found, hint="use float32 or bfloat16")
