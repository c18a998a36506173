"""GroupNorm, with an optional addition of the time embedding before it and an optional SiLU after it.

y = (x + a - mean) / sqrt(variance + eps) * weight + bias, with the mean and the variance of each group of channels of
each sample. The kernels take channels-last memory, in which a group is a run of 4 to 80 channels in every pixel: far
from a power of two. So a program takes a *bundle*: consecutive whole groups that fill its tile as well as they can.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend, moments

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)
ALIGNED = 8  # elements of two bytes in the largest load
WIDEST = 256  # channels of a tile
ONE_PASS_PIXELS = 256
ONE_PASS_TILE = 16384  # more do not fit into registers
NARROW = 64  # channels of a tile at the least
TILE = 8192  # elements: 64 for each thread of four warps
PROGRAMS = 528  # four for each multiprocessor of an H100
DIRECT_CHUNKS = 64
MIN_BANDED = 2**16
"""The minimum size of a map to run in bands on the CPU; below it, starting a dozen operations costs more."""


class Plan(NamedTuple):
    """The division of a feature map among the programs of the kernels.

    A program processes `bundle` groups, in tiles of `rows` pixels by `width` channels. It processes `tiles` of them one
    after the other: a chunk. Up to `direct` chunks are merged by the programs that need them, more by another kernel.
    """

    bundle: int
    width: int
    rows: int
    tiles: int
    warps: int
    one_pass: bool
    direct: int = DIRECT_CHUNKS

    def chunks(self, pixels: int) -> int:
        """Return the number of chunks of a sample.

        Args:
            pixels: height times width.

        Returns:
            The number of chunks.
        """
        return -(-pixels // (self.rows * self.tiles))


@functools.cache
def plan(samples: int, channels: int, pixels: int, groups: int) -> Plan:
    """Choose the plan for a shape that the kernels support.

    Args:
        samples: batch size.
        channels: channels of the feature map.
        pixels: height times width.
        groups: groups of channels.

    Returns:
        The plan.
    """
    per_group = channels // groups
    smallest = _smallest_bundle(per_group)
    narrow = backend.power_of_two(smallest * per_group)
    rows = backend.power_of_two(pixels)
    if pixels <= ONE_PASS_PIXELS and rows * narrow <= ONE_PASS_TILE:
        # With so few pixels, many small programs keep the GPU busy.
        return Plan(smallest, narrow, rows, 1, warps=max(4, rows * narrow // 2048), one_pass=True)
    # As narrow as a cache line, though some lanes then hold no channel: on an H100 that beat fuller, wider tiles by up
    # to a half, at every shape of the UNets and autoencoders.
    width = max(narrow, NARROW)
    bundle = min(groups, width // (smallest * per_group) * smallest)
    rows = TILE // width
    programs = samples * -(-groups // bundle) * pixels // rows
    return Plan(bundle, width, rows, tiles=backend.power_of_two(-(-programs // PROGRAMS)), warps=4, one_pass=False)


def _smallest_bundle(per_group: int) -> int:
    """Return the smallest number of groups whose channels are aligned for loads in every pixel and bundle."""
    return ALIGNED // math.gcd(per_group, ALIGNED)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    silu: bool = False,
    addend: Tensor | None = None,
    overwrite: bool = False,
    kernels: str | None = None,
) -> Tensor:
    """Normalise every group of channels to zero mean and unit variance, scale and shift by channel, then SiLU if asked.

    Args:
        x: feature map (B, C, H, W) in any memory format.
        groups: number of groups, which divides C.
        weight: scale (C,).
        bias: shift (C,).
        eps: added to the variance. There is no default: the released models use 1e-5 in some places and 1e-6 in others.
        silu: apply SiLU to the result.
        addend: (B, C), added to all pixels of x first; it may be a slice of wider rows.
        overwrite: x is not needed afterwards, so the result may reuse its memory.
        kernels: "torch", "triton" or "auto", see `backend`; None for the setting of the process.

    Returns:
        The normalised map (B, C, H, W), in the memory format of x.

    Raises:
        ValueError: shapes, dtypes or devices do not match.

    Source: https://arxiv.org/abs/1803.08494, equations 1 to 3.
    """
    _check(x, groups, weight, bias, addend)
    obstacle = None if backend.is_functional() else _obstacle(x, groups, weight, bias, addend)
    choice = backend.choose("group_norm", x, weight, bias, addend, requested=kernels, obstacle=obstacle)
    if choice.name == "triton":
        return _operation(x, groups, weight, bias, eps, silu, addend)
    many = x.numel() >= MIN_BANDED or x.dtype in HALF  # every operation in torch rounds to half precision
    if x.numel() > 0 and many and moments.may_run_in_place(x, weight, bias, addend):
        return banded(x, groups, weight, bias, eps, silu, addend, overwrite)
    return reference(x, groups, weight, bias, eps, silu, addend)


def banded(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    addend: Tensor | None,
    overwrite: bool = False,
) -> Tensor:
    """Compute the formula for inference on the CPU: accurate in every memory format, and band by band within the cache.

    Args:
        x: feature map (B, C, H, W).
        groups: number of groups.
        weight: scale (C,).
        bias: shift (C,).
        eps: added to the variance.
        silu: apply SiLU to the result.
        addend: (B, C), or None.
        overwrite: the result may reuse the memory of x.

    Returns:
        The normalised map (B, C, H, W).
    """
    norm = moments.affine(moments.measure(x), groups, weight, bias, eps, addend, x.dtype)
    return moments.apply(x, norm, silu, overwrite)


def reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, addend: Tensor | None
) -> Tensor:
    """Compute the formula in torch, differentiable and traceable by a compiler.

    Args:
        x: feature map (B, C, H, W).
        groups: number of groups.
        weight: scale (C,).
        bias: shift (C,).
        eps: added to the variance.
        silu: apply SiLU to the result.
        addend: (B, C), or None.

    Returns:
        The normalised map (B, C, H, W), in the memory format of x.
    """
    if x.is_cpu:
        out = _about_means(x, groups, weight, bias, eps, addend)
    else:
        x = x if addend is None else x + addend[:, :, None, None]
        out = F.group_norm(x, groups, weight, bias, eps)
    # The norm's output may be overwritten, unless autograd still needs it.
    out = F.silu(out, inplace=not out.requires_grad) if silu else out
    # On CUDA, torch's norm always returns channels-first memory.
    return out.contiguous(memory_format=moments.layout_of(x))


def _about_means(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, addend: Tensor | None) -> Tensor:
    """Apply `F.group_norm` to x + addend less the means of its groups, channels-first.

    On the CPU, torch computes E[x^2] - E[x]^2 of channels-last maps from long float32 sums, and x * scale + shift in
    both formats. The former loses digits as the map grows, the latter as the mean grows.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = _centred(x.to(wide), groups)
    if addend is not None:
        total = total + _centred(addend[:, :, None, None].to(wide), groups)
    return F.group_norm(total.contiguous(), groups, weight.to(wide), bias.to(wide), eps).to(x.dtype)


def _centred(x: Tensor, groups: int) -> Tensor:
    """Subtract the means of the groups, as constants for autograd: a norm is the same for any constant."""
    grouped = x.unflatten(1, (groups, -1))
    return (grouped - grouped.detach().mean((2, 3, 4), keepdim=True)).flatten(1, 2)


def _check(x: Tensor, groups: int, weight: Tensor, bias: Tensor, addend: Tensor | None) -> None:
    channels = x.shape[1] if x.ndim == 4 else 0
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(
            f"group_norm takes x (B, C, H, W) with C a multiple of the {groups} groups, "
            f"not shape {tuple(x.shape)} with stride {x.stride()}"
        )
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"group_norm of {channels} channels takes weight and bias ({channels},), "
            f"not {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if addend is not None and addend.shape != x.shape[:2]:
        raise ValueError(f"group_norm takes addend (B, C) = {tuple(x.shape[:2])}, not {tuple(addend.shape)}")
    backend.check_same("group_norm", x, weight=weight, bias=bias, addend=addend)


def _obstacle(x: Tensor, groups: int, weight: Tensor, bias: Tensor, addend: Tensor | None) -> str | None:
    if x.dtype not in DTYPES:
        return f"the kernel takes no {x.dtype}"
    whole = weight.is_contiguous() and bias.is_contiguous() and (addend is None or addend.stride(1) == 1)
    if not (whole and x.is_contiguous(memory_format=torch.channels_last)):
        return "the kernel takes channels-last x, and weight, bias and rows of addend in one piece"
    if x.numel() == 0:
        return "there is nothing to compute"
    samples, channels, height, width = x.shape
    if samples > 65535 or channels * height * width >= 2**31:
        return "the kernel's 32-bit offsets do not reach all elements"
    per_group = channels // groups
    if channels % ALIGNED or _smallest_bundle(per_group) * per_group > WIDEST:
        return f"no whole groups of {per_group} channels make an aligned tile"
    return None


def launch(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    addend: Tensor | None,
    cut: Plan | None = None,
) -> Tensor:
    """Run the kernels.

    Args:
        x: feature map (B, C, H, W), channels-last.
        groups: number of groups.
        weight: scale (C,).
        bias: shift (C,).
        eps: added to the variance.
        silu: apply SiLU to the result.
        addend: (B, C), or None.
        cut: overrides the plan.

    Returns:
        The normalised map (B, C, H, W), channels-last.
    """
    from sdinpaint_kernels import group_norm_kernel as kernel  # noqa: PLC0415 - triton is imported where it runs

    x = x.contiguous(memory_format=torch.channels_last)
    samples, channels, height, width = x.shape
    pixels = height * width
    cut = cut or plan(samples, channels, pixels, groups)
    out = torch.empty_like(x)
    added = addend, 0 if addend is None else addend.stride(0)
    bundles = -(-groups // cut.bundle)
    geometry = {
        "C": channels, "CPG": channels // groups, "BUNDLE": cut.bundle, "GROUPS": backend.power_of_two(cut.bundle),
        "WIDTH": cut.width, "ROWS": cut.rows, "num_warps": cut.warps,
    }  # fmt: skip
    if cut.one_pass:
        kernel.normalise[(bundles, samples)](x, *added, weight, bias, out, pixels, eps, SILU=silu, **geometry)
        return out
    chunks, chunk_pixels = cut.chunks(pixels), cut.rows * cut.tiles
    measured = x.new_empty(2, samples, groups, chunks, dtype=torch.float32)
    grid = (chunks, bundles, samples)
    kernel.measure[grid](x, *added, measured, pixels, cut.tiles, **geometry)
    if chunks > cut.direct:
        merged = x.new_empty(2, samples, groups, 1, dtype=torch.float32)
        kernel.merge[(samples * groups,)](
            measured, merged, pixels, chunks, chunk_pixels, CPG=channels // groups, SLOTS=backend.power_of_two(chunks)
        )
        measured, chunks, chunk_pixels = merged, 1, pixels
    kernel.apply[grid](
        x, *added, weight, bias, measured, out, pixels, cut.tiles, chunks, chunk_pixels, eps,
        SILU=silu, SLOTS=backend.power_of_two(chunks), **geometry,
    )  # fmt: skip
    return out


def _fake(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, addend: Tensor | None
) -> Tensor:
    return torch.empty_like(x)


_operation = backend.define(
    "group_norm(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool silu, Tensor? addend) -> Tensor",
    launch,
    reference,
    _fake,
)
