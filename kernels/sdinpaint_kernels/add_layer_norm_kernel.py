"""The Triton kernel behind `add_layer_norm`. Whole rows stay in registers between the sum and its norm."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_and_normalise(
    x, residual, weight, bias, total, normed, rows, eps,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of x + residual (rows, C), rounded to their dtype, and their LayerNorm; all are contiguous."""
    first = tl.program_id(0) * ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)
    inside = (row < rows - first) & (column < C)[None, :]
    offset = first.to(tl.int64) * C + row * C + column[None, :]
    dtype = total.dtype.element_ty
    added = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    rounded = added.to(dtype)
    tl.store(total + offset, rounded, mask=inside)
    added = rounded.to(tl.float32)
    mean = tl.sum(added, 1) / C
    centred = tl.where(inside, added - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    scale = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    result = centred * rstd[:, None] * scale[None, :] + shift[None, :]
    tl.store(normed + offset, result.to(dtype), mask=inside)
