"""GroupNorm in torch alone from moments that lose no digits, in bands of pixels that stay in the cache.

In float32, E[x^2] - E[x]^2 loses digits where the mean is many standard deviations, and a sum over a million equal
numbers drifts, because every addition rounds the same way. Here each channel is shifted by a number near its mean, a
band is summed by `torch.sum`, which adds up partial sums, and the sums of the bands are added in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels.backend import is_transformed

BAND = 2**19
"""The numbers of a band per thread: two megabytes of float32. Smaller bands spend more time on starting threads."""
SAMPLED = 8
"""The reciprocal of the fraction of a channel whose mean is the shift, which is near enough to the mean of all.

The mean of a fraction f of some numbers is at most sqrt(1 / f - 1) of their standard deviations from the mean of all
(Cauchy and Schwarz), so that the shifted squares sum up to at most 1 / f times the squared deviations. A relative
error of the sum then gives at most eight times that error of the variance, whatever the numbers are.
"""


class Moments(NamedTuple):
    """Mean and variance (B, C) in float64 of every channel over a number of pixels."""

    pixels: int
    mean: Tensor
    variance: Tensor


class Affine(NamedTuple):
    """The function (x - centre) * scale + shift, (B, C, 1) each; without centre, rounding loses small deviations."""

    centre: Tensor
    scale: Tensor
    shift: Tensor


def may_run_in_place(*tensors: Tensor | None) -> bool:
    """Tell whether all tensors are on the CPU, and neither a graph nor a gradient of the result is needed.

    Args:
        *tensors: the inputs; None is skipped.

    Returns:
        True if results may be written in place.
    """
    return not is_transformed() and all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
        if tensor is not None
    )


def layout_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of a feature map or a part of one.

    Args:
        x: (B, C, H, W).

    Returns:
        Channels-last if the channels of a pixel are adjacent, else contiguous.
    """
    together = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if together else torch.contiguous_format


def measure(x: Tensor) -> Moments:
    """Compute the moments of a feature map.

    Args:
        x: (B, C, H, W), not empty, in any memory format and floating-point dtype.

    Returns:
        The moments of each channel.
    """
    pixels = x.flatten(2)
    count = pixels.shape[2]
    rows, work = _band(pixels)
    centre = pixels[:, :, : -(-count // SAMPLED)].to(work.dtype).mean(2, keepdim=True)
    totals, squares = [], []
    for band in pixels.split(rows, 2):
        shifted = torch.sub(band, centre, out=work[:, :, : band.shape[2]])
        totals.append(_sum(shifted))
        squares.append(_sum(shifted.square_()))
    mean, square = (reduce(torch.add, sums) / count for sums in (totals, squares))
    return Moments(count, centre[:, :, 0] + mean, (square - mean.square()).clamp_(min=0))


def merge(parts: Iterable[Moments]) -> Moments:
    """Merge the moments of the parts of a map by Chan's formula.

    Args:
        parts: at least one.

    Returns:
        The moments of the whole map.
    """
    counts, means, variances = zip(*parts, strict=True)
    share = torch.tensor(counts, dtype=torch.float64, device=means[0].device)[:, None, None] / sum(counts)
    mean = (share * torch.stack(means)).sum(0)
    spread = torch.stack(variances) + (torch.stack(means) - mean).square()
    return Moments(sum(counts), mean, (share * spread).sum(0))


def affine(
    moments: Moments, groups: int, weight: Tensor, bias: Tensor, eps: float, addend: Tensor | None, dtype: torch.dtype
) -> Affine:
    """Express GroupNorm of x + addend as a function of x.

    Args:
        moments: the moments of x.
        groups: number of groups.
        weight: scale (C,).
        bias: shift (C,).
        eps: added to the variance.
        addend: (B, C), or None.
        dtype: that of x; the function is in float32 or better.

    Returns:
        The function.
    """
    added = 0 if addend is None else addend.double()
    means, variances = (one.unflatten(1, (groups, -1)) for one in (moments.mean + added, moments.variance))
    mean = means.mean(2, keepdim=True)
    variance = (means - mean).square_().add_(variances).mean(2, keepdim=True)
    scale = weight.double() * variance.add_(eps).rsqrt_().expand_as(means).flatten(1)
    exact = mean.expand_as(means).flatten(1) - added
    wide = torch.promote_types(dtype, torch.float32)
    centre = exact.to(wide)
    shift = torch.addcmul(bias.double(), centre - exact, scale)
    return Affine(*(each.to(wide)[:, :, None] for each in (centre, scale, shift)))


def apply(x: Tensor, norm: Affine, silu: bool, overwrite: bool = False) -> Tensor:
    """Apply an affine function, then SiLU if asked.

    Args:
        x: feature map (B, C, H, W).
        norm: the function.
        silu: apply SiLU to the result.
        overwrite: x is not needed afterwards and may become the result: new memory takes as long as the arithmetic.

    Returns:
        The result, in the shape, dtype and memory format of x.
    """
    layout = layout_of(x)
    given, x = x, x.contiguous(memory_format=layout)
    out = x
    if x is given and not overwrite:
        # The format is named, because convolutions check strides, and those of a single sample may differ.
        out = torch.empty_like(x, memory_format=layout, device=x.device)
    pixels, written = x.flatten(2), out.flatten(2)
    rows, work = _band(pixels)
    # The pixels measured last are the likeliest to be in the cache still.
    for band, target in reversed(list(zip(pixels.split(rows, 2), written.split(rows, 2), strict=True))):
        values = target if out.dtype == work.dtype else work[:, :, : band.shape[2]]
        torch.sub(band, norm.centre, out=values)
        torch.addcmul(norm.shift, values, norm.scale, out=values)
        if silu:
            F.silu(values, inplace=True)
        if values is not target:
            target.copy_(values)
    return out


def _sum(band: Tensor) -> Tensor:
    """Sum a band (B, C, pixels) over its pixels to (B, C) in float64; each thread adds up the pixels that it wrote.

    By itself, torch divides channels-last memory by channels, so that half of all numbers would move to another core.
    """
    threads = torch.get_num_threads()
    if band.stride(1) != 1 or band.shape[2] % threads:
        return band.sum(2).double()
    return band.transpose(1, 2).unflatten(1, (threads, -1)).sum(2).sum(1, dtype=torch.float64)


def _band(pixels: Tensor) -> tuple[int, Tensor]:
    """Return the number of pixels of a band of (B, C, pixels), and memory for one band in float32 or better."""
    samples, channels, count = pixels.shape
    threads = torch.get_num_threads()
    rows = min(count, max(1, BAND // (samples * channels)) * threads)
    wide = torch.promote_types(pixels.dtype, torch.float32)
    return rows, torch.empty_like(pixels[:, :, :rows], dtype=wide, device=pixels.device)
