"""A 3 x 3 convolution, and what a network adds to it; on a GPU in one kernel where that was measured as faster.

A residual block adds a bias, the time embedding and a shortcut: its input, or a 1 x 1 convolution of it. The kernel
adds them before it writes, and takes the 1 x 1 convolution into the same sum, from one or two maps. So a skip
connection needs no concatenation, and the shortcut no map of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend, faster
from sdinpaint_kernels.add_bias import add_bias

DTYPES = (torch.float16, torch.bfloat16)
PROGRAMS = 264
"""The number of programs up to which a sum is split: two for each multiprocessor of an H200."""
LEAST_STEPS = 8
"""The minimum number of steps of a part, below which starting it costs more than it saves."""
ADDED = 2048
"""Elements of the tiles in which the parts of a sum are added up."""


class Config(NamedTuple):
    """The tile of one program, pixels by output channels, the input channels of a step, and compiler settings."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 0
    """The number of programs that share one sum; 0 for as many as fill the GPU."""


class Row(NamedTuple):
    """The `config` for at least `pixels` pixels, and output channels that `width` divides."""

    pixels: int
    width: int
    config: Config


CONFIGS = (
    Row(1024, 128, Config(128, 128, 64, 8, 3)),
    Row(256, 1, Config(128, 64, 64, 8, 4)),
    Row(0, 1, Config(64, 64, 64, 4, 4)),
)
"""The configurations of sizes that nobody measured. The first row that fits is used. All take at most 99 KB of shared
memory, and with two programs on a multiprocessor at most half of a Hopper's."""


def conv3_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    maps: Sequence[Tensor] = (),
    projection: Tensor | None = None,
    kernels: str | None = None,
) -> Tensor:
    """Apply a 3 x 3 convolution with stride 1 and zero padding of 1, and add to it.

    Args:
        x: feature map (B, C, H, W) in any memory format.
        weight: (O, C, 3, 3).
        bias: (O,), or None.
        addend: (B or 1, O), added to all pixels; it may be a slice of wider rows.
        residual: (B, O, H, W), added to the output.
        maps: one or two feature maps (B, C', H, W), whose concatenation is multiplied by `projection` and added.
        projection: (O, sum of C'), or None without maps.
        kernels: "torch", "triton" or "auto", see `backend`; None for the setting of the process.

    Returns:
        The sum (B, O, H, W).

    Source: https://arxiv.org/abs/1410.0759, section 3, "implicit GEMM".
    """
    given = x, weight, bias, addend, residual, list(maps), projection
    obstacle = _obstacle(*given)
    if obstacle is None and (kernels or backend.SETTING) == "auto":
        obstacle = faster.why_torch("conv3_add", sizes(x, weight, residual, maps), x)
    others = (one for one in (weight, bias, addend, residual, *maps, projection) if one is not None)
    choice = backend.choose("conv3_add", x, *others, requested=kernels, obstacle=obstacle)
    return (_operation if choice.name == "triton" else reference)(*given)


def sizes(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, maps: Sequence[Tensor] = ()
) -> tuple[int, int, int, int]:
    """Tell calls apart.

    Args:
        x: feature map (B, C, H, W).
        weight: (O, C, 3, 3).
        residual: (B, O, H, W), or None.
        maps: feature maps (B, C', H, W) that are projected and added.

    Returns:
        The numbers of pixels of the batch, of channels of input and output, and of projected channels: 1 for a
        residual as it is.
    """
    added = sum(one.shape[1] for one in maps) or int(residual is not None)
    return len(x) * x.shape[2] * x.shape[3], weight.shape[1], weight.shape[0], added


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
    maps: Sequence[Tensor],
    projection: Tensor | None,
) -> Tensor:
    """Compute the sum by torch's operations.

    Args:
        x: feature map (B, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,), or None.
        addend: (B or 1, O), or None.
        residual: (B, O, H, W), or None.
        maps: feature maps (B, C', H, W).
        projection: (O, sum of C'), or None.

    Returns:
        The sum (B, O, H, W).
    """
    if projection is not None:
        joined = maps[0] if len(maps) == 1 else torch.cat(list(maps), dim=1)
        shared, addend = (addend[0], None) if addend is not None and len(addend) == 1 else (None, addend)
        shortcut = F.linear(joined.permute(0, 2, 3, 1), projection, shared).permute(0, 3, 1, 2)
        residual = shortcut if residual is None else residual + shortcut
    if residual is None:
        out = F.conv2d(x, weight, bias, padding=1)
    else:
        h = F.conv2d(x, weight, padding=1)
        out = residual + h if bias is None else add_bias(residual, h, bias)
    return out if addend is None else out + addend[:, :, None, None]


def _obstacle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
    maps: Sequence[Tensor],
    projection: Tensor | None,
) -> str | None:
    """Return the reason why the kernel cannot take this call."""
    if x.dtype not in DTYPES and not (backend.INTERPRETED and x.dtype == torch.float32):
        return f"the kernel takes no {x.dtype}"
    images = [one for one in (x, weight, residual, *maps) if one is not None]
    if not all(one.ndim == 4 and one.is_contiguous(memory_format=torch.channels_last) for one in images):
        return "the kernel takes channels-last memory"
    whole = all(one is None or one.is_contiguous() for one in (bias, projection))
    if not whole or (addend is not None and addend.stride(1) != 1):
        return "the kernel takes bias, projection and rows of addend in one piece"
    if x.numel() == 0:
        return "there is nothing to compute"
    pixels, channels, outputs, _ = sizes(x, weight)
    widest = max(channels, outputs, *(one.shape[1] for one in maps), 1)
    return "the kernel's 32-bit offsets do not reach all elements" if pixels * widest >= 2**31 else None


def config_for(pixels: int, outputs: int) -> Config:
    """Choose the configuration of sizes that nobody measured.

    Args:
        pixels: of the batch.
        outputs: channels of the output.

    Returns:
        The configuration.
    """
    return next(row.config for row in CONFIGS if pixels >= row.pixels and outputs % row.width == 0)


def fitted(config: Config, pixels: int, channels: Sequence[int], outputs: int) -> Config:
    """Fit a configuration to a call: a step within one map where its channels allow, and parts that fill the GPU.

    Args:
        config: any configuration.
        pixels: of the batch.
        channels: of the convolved map, then of those that are projected.
        outputs: channels of the output.

    Returns:
        The configuration with a step that is no larger, and a number of parts.
    """
    block_k = next(
        (size for size in (128, 64, 32) if size <= config.block_k and not any(one % size for one in channels)), 16
    )
    steps = 9 * -(-channels[0] // block_k) + sum(-(-one // block_k) for one in channels[1:])
    programs = -(-pixels // config.block_m) * -(-outputs // config.block_n)
    split = config.split or max(1, min(PROGRAMS // programs, steps // LEAST_STEPS))
    return config._replace(block_k=block_k, split=min(split, steps))


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    maps: Sequence[Tensor] = (),
    projection: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Run the kernels.

    Args:
        x: feature map (B, C, H, W), channels-last, as all maps and weight are.
        weight: (O, C, 3, 3).
        bias: (O,), or None.
        addend: (B or 1, O), or None.
        residual: (B, O, H, W), or None.
        maps: none, one or two feature maps (B, C', H, W).
        projection: (O, sum of C'), or None.
        config: None for the measured one, or else that of `config_for`.

    Returns:
        The sum (B, O, H, W), channels-last.
    """
    from sdinpaint_kernels.conv3_add_kernel import add_up, convolve  # noqa: PLC0415 - triton only where it runs

    pixels, channels, outputs, _ = told = sizes(x, weight, residual, maps)
    widths = [channels, *(one.shape[1] for one in maps)]
    config = fitted(config or _measured(x, told) or config_for(pixels, outputs), pixels, widths, outputs)
    area = x.shape[2] * x.shape[3]
    added = bias, addend, 0 if addend is None or len(addend) == 1 else addend.stride(0), residual
    out = _empty(x, weight)
    parts = x.new_empty(config.split, pixels, outputs, dtype=torch.float32) if config.split > 1 else None
    first, second = [*maps, None, None][:2]
    c1, c2 = [*widths[1:], 0, 0][:2]
    tiles = -(-outputs // config.block_n), -(-pixels // config.block_m)
    convolve[(*tiles, config.split)](
        x, weight, first, second, projection, *(added if parts is None else (None, None, 0, None)),
        out if parts is None else parts, pixels, x.shape[2], x.shape[3],
        C=channels, C1=c1, C2=c2, OUTPUTS=outputs,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT=config.split,
        UPCAST=backend.INTERPRETED and x.dtype == torch.bfloat16,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if parts is not None:
        columns = 128 if outputs % 128 == 0 else 64
        rows = ADDED // columns
        grid = (-(-outputs // columns), -(-pixels // rows))
        add_up[grid](parts, *added, out, pixels, area, SPLIT=config.split, OUTPUTS=outputs, ROWS=rows, COLUMNS=columns)
    return out


def _measured(x: Tensor, told: tuple[int, ...]) -> Config | None:
    found = faster.configuration("conv3_add", told, x.device) if x.is_cuda else None
    return None if found is None else Config(*found)


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    shape = len(x), len(weight), *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
    maps: Sequence[Tensor],
    projection: Tensor | None,
) -> Tensor:
    return _empty(x, weight)


_operation = backend.define(
    "conv3_add(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, Tensor? residual, Tensor[] maps, "
    "Tensor? projection) -> Tensor",
    launch,
    reference,
    _fake,
)
