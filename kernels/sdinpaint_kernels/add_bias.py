"""Adds two feature maps and a bias: x + h + b.

On a GPU, torch adds a convolution's bias in a separate pass over memory. Where a sum follows, this saves that pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdinpaint_kernels import backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Tile(NamedTuple):
    """The block of the output that one program of the kernel computes: pixels by channels, with a number of warps."""

    rows: int
    columns: int
    warps: int = 4


def tile_for(channels: int) -> Tile:
    """Choose a tile with 16 elements per thread of four warps, whose rows suit the released widths: multiples of 64.

    Args:
        channels: channels of the feature map.

    Returns:
        The tile.
    """
    columns = 128 if channels % 128 == 0 else 64
    return Tile(2048 // columns, columns)


def add_bias(x: Tensor, h: Tensor, bias: Tensor, *, kernels: str | None = None) -> Tensor:
    """Add two feature maps, and to every channel its bias.

    Args:
        x: feature map (B, C, H, W) in any memory format.
        h: the other feature map (B, C, H, W).
        bias: (C,).
        kernels: "torch", "triton" or "auto", see `backend`; None for the setting of the process.

    Returns:
        The sum (B, C, H, W).

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    if x.ndim != 4 or h.shape != x.shape or bias.shape != x.shape[1:2]:
        raise ValueError(
            f"add_bias takes x and h of one shape (B, C, H, W) and bias (C,), not x {tuple(x.shape)} with stride "
            f"{x.stride()}, h {tuple(h.shape)} with stride {h.stride()}, bias {tuple(bias.shape)}"
        )
    backend.check_same("add_bias", x, h=h, bias=bias)
    choice = backend.choose("add_bias", x, h, bias, requested=kernels, obstacle=_obstacle(x, h, bias))
    return (_operation if choice.name == "triton" else reference)(x, h, bias)


def reference(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """Compute x + h + bias in torch.

    Args:
        x: feature map (B, C, H, W).
        h: the other feature map (B, C, H, W).
        bias: (C,).

    Returns:
        The sum (B, C, H, W).
    """
    return x + (h + bias[:, None, None])


def _obstacle(x: Tensor, h: Tensor, bias: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"the kernel takes no {x.dtype}"
    if not (bias.is_contiguous() and all(one.is_contiguous(memory_format=torch.channels_last) for one in (x, h))):
        return "the kernel takes channels-last memory"
    if x.numel() == 0:
        return "there is nothing to compute"
    return None if x.shape[1] % 8 == 0 else f"{x.shape[1]} channels are not aligned to 8 elements"


def launch(x: Tensor, h: Tensor, bias: Tensor, tile: Tile | None = None) -> Tensor:
    """Run the kernel.

    Args:
        x: feature map (B, C, H, W), channels-last.
        h: the other feature map (B, C, H, W), channels-last.
        bias: (C,).
        tile: None for that of `tile_for`.

    Returns:
        The sum (B, C, H, W), channels-last.
    """
    from sdinpaint_kernels.add_bias_kernel import add  # noqa: PLC0415 - triton is imported where it runs

    x, h = (one.contiguous(memory_format=torch.channels_last) for one in (x, h))
    out = torch.empty_like(x)
    channels = x.shape[1]
    rows = x.numel() // channels
    tile = tile or tile_for(channels)
    grid = (-(-rows // tile.rows), -(-channels // tile.columns))
    add[grid](x, h, bias, out, rows, C=channels, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps)
    return out


def _fake(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


_operation = backend.define("add_bias(Tensor x, Tensor h, Tensor bias) -> Tensor", launch, reference, _fake)
