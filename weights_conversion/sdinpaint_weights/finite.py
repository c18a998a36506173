"""Find weights that cannot be right: NaN, infinity, what a smaller dtype cannot represent, and zeros throughout."""

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


MAY_BE_ZERO = {"controlnet": ("zero_convs.", "middle_block_out.", "input_hint_block.14.")}
"""Component -> beginnings of the names of layers that begin as zeros, and in a ControlNet that is new still are."""
FEW = 8


def is_blank(component: str, name: str, tensor: Tensor) -> bool:
    """Tell whether a tensor is zero throughout although training never leaves it so.

    Args:
        component: component of the model, such as "unet".
        name: native name of the tensor; biases may be zero.
        tensor: the tensor.

    Returns:
        True where every value is zero and none of the released models has zeros there.
    """
    if name.endswith("bias") or name.startswith(MAY_BE_ZERO.get(component, ())):
        return False
    # one other value is proof enough, so that all of them are read only where the first ones are zero
    return tensor.numel() > 0 and not (_any(tensor.view(-1)[:FEW]) or _any(tensor))


def _any(tensor: Tensor) -> bool:
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).any())


def blank_error(subject: object, name: str, tensor: Tensor) -> CheckpointError:
    """Make the error for a tensor that is zero throughout.

    Args:
        subject: the file that the error names.
        name: name of the tensor in it.
        tensor: the tensor.

    Returns:
        An error to raise, CKPT_BLANK.
    """
    found = f"{name}: all {tensor.numel()} values are zero"
    expected = "trained weights, which are zero throughout in no released model"
    hint = f"{FETCH_AGAIN}; `sdinpaint inspect --verify` finds every such tensor"
    return CheckpointError("CKPT_BLANK", subject, found, expected=expected, hint=hint)


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
