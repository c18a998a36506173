"""The Triton kernel behind `linear_geglu`. Value and gate of a tile are summed side by side, and never stored."""

from __future__ import annotations

import triton
import triton.language as tl

HALF_ROOT = tl.constexpr(0.7071067811865476)


@triton.jit
def _rows(weight, first, column, channel, C: tl.constexpr, INNER: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load columns `channel` of the rows of weight (2 * INNER, C) that start at `first`."""
    inside = (column < INNER)[:, None]
    if C % BLOCK_K:
        inside = inside & (channel < C)[None, :]
    return tl.load(weight + (first + column)[:, None] * C + channel[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def multiply_and_gate(
    x, weight, bias, out, rows,
    C: tl.constexpr, INNER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute one tile of out (rows, INNER) from x (rows, C), weight (2 * INNER, C) and bias (2 * INNER,).

    UPCAST multiplies in float32, for the interpreter, whose bfloat16 products are wrong.
    """
    # Programs that run at the same time share columns of the weights, which are larger than x.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = (row < rows)[:, None]
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        inside = present
        if C % BLOCK_K:
            inside = inside & (channel < C)[None, :]
        tile = tl.load(x + row[:, None] * C + channel[None, :], mask=inside, other=0.0)
        for_value = _rows(weight, 0, column, channel, C, INNER, BLOCK_K)
        for_gate = _rows(weight, INNER, column, channel, C, INNER, BLOCK_K)
        if UPCAST:
            tile, for_value, for_gate = tile.to(tl.float32), for_value.to(tl.float32), for_gate.to(tl.float32)
        value = tl.dot(tile, tl.trans(for_value), value)
        gate = tl.dot(tile, tl.trans(for_gate), gate)
    within = column < INNER
    value += tl.load(bias + column, mask=within, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + INNER + column, mask=within, other=0.0).to(tl.float32)[None, :]
    result = value * (0.5 * gate * (1.0 + tl.erf(gate * HALF_ROOT)))
    place = out + row[:, None] * INNER + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=present & within[None, :])
