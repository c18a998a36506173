"""GroupNorm, with the time embedding that may be added before it and the SiLU that usually follows it.

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
LEAST_IN_BANDS = 2**16
"""Numbers of a map on the CPU; with fewer, starting a dozen operations takes longer than the passes that they spare."""


class Plan(NamedTuple):
    """How a feature map is cut for the kernels.

    A program takes `bundle` groups, in tiles of `rows` pixels by `width` channels, `tiles` of them one after the other:
    a chunk. Up to `direct` chunks are merged by those who need them, more of them by a kernel of its own.
    """

    bundle: int
    width: int
    rows: int
    tiles: int
    warps: int
    one_pass: bool
    direct: int = DIRECT_CHUNKS

    def chunks(self, pixels: int) -> int:
        """The number of chunks of a sample."""
        return -(-pixels // (self.rows * self.tiles))


@functools.cache
def plan(samples: int, channels: int, pixels: int, groups: int) -> Plan:
    """The plan for a shape that has no obstacle."""
    per_group = channels // groups
    smallest = _smallest_bundle(per_group)
    narrow = backend.power_of_two(smallest * per_group)
    rows = backend.power_of_two(pixels)
    if pixels <= ONE_PASS_PIXELS and rows * narrow <= ONE_PASS_TILE:
        # Many small programs: there are few pixels, and every program waits for its own.
        return Plan(smallest, narrow, rows, 1, warps=max(4, rows * narrow // 2048), one_pass=True)
    # As narrow as a cache line, though some lanes then hold no channel: on an H100 that beat fuller, wider tiles by up
    # to a half, at every shape of the UNets and autoencoders.
    width = max(narrow, NARROW)
    bundle = min(groups, width // (smallest * per_group) * smallest)
    rows = TILE // width
    programs = samples * -(-groups // bundle) * pixels // rows
    return Plan(bundle, width, rows, tiles=backend.power_of_two(-(-programs // PROGRAMS)), warps=4, one_pass=False)


def _smallest_bundle(per_group: int) -> int:
    """The fewest groups whose channels start, in every pixel and for every bundle, where a load may."""
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

    x (N, C, H, W) in any memory format -> the same shape and format; weight and bias (C,); addend (N, C), which may be
    a slice of wider rows, is added to all pixels of x first. `eps` has no default: the released models use 1e-5 in some
    places and 1e-6 in others. `overwrite`: the caller needs x no longer, and the result may take its memory.
    `kernels`: "torch", "triton" or "auto", see `backend`.
    Raises: ValueError for shapes, dtypes or devices that do not go together.
    Source: https://arxiv.org/abs/1803.08494, equations 1 to 3.
    """
    _check(x, groups, weight, bias, addend)
    obstacle = None if backend.is_functional() else _obstacle(x, groups, weight, bias, addend)
    choice = backend.choose("group_norm", x, weight, bias, addend, requested=kernels, obstacle=obstacle)
    if choice.name == "triton":
        return _operation(x, groups, weight, bias, eps, silu, addend)
    many = x.numel() >= LEAST_IN_BANDS or x.dtype in HALF  # of which every operation rounds
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
    """The formula for inference on the CPU: as exact in every memory format, and SiLU while a band is in the cache."""
    norm = moments.affine(moments.measure(x), groups, weight, bias, eps, addend, x.dtype)
    return moments.apply(x, norm, silu, overwrite)


def reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, addend: Tensor | None
) -> Tensor:
    """The formula in torch, differentiable and for a compiler to see through, in the memory format of x."""
    if x.is_cpu:
        out = _about_means(x, groups, weight, bias, eps, addend)
    else:
        x = x if addend is None else x + addend[:, :, None, None]
        out = F.group_norm(x, groups, weight, bias, eps)
    # The norm's output is ours to overwrite, unless autograd still needs it.
    out = F.silu(out, inplace=not out.requires_grad) if silu else out
    # On CUDA, torch's norm puts out channels-first whatever it gets.
    return out.contiguous(memory_format=moments.layout_of(x))


def _about_means(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, addend: Tensor | None) -> Tensor:
    """F.group_norm of x + addend about the means of their groups, channels-first.

    On the CPU, torch computes E[x^2] - E[x]^2 of channels-last maps from long sums in float32, and x * scale + shift in
    both formats: the one loses digits to the size of the map, the other to the mean.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = _centred(x.to(wide), groups)
    if addend is not None:
        total = total + _centred(addend[:, :, None, None].to(wide), groups)
    return F.group_norm(total.contiguous(), groups, weight.to(wide), bias.to(wide), eps).to(x.dtype)


def _centred(x: Tensor, groups: int) -> Tensor:
    """x less the means of its groups, which are constants to a derivative: a norm is the same for any of them."""
    grouped = x.unflatten(1, (groups, -1))
    return (grouped - grouped.detach().mean((2, 3, 4), keepdim=True)).flatten(1, 2)


def _check(x: Tensor, groups: int, weight: Tensor, bias: Tensor, addend: Tensor | None) -> None:
    channels = x.shape[1] if x.ndim == 4 else 0
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(
            f"group_norm takes x (N, C, H, W) with C a multiple of the {groups} groups, "
            f"not shape {tuple(x.shape)} with stride {x.stride()}"
        )
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"group_norm of {channels} channels takes weight and bias ({channels},), "
            f"not {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if addend is not None and addend.shape != x.shape[:2]:
        raise ValueError(f"group_norm takes addend (N, C) = {tuple(x.shape[:2])}, not {tuple(addend.shape)}")
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
    """Run the kernels over channels-last x (N, C, H, W) -> the same, channels-last; `cut` overrides the plan."""
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
