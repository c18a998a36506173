"""The Triton kernels behind `conv3_add`: a convolution as one matrix product over windows that are never stored.

A row of the product is a pixel, a column an output channel, and the sum runs over nine neighbours times the input
channels: in each step, BLOCK_K channels of one neighbour. Maps are channels-last, (pixels, C), and the weights (O, 9 C)
or (O, C). Where a map has too few pixels to fill a GPU, SPLIT programs share one sum; `add_up` adds their parts in a
fixed order, so that equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _multiply(
    total, source, weight, begin, end, pixel, line, column, height, width, inside, output,
    C: tl.constexpr, TAPS: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add to total the steps from `begin` to `end` of source (pixels, C) times columns of weight (O, LENGTH).

    With 9 TAPS a step is one neighbour and BLOCK_K channels, with 1 the pixel itself. The columns are those from START.
    """
    CHUNKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    for step in range(begin, end):
        tap = step // CHUNKS
        channel = (step % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        if TAPS == 9:
            down, right = tap // 3 - 1, tap % 3 - 1
            above, left = line + down, column + right
            there = inside & (above >= 0) & (above < height) & (left >= 0) & (left < width)
            neighbour = pixel + down * width + right
        else:
            there, neighbour = inside, pixel
        read, kept = there[:, None], (output < OUTPUTS)[:, None]
        if C % BLOCK_K:
            read, kept = read & (channel < C)[None, :], kept & (channel < C)[None, :]
        tile = tl.load(source + neighbour[:, None] * C + channel[None, :], mask=read, other=0.0)
        place = output[:, None] * LENGTH + (START + tap * C + channel)[None, :]
        kernel = tl.load(weight + place, mask=kept, other=0.0)
        if UPCAST:
            tile, kernel = tile.to(tl.float32), kernel.to(tl.float32)
        total = tl.dot(tile, tl.trans(kernel), total)
    return total


@triton.jit
def _finish(total, bias, addend, addend_stride, residual, out, pixel, area, output, pixels, OUTPUTS: tl.constexpr):
    """Add what there is of bias (O,), addend (samples, O) and residual (pixels, O) to a tile, and write it to out."""
    column = (output < OUTPUTS)[None, :]
    inside = (pixel < pixels)[:, None] & column
    place = pixel[:, None] * OUTPUTS + output[None, :]
    if bias is not None:
        total += tl.load(bias + output[None, :], mask=column, other=0.0).to(tl.float32)
    if addend is not None:
        sample = (pixel // area)[:, None]
        total += tl.load(addend + sample * addend_stride + output[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def convolve(
    x, weight, first, second, projection, bias, addend, addend_stride, residual, out, pixels, height, width,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the output, or of one part of its sum: BLOCK_M pixels by BLOCK_N channels.

    The sum is x (pixels, C) convolved with weight (O, 9 C), and the maps `first` (pixels, C1) and `second` (pixels, C2)
    times projection (O, C1 + C2), where C1 and C2 are not 0. With SPLIT > 1, `out` is float32 (SPLIT, pixels, O), and
    nothing else is added. UPCAST multiplies in float32, for the interpreter, whose bfloat16 products are wrong.
    """
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < pixels
    line, column = (pixel // width) % height, pixel % width

    STEPS: tl.constexpr = 9 * ((C + BLOCK_K - 1) // BLOCK_K)
    STEPS1: tl.constexpr = (C1 + BLOCK_K - 1) // BLOCK_K
    STEPS2: tl.constexpr = (C2 + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (STEPS + STEPS1 + STEPS2 + SPLIT - 1) // SPLIT
    begin = tl.program_id(2) * SHARE
    end = begin + SHARE

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = _multiply(
        total, x, weight, tl.minimum(begin, STEPS), tl.minimum(end, STEPS),
        pixel, line, column, height, width, inside, output, C, 9, 0, 9 * C, OUTPUTS, BLOCK_K, UPCAST,
    )  # fmt: skip
    if C1:
        begin, end = tl.maximum(begin - STEPS, 0), tl.maximum(end - STEPS, 0)
        total = _multiply(
            total, first, projection, tl.minimum(begin, STEPS1), tl.minimum(end, STEPS1),
            pixel, line, column, height, width, inside, output, C1, 1, 0, C1 + C2, OUTPUTS, BLOCK_K, UPCAST,
        )  # fmt: skip
    if C2:
        begin, end = tl.maximum(begin - STEPS1, 0), tl.maximum(end - STEPS1, 0)
        total = _multiply(
            total, second, projection, tl.minimum(begin, STEPS2), tl.minimum(end, STEPS2),
            pixel, line, column, height, width, inside, output, C2, 1, C1, C1 + C2, OUTPUTS, BLOCK_K, UPCAST,
        )  # fmt: skip

    if SPLIT > 1:
        part = out + tl.program_id(2).to(tl.int64) * pixels * OUTPUTS
        _finish(total, None, None, 0, None, part, pixel, 1, output, pixels, OUTPUTS)
    else:
        _finish(total, bias, addend, addend_stride, residual, out, pixel, height * width, output, pixels, OUTPUTS)


@triton.jit(do_not_specialize=["pixels", "area"])
def add_up(
    parts, bias, addend, addend_stride, residual, out, pixels, area,
    SPLIT: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add parts (SPLIT, pixels, O) up to one tile of the output, and finish it."""
    output = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    pixel = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (pixel < pixels)[:, None] & (output < OUTPUTS)[None, :]
    place = pixel[:, None] * OUTPUTS + output[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + tl.cast(part, tl.int64) * pixels * OUTPUTS + place, mask=inside, other=0.0)
    _finish(total, bias, addend, addend_stride, residual, out, pixel, area, output, pixels, OUTPUTS)
