"""The Triton kernels behind `group_norm`: one pass for small maps; measure, merge and apply for large ones.

Means and squared deviations are taken about a value of the data, and merged by Chan's formula, in float32, so that no
digits are lost where the mean is many standard deviations. Every sum has a fixed order, so that equal inputs give equal
bits. x and out are channels-last (B, HW, C). `measured` (2, B, groups, chunks) holds means and sums of squared
deviations.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _members(CPG: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a mask (GROUPS, WIDTH) of the channels that belong to each group."""
    return tl.arange(0, GROUPS)[:, None] == (tl.arange(0, WIDTH) // CPG)[None, :]


@triton.jit
def _by_group(values, members):
    """Sum channels (WIDTH,) to groups (GROUPS,)."""
    return tl.sum(tl.where(members, values[None, :], 0.0), 1)


@triton.jit
def _by_channel(values, members):
    """Give every channel (WIDTH,) the value of its group (GROUPS,)."""
    return tl.sum(tl.where(members, values[:, None], 0.0), 0)


@triton.jit
def _channels(bundle, C: tl.constexpr, CPG: tl.constexpr, BUNDLE: tl.constexpr, WIDTH: tl.constexpr):
    """Return the channel numbers (WIDTH,), and a mask of those that are in the bundle."""
    start = bundle * (BUNDLE * CPG)
    local = tl.arange(0, WIDTH)
    return start + local, (local < BUNDLE * CPG) & (local < C - start)


@triton.jit
def _optional(base, offset, mask):
    """Load the values at base + offset in float32; zeros if base is None."""
    if base is None:
        values = tl.zeros(offset.shape, tl.float32)
    else:
        values = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _finish(values, SILU: tl.constexpr):
    return values / (1.0 + tl.exp(-values)) if SILU else values


@triton.jit
def normalise(
    x, addend, addend_stride, weight, bias, out, pixels, eps,
    SILU: tl.constexpr, C: tl.constexpr, CPG: tl.constexpr, BUNDLE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise all pixels of one bundle of one sample, which stay in registers."""
    sample = tl.program_id(1)
    channel, present = _channels(tl.program_id(0), C, CPG, BUNDLE, WIDTH)
    members = _members(CPG, GROUPS, WIDTH)
    row = tl.arange(0, ROWS)[:, None]
    inside = (row < pixels) & present[None, :]
    base = sample.to(tl.int64) * pixels * C
    offset = row * C + channel[None, :]
    values = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
    added = _optional(addend, sample * addend_stride + channel, present)
    mean = _by_group(tl.where(present, tl.sum(values, 0) / pixels + added, 0.0), members) / CPG
    values = tl.where(inside, values - (_by_channel(mean, members) - added)[None, :], 0.0)
    variance = _by_group(tl.sum(values * values, 0), members) / (pixels * CPG)
    scale = _by_channel(tl.rsqrt(variance + eps), members) * _optional(weight, channel, present)
    result = values * scale[None, :] + _optional(bias, channel, present)[None, :]
    tl.store(out + base + offset, _finish(result, SILU).to(out.dtype.element_ty), mask=inside)


@triton.jit
def measure(
    x, addend, addend_stride, measured, pixels, tiles,
    C: tl.constexpr, CPG: tl.constexpr, BUNDLE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute mean and squared deviations of the groups of one bundle in one chunk of one sample."""
    chunk, bundle, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel, present = _channels(bundle, C, CPG, BUNDLE, WIDTH)
    members = _members(CPG, GROUPS, WIDTH)
    first = chunk * (ROWS * tiles)
    base = x + sample.to(tl.int64) * pixels * C
    # About each channel's first value here, sums of squares lose no digits to the mean.
    shift = tl.load(base + first * C + channel, mask=present, other=0.0).to(tl.float32)
    total, squares = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for tile in range(0, tiles):
        row = first + tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < pixels) & present[None, :]
        values = tl.load(base + row * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        values = tl.where(inside, values - shift[None, :], 0.0)
        total += tl.sum(values, 0)
        squares += tl.sum(values * values, 0)
    count = tl.minimum(pixels - first, ROWS * tiles).to(tl.float32)
    means = shift + total / count
    squares -= total * (total / count)
    means = tl.where(present, means + _optional(addend, sample * addend_stride + channel, present), 0.0)
    mean = _by_group(means, members) / CPG
    between = tl.where(present, means - _by_channel(mean, members), 0.0)
    squares = _by_group(squares + count * between * between, members)
    local = tl.arange(0, GROUPS)
    group = bundle * BUNDLE + local
    slot = (sample * (C // CPG) + group) * tl.num_programs(0) + chunk
    stored = (local < BUNDLE) & (group < C // CPG)
    tl.store(measured + slot, mean, mask=stored)
    tl.store(measured + tl.num_programs(2) * (C // CPG) * tl.num_programs(0) + slot, squares, mask=stored)


@triton.jit
def _merged(
    measured, plane, index, mask, pixels, chunks, chunk_pixels, CPG: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """Merge mean and squared deviations (GROUPS,) of the groups `index` over all chunks; SLOTS is at least `chunks`."""
    chunk = tl.arange(0, SLOTS)[None, :]
    inside = mask[:, None] & (chunk < chunks)
    slot = index[:, None] * chunks + chunk
    means = tl.load(measured + slot, mask=inside, other=0.0)
    squares = tl.load(measured + plane + slot, mask=inside, other=0.0)
    counts = tl.where(inside, tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels), 0).to(tl.float32)
    mean = tl.sum(means * (counts / pixels), 1)
    between = means - mean[:, None]
    return mean, tl.sum(squares + counts * CPG * between * between, 1)


@triton.jit
def merge(
    measured, merged, pixels, chunks, chunk_pixels,
    CPG: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of one group of one sample into one chunk: the same layout with chunks = 1."""
    index = tl.program_id(0) + tl.zeros((1,), tl.int32)
    groups = tl.num_programs(0)
    mean, squares = _merged(measured, groups * chunks, index, index >= 0, pixels, chunks, chunk_pixels, CPG, SLOTS)
    tl.store(merged + index, mean)
    tl.store(merged + groups + index, squares)


@triton.jit
def apply(
    x, addend, addend_stride, weight, bias, measured, out, pixels, tiles, chunks, chunk_pixels, eps,
    SILU: tl.constexpr, SLOTS: tl.constexpr, C: tl.constexpr, CPG: tl.constexpr,
    BUNDLE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise one bundle in one chunk of one sample."""
    bundle, sample = tl.program_id(1), tl.program_id(2)
    # The pixels measured last are the likeliest to be in the cache still.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * (ROWS * tiles)
    channel, present = _channels(bundle, C, CPG, BUNDLE, WIDTH)
    members = _members(CPG, GROUPS, WIDTH)
    local = tl.arange(0, GROUPS)
    group = bundle * BUNDLE + local
    held = (local < BUNDLE) & (group < C // CPG)
    plane = tl.num_programs(2) * (C // CPG) * chunks
    index = sample * (C // CPG) + group
    mean, squares = _merged(measured, plane, index, held, pixels, chunks, chunk_pixels, CPG, SLOTS)
    rstd = tl.rsqrt(squares / (pixels.to(tl.float32) * CPG) + eps)
    scale = _by_channel(rstd, members) * _optional(weight, channel, present)
    shift = _optional(bias, channel, present)
    centre = _by_channel(mean, members) - _optional(addend, sample * addend_stride + channel, present)
    base = sample.to(tl.int64) * pixels * C
    for tile in range(0, tiles):
        row = first + tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < pixels) & present[None, :]
        offset = row * C + channel[None, :]
        values = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
        result = (values - centre[None, :]) * scale[None, :] + shift[None, :]
        tl.store(out + base + offset, _finish(result, SILU).to(out.dtype.element_ty), mask=inside)
