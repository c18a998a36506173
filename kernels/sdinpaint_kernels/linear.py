"""Linear layers; on the CPU by oneDNN, whose products add a residual or multiply by a gate before they round.

The operations are those that torch's own compiler emits. Weights that are mapped from a file are reordered once, and
the copy replaces them in memory; others are read as they are. The two agree within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend
from sdinpaint_kernels.prepacked import replaced

LEAST_WEIGHTS = 2**16
"""The minimum number of weights that are reordered; for fewer, looking them up takes as long as it saves."""
ROWS = 1024
"""The number of rows that weights are ordered for; the order holds for any."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, kernels: str | None = None
) -> Tensor:
    """Compute x weight^T + bias + residual.

    Args:
        x: (..., C).
        weight: (O, C), or (O, C, 1, 1).
        bias: (O,), or None.
        residual: (..., O), or None.
        kernels: "torch" for torch's own operation, see `backend`.

    Returns:
        The output (..., O).
    """
    if kernels != "torch" and x.numel() > 0 and backend.on_cpu(x, weight, bias, residual):
        ordered = _ordered(x, [weight], _order)
        added = None if residual is None else residual.expand(*x.shape[:-1], len(weight))  # oneDNN does not check it
        return product(x, _matrix(weight) if ordered is None else ordered, bias, added, "add")
    return backend.with_residual(F.linear(x, _matrix(weight), bias), residual)


def joint_linear(x: Tensor, weights: Sequence[Tensor], whole: Tensor | None = None) -> tuple[Tensor, ...]:
    """Multiply by several weights, at once where that needs no copy of them.

    Args:
        x: (..., C).
        weights: K matrices (O, C).
        whole: the same as one matrix (K * O, C), if they are contiguous in memory.

    Returns:
        K products (..., O), which may be views of one tensor.
    """
    here = x.numel() > 0 and backend.on_cpu(x, *weights)
    if here and (ordered := _ordered(x, weights, _order)) is not None:
        return product(x, ordered).chunk(len(weights), dim=-1)
    if whole is None:
        return tuple(linear(x, weight) for weight in weights)
    return (product(x, whole) if here else F.linear(x, whole)).chunk(len(weights), dim=-1)


def gated_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the product with the first half of the weights, times the exact GELU of that with the second half.

    Args:
        x: (..., C), on the CPU.
        weight: (2 * inner, C).
        bias: (2 * inner,).

    Returns:
        The gated product (..., inner).
    """
    (first, second), (value, gate) = _ordered(x, [weight], _order_halves) or weight.chunk(2), bias.chunk(2)
    return product(x, first, value, product(x, second, gate, activation="gelu"), "mul")


def products(x: Tensor, weights: Sequence[Tensor] | Tensor) -> tuple[Tensor, ...]:
    """Multiply each of K matrices by its own weights.

    Args:
        x: (K, N, C).
        weights: as `ordered_products` returned them for (K, O, C).

    Returns:
        K matrices (N, O).
    """
    if isinstance(weights, Tensor):
        return torch.bmm(x, weights.transpose(1, 2)).unbind()
    return tuple(product(one, weight) for one, weight in zip(x, weights, strict=True))


def ordered_products(weights: Tensor) -> Sequence[Tensor] | Tensor:
    """Arrange weights for `products`.

    Args:
        weights: (K, O, C).

    Returns:
        In bfloat16 the same, as torch multiplies all at once by oneDNN; else each in the order of oneDNN.
    """
    return weights if weights.dtype == torch.bfloat16 else [_order(weight) for weight in weights]


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    how: str = "add",
    activation: str = "none",
) -> Tensor:
    """Compute activation(x weight^T + bias), or that product plus or times another tensor, by oneDNN.

    Args:
        x: (..., C), on the CPU.
        weight: (O, C), as it is or in the order of oneDNN.
        bias: (O,), or None.
        other: (..., O), or None.
        how: "add" or "mul", for `other`.
        activation: as oneDNN names it; without `other` only.

    Returns:
        The output (..., O).
    """
    if other is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, how)


def _ordered(x: Tensor, weights: Sequence[Tensor], make: Callable[..., Any]) -> Any | None:
    """Return weights in the order of oneDNN where that takes no more memory and may be faster, else None."""
    worth = x.numel() > x.shape[-1] and weights[0].numel() >= LEAST_WEIGHTS
    return replaced(weights, make) if worth else None


def _matrix(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 2 else weight.flatten(1)


def _order(*weights: Tensor) -> Tensor:
    whole = _matrix(weights[0]) if len(weights) == 1 else torch.cat(weights)
    return torch.ops.mkldnn._reorder_linear_weight(whole, ROWS)


def _order_halves(weight: Tensor) -> list[Tensor]:
    return [_order(half) for half in weight.chunk(2)]
