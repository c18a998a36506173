"""GroupNorm in torch alone from moments that lose no digits, in bands of pixels that stay in the cache.

In float32, E[x^2] - E[x]^2 loses what a mean of many deviations takes up, and a sum over a million equal numbers
drifts, because every addition rounds the same way. Here each channel is shifted by a number near its mean, a band is
summed by `torch.sum`, which adds up sums of sums, and the bands' sums are added in float64.
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
"""Numbers for each thread: two megabytes of float32. Smaller bands spend more time on starting threads."""
SAMPLED = 8
"""A channel is shifted by the mean of its first eighth, which is near enough to the mean of all.

The mean of a fraction f of some numbers is never more than sqrt(1 / f - 1) of their standard deviations from the mean
of all (Cauchy and Schwarz), so that the shifted squares sum up to no more than 1 / f times the squared deviations. An
error in the sum is an error in the variance no more than eight times as large, whatever the numbers are.
"""


class Moments(NamedTuple):
    """Mean and variance (N, C) in float64 of every channel over so many pixels."""

    pixels: int
    mean: Tensor
    variance: Tensor


class Affine(NamedTuple):
    """(x - centre) * scale + shift, each (N, C, 1): without the centre, x * scale would round away small deviations."""

    centre: Tensor
    scale: Tensor
    shift: Tensor


def may_run_in_place(*tensors: Tensor | None) -> bool:
    """Whether these are on the CPU, and nobody asks for a graph or a derivative of what is computed from them."""
    return not is_transformed() and all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
        if tensor is not None
    )


def layout_of(x: Tensor) -> torch.memory_format:
    """Channels-last where the channels of a pixel lie together, as in a part of such a map too; else channels-first."""
    together = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if together else torch.contiguous_format


def measure(x: Tensor) -> Moments:
    """The moments of x (N, C, H, W), which is not empty, in any memory format and floating-point dtype."""
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
    """The moments of all parts of a map, of which there is at least one, by Chan's formula."""
    counts, means, variances = zip(*parts, strict=True)
    share = torch.tensor(counts, dtype=torch.float64, device=means[0].device)[:, None, None] / sum(counts)
    mean = (share * torch.stack(means)).sum(0)
    spread = torch.stack(variances) + (torch.stack(means) - mean).square()
    return Moments(sum(counts), mean, (share * spread).sum(0))


def affine(
    moments: Moments, groups: int, weight: Tensor, bias: Tensor, eps: float, addend: Tensor | None, dtype: torch.dtype
) -> Affine:
    """GroupNorm of x + addend (N, C) as a function of x of this dtype."""
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
    """The function of x (N, C, H, W), then SiLU if asked -> the same shape, dtype and memory format.

    `overwrite`: x is needed no longer, and may become the result: new memory costs as much time as the arithmetic.
    """
    layout = layout_of(x)
    given, x = x, x.contiguous(memory_format=layout)
    out = x
    if x is given and not overwrite:
        # The format is named for its strides: convolutions ask for those, and a single sample's own may differ.
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
    """Sum a band (N, C, pixels) over its pixels -> (N, C) in float64; each thread adds up the pixels that it wrote.

    Left alone, torch shares out the channels of channels-last memory: half of all numbers would change their core.
    """
    threads = torch.get_num_threads()
    if band.stride(1) != 1 or band.shape[2] % threads:
        return band.sum(2).double()
    return band.transpose(1, 2).unflatten(1, (threads, -1)).sum(2).sum(1, dtype=torch.float64)


def _band(pixels: Tensor) -> tuple[int, Tensor]:
    """The pixels of (N, C, pixels) in a band, and memory for one band in float32 or better."""
    samples, channels, count = pixels.shape
    threads = torch.get_num_threads()
    rows = min(count, max(1, BAND // (samples * channels)) * threads)
    wide = torch.promote_types(pixels.dtype, torch.float32)
    return rows, torch.empty_like(pixels[:, :, :rows], dtype=wide, device=pixels.device)
