"""A linear layer whose output is gated by GEGLU; on a GPU in one kernel where that was measured as faster.

The layer's output is eight times as wide as its input. The kernel gates a tile before it writes, so that the wide
output is never stored; but its product may be slower than torch's. On a CPU the GELU and the gate are part of products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdinpaint_kernels import backend, faster
from sdinpaint_kernels.geglu import geglu
from sdinpaint_kernels.linear import gated_product, linear

DTYPES = (torch.float16, torch.bfloat16)


class Config(NamedTuple):
    """The tile of one program, rows by gated columns, the input channels of a step, and two compiler settings."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


CONFIG = Config(128, 64, 64, 8, 3)
"""The configuration of sizes that nobody measured: both halves together are a tile of 128 columns."""


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor, *, kernels: str | None = None) -> Tensor:
    """Compute x weight^T + bias, and gate its first half by the exact GELU (with erf) of its second half.

    Args:
        x: (..., C).
        weight: (2 * inner, C).
        bias: (2 * inner,).
        kernels: "torch", "triton" or "auto", see `backend`; None for the setting of the process.

    Returns:
        The gated half (..., inner).

    Source: https://arxiv.org/abs/2002.05202, equation 6.
    """
    if kernels is None and x.numel() > 0 and backend.on_cpu(x, weight, bias):
        return gated_product(x, weight, bias)
    obstacle = _obstacle(x, weight, bias)
    if obstacle is None and (kernels or backend.SETTING) == "auto":
        obstacle = faster.why_torch("linear_geglu", sizes(x, weight), x)
    choice = backend.choose("linear_geglu", x, weight, bias, requested=kernels, obstacle=obstacle)
    return (_operation if choice.name == "triton" else reference)(x, weight, bias)


def sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Tell calls apart.

    Args:
        x: (..., C).
        weight: (2 * inner, C).

    Returns:
        The numbers of rows, of channels, and of gated columns.
    """
    return x.shape[:-1].numel(), weight.shape[1], len(weight) // 2


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the layer, then gate its output.

    Args:
        x: (..., C).
        weight: (2 * inner, C).
        bias: (2 * inner,).

    Returns:
        The gated half (..., inner).
    """
    return geglu(linear(x, weight, bias))


def _obstacle(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if x.dtype not in DTYPES and not (backend.INTERPRETED and x.dtype == torch.float32):
        return f"the kernel takes no {x.dtype}"
    if not all(one.is_contiguous() for one in (x, weight, bias)):
        return "the kernel takes contiguous rows"
    if x.numel() == 0:
        return "there is nothing to compute"
    if sizes(x, weight)[0] * len(weight) >= 2**31:
        return "the kernel's 32-bit offsets do not reach all elements"
    return None


def launch(x: Tensor, weight: Tensor, bias: Tensor, config: Config | None = None) -> Tensor:
    """Run the kernel.

    Args:
        x: (..., C), contiguous, as weight and bias are.
        weight: (2 * inner, C).
        bias: (2 * inner,).
        config: None for the measured one, or else CONFIG.

    Returns:
        The gated half (..., inner).
    """
    from sdinpaint_kernels.linear_geglu_kernel import multiply_and_gate  # noqa: PLC0415 - triton only where it runs

    rows, channels, inner = told = sizes(x, weight)
    config = config or _measured(x, told) or CONFIG
    out = _fake(x, weight, bias)
    grid = (-(-rows // config.block_m), -(-inner // config.block_n))
    multiply_and_gate[grid](
        x, weight, bias, out, rows, C=channels, INNER=inner,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        UPCAST=backend.INTERPRETED and x.dtype == torch.bfloat16,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _measured(x: Tensor, told: tuple[int, int, int]) -> Config | None:
    found = faster.configuration("linear_geglu", told, x.device) if x.is_cuda else None
    return None if found is None else Config(*found)


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight) // 2)


_operation = backend.define("linear_geglu(Tensor x, Tensor weight, Tensor bias) -> Tensor", launch, reference, _fake)
