"""The Triton kernel behind `geglu`. It reads both halves once and writes the gated one."""

from __future__ import annotations

import triton
import triton.language as tl

HALF_ROOT = tl.constexpr(0.7071067811865476)


@triton.jit
def gate(x, out, rows, INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute one tile of `out` (rows, INNER) from x (rows, 2 * INNER); both are contiguous."""
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows - first) & (column < INNER)
    source = x + first.to(tl.int64) * (2 * INNER) + row * (2 * INNER) + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + INNER, mask=inside, other=0.0).to(tl.float32)
    result = value * (0.5 * gate * (1.0 + tl.erf(gate * HALF_ROOT)))
    tl.store(out + first.to(tl.int64) * INNER + row * INNER + column, result.to(out.dtype.element_ty), mask=inside)
