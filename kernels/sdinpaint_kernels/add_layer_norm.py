"""A residual addition and the LayerNorm of the sum, in one pass over memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 4096  # so that a row fits into the registers of one program


class Tile(NamedTuple):
    """The block that one program of the kernel computes: whole rows, with a number of warps."""

    rows: int
    warps: int


def tile_for(width: int) -> Tile:
    """Choose a tile with 16 to 32 elements per thread of four warps.

    Args:
        width: elements of a row.

    Returns:
        The tile.
    """
    return Tile(rows=max(1, 2048 // backend.power_of_two(width)), warps=4)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, kernels: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add the residual, and normalise every row of the sum to zero mean and unit variance, scaled and shifted.

    Args:
        x: (..., C).
        residual: (..., C).
        weight: scale (C,).
        bias: shift (C,).
        eps: added to the variance.
        kernels: "torch", "triton" or "auto", see `backend`; None for the setting of the process.

    Returns:
        The sum and the normalised sum, (..., C) each.

    Raises:
        ValueError: shapes, dtypes or devices do not match.

    Source: https://arxiv.org/abs/1607.06450, equation 4.
    """
    if x.shape != residual.shape or x.ndim == 0 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"add_layer_norm takes x and residual of one shape (..., C), weight and bias (C,), not x "
            f"{tuple(x.shape)} with stride {x.stride()}, residual {tuple(residual.shape)} with stride "
            f"{residual.stride()}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        )
    backend.check_same("add_layer_norm", x, residual=residual, weight=weight, bias=bias)
    obstacle = _obstacle(x, residual, weight, bias)
    choice = backend.choose("add_layer_norm", x, residual, weight, bias, requested=kernels, obstacle=obstacle)
    return (_operation if choice.name == "triton" else reference)(x, residual, weight, bias, eps)


def reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute x + residual and its LayerNorm in torch.

    Args:
        x: (..., C).
        residual: (..., C).
        weight: scale (C,).
        bias: shift (C,).
        eps: added to the variance.

    Returns:
        The sum and the normalised sum, (..., C) each.
    """
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute `F.layer_norm`, exact even where the mean of a row is many standard deviations.

    On the CPU torch rounds means to float32 and computes x * scale + shift, with an error of 2^-24 mean / deviation.
    Rows in half precision cannot have a ratio large enough to matter. The norm of x - c is that of x for any constant
    c, with the same derivatives.

    Args:
        x: (..., C).
        weight: scale (C,).
        bias: shift (C,).
        eps: added to the variance.

    Returns:
        The normalised rows (..., C).
    """
    if x.is_cpu and x.dtype == torch.float32:
        x = x - x.detach().mean(-1, keepdim=True)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _obstacle(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"the kernel takes no {x.dtype}"
    if not all(tensor.is_contiguous() for tensor in (x, residual, weight, bias)):
        return "the kernel takes contiguous tensors"
    if x.numel() == 0:
        return "there is nothing to compute"
    width = x.shape[-1]
    return None if width % 8 == 0 and width <= WIDEST else f"rows of {width} are unaligned or too wide"


def launch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Args:
        x: (..., C), contiguous.
        residual: (..., C), contiguous.
        weight: scale (C,).
        bias: shift (C,).
        eps: added to the variance.
        tile: None for that of `tile_for`.

    Returns:
        The sum and the normalised sum, (..., C) each.
    """
    from sdinpaint_kernels.add_layer_norm_kernel import add_and_normalise  # noqa: PLC0415 - imports triton

    x, residual = x.contiguous(), residual.contiguous()
    width = x.shape[-1]
    tile = tile or tile_for(width)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rows = x.numel() // width
    add_and_normalise[(-(-rows // tile.rows),)](
        x, residual, weight, bias, total, normed, rows, eps,
        C=width, ROWS=tile.rows, COLUMNS=backend.power_of_two(width), num_warps=tile.warps,
    )  # fmt: skip
    return total, normed


def _fake(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


_operation = backend.define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    launch,
    reference,
    _fake,
)
