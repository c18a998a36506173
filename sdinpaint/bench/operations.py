"""The operations that the models call: each in plain torch, and what tells one of its calls from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "TORCHS_OWN", "Operation"]

Function = Callable[..., Any]


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    silu: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    if addend is not None:
        x = x + addend[:, :, None, None]
    normed = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(normed) if silu else normed


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def _add_bias(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    return x + h + bias[:, None, None]


def _conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    out = F.conv2d(x, weight, bias, padding=1)
    return out if residual is None else out + residual


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    out = F.linear(x, weight.flatten(1), bias)
    return out if residual is None else out + residual


def _joint_linear(x: Tensor, weights: Sequence[Tensor], whole: Tensor | None = None) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight) for weight in weights)


def _conv3_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    maps: Sequence[Tensor] = (),
    projection: Tensor | None = None,
) -> Tensor:
    out = F.conv2d(x, weight, bias, padding=1)
    if projection is not None:
        out = out + F.conv2d(torch.cat(list(maps), dim=1), projection[:, :, None, None])
    out = out if addend is None else out + addend[:, :, None, None]
    return out if residual is None else out + residual


def _linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _geglu(F.linear(x, weight, bias))


def _upsample_conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None, size: Sequence[int] = ()) -> Tensor:
    size = tuple(size) or tuple(2 * side for side in x.shape[2:])
    return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)


def _downsample_conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 1) -> Tensor:
    return F.conv2d(x, weight, bias, stride=2, padding=padding)


def _size(x: Tensor) -> str:
    """Describe a tensor as "2x320x64x64", with its memory format unless it is contiguous."""
    size = "x".join(map(str, x.shape))
    if x.is_contiguous():
        return size
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return f"{size} {'channels-last' if channels_last else 'strided'}"


def _of_attention(q: Tensor, k: Tensor, *_: object, **options: object) -> str:
    return _size(q) if q.shape == k.shape else f"{_size(q)} to {k.shape[1]}"


def _of_group_norm(x: Tensor, *_: object, silu: bool = False, addend: Tensor | None = None, **options: object) -> str:
    return _size(x) + " + addend" * (addend is not None) + ", silu" * silu


def _of_first(x: Tensor, *_: object, **options: object) -> str:
    return _size(x)


def _of_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> str:
    added = " + bias" * (bias is not None) + " + residual" * (residual is not None)
    return f"{_size(x)} to {len(weight)}{added}"


def _of_joint_linear(x: Tensor, weights: Sequence[Tensor], *_: object) -> str:
    return f"{_size(x)} to {len(weights)} x {len(weights[0])}"


def _of_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1, 1), *_: object
) -> str:
    channels, _in, height, width = weight.shape
    strided = f", stride {stride[0]}" * (stride[0] > 1)
    return f"{height}x{width}, {_size(x)} to {channels}{strided}" + " + bias" * (bias is not None)


def _of_conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> str:
    return _of_convolution(x, weight, bias) + " + residual" * (residual is not None)


def _of_sum(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, maps: Sequence[Tensor] = (), **added: Tensor | None
) -> str:
    names = [name for name, one in added.items() if one is not None and name != "projection"]
    projected = [f"{one.shape[1]} projected" for one in maps]
    return " + ".join([_of_convolution(x, weight, bias), *names, *projected])


def _of_upsampling(x: Tensor, weight: Tensor, bias: Tensor | None = None, size: Sequence[int] = ()) -> str:
    return _of_convolution(x, weight, bias) + (f" of {size[0]}x{size[1]}" if size else "")


def _of_downsampling(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 1) -> str:
    return _of_convolution(x, weight, bias, (2, 2)) + f", padding {padding}"


@dataclass(frozen=True)
class Operation:
    """An operation that the models call."""

    plain: Function
    """The operation in plain torch, which takes the same arguments."""
    told: Callable[..., str]
    """Describes the arguments that tell one call from another."""


OPERATIONS: Mapping[str, Operation] = {
    "attention": Operation(_attention, _of_attention),
    "group_norm": Operation(_group_norm, _of_group_norm),
    "geglu": Operation(_geglu, _of_first),
    "add_layer_norm": Operation(_add_layer_norm, _of_first),
    "add_bias": Operation(_add_bias, _of_first),
    "conv3": Operation(_conv3, _of_conv3),
    "conv3_add": Operation(_conv3_add, _of_sum),
    "upsample_conv3": Operation(_upsample_conv3, _of_upsampling),
    "downsample_conv3": Operation(_downsample_conv3, _of_downsampling),
    "linear": Operation(_linear, _of_linear),
    "joint_linear": Operation(_joint_linear, _of_joint_linear),
    "linear_geglu": Operation(_linear_geglu, _of_linear),
    "F.conv2d": Operation(F.conv2d, _of_convolution),
    "F.linear": Operation(F.linear, _of_linear),
}
TORCHS_OWN = {F.conv2d: "F.conv2d", F.linear: "F.linear"}
"""Functions that the models leave to torch, so that there is no baseline."""
