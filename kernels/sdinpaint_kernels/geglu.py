"""GEGLU: the first half of the channels, gated by the GELU of the second half."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Tile(NamedTuple):
    """The block of the output that one program of the kernel computes: rows by columns, with a number of warps."""

    rows: int = 4
    columns: int = 256
    warps: int = 4


TILE = Tile()


def geglu(x: Tensor, *, kernels: str | None = None) -> Tensor:
    """Gate the first half of the last dimension by the exact GELU (with erf) of the second half.

    Args:
        x: (..., 2 * inner).
        kernels: "torch", "triton" or "auto", see `backend`; None for the setting of the process.

    Returns:
        The gated half (..., inner).

    Raises:
        ValueError: x cannot be split in two, or is not floating point.

    Source: https://arxiv.org/abs/2002.05202, equation 6.
    """
    if x.ndim == 0 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            f"geglu takes floating-point numbers in an even number of columns, "
            f"not {x.dtype} of shape {tuple(x.shape)} and stride {x.stride()}"
        )
    choice = backend.choose("geglu", x, requested=kernels, obstacle=_obstacle(x))
    return _operation(x) if choice.name == "triton" else reference(x)


def reference(x: Tensor) -> Tensor:
    """Compute value * 0.5 * gate * (1 + erf(gate / sqrt(2))) in torch.

    Args:
        x: (..., 2 * inner).

    Returns:
        The gated half (..., inner).
    """
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _obstacle(x: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"the kernel takes no {x.dtype}"
    if not x.is_contiguous():
        return "the kernel takes contiguous rows"
    if x.numel() == 0:
        return "there is nothing to compute"
    return None if x.shape[-1] % 16 == 0 else "halves of a row are not aligned to 8 elements"


def launch(x: Tensor, tile: Tile = TILE) -> Tensor:
    """Run the kernel.

    Args:
        x: (..., 2 * inner), contiguous.
        tile: the block of one program.

    Returns:
        The gated half (..., inner).
    """
    from sdinpaint_kernels.geglu_kernel import gate  # noqa: PLC0415 - triton is imported where it runs

    x = x.contiguous()
    inner = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], inner)
    rows = out.numel() // inner
    grid = (-(-rows // tile.rows), -(-inner // tile.columns))
    gate[grid](x, out, rows, INNER=inner, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps)
    return out


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


_operation = backend.define("geglu(Tensor x) -> Tensor", launch, reference, _fake)
