"""Layers that the models share, and how their weights lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, Self, cast, runtime_checkable

import torch
from sdinpaint_kernels import add_bias, add_layer_norm, conv3, forget, group_norm, linear, upsample_conv3
from torch import Tensor, nn

ROWS = 1024
"""Of what is wider inside of a layer than before and behind it."""


class Model(nn.Module):
    """A network whose weights are laid out for the GPU whenever it comes to one; their names and values stay."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda` and `half` go through."""
        nn.Module._apply(self, fn, recurse)
        if all(weight.is_cuda for weight in self.parameters()):
            lay_out(self)
        return self


@runtime_checkable
class Packed(Protocol):
    """A layer that multiplies by several weights at once."""

    def packed(self) -> tuple[Tensor, ...]:
        """The weights, in order."""


@torch.no_grad()
def lay_out(model: nn.Module) -> None:
    """Make a model's convolutions channels-last, and put weights that are read at once one after the other."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif isinstance(module, Packed):
            weights = module.packed()
            block = torch.cat([weight.data for weight in weights])
            for weight, part in zip(weights, block.split([len(weight) for weight in weights]), strict=True):
                weight.data = part


def rest(model: nn.Module) -> None:
    """Drop what a model's layers keep beside their weights, until it is used again."""
    for module in model.modules():
        if isinstance(module, Conv3):
            forget(module.weight)


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    """torch.cat(parts); of parts that lie one after the other, and need no gradient, without a copy."""
    first, memory = parts[0], parts[0].untyped_storage().data_ptr()
    in_order = not torch.compiler.is_compiling() and all(
        after.data_ptr() == before.data_ptr() + before.nbytes and after.untyped_storage().data_ptr() == memory
        for before, after in pairwise(parts)
    )
    if not in_order or any(part.requires_grad or not part.is_contiguous() for part in parts):
        return torch.cat(parts)
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def repeated(x: Tensor, batch: int) -> Tensor:
    """x (B, ...) -> (batch, ...): all of it again and again, as the halves of a guided batch; as it is if B >= batch.

    Raises: ValueError where B does not divide `batch`.
    """
    if len(x) >= batch:
        return x
    if batch % len(x):
        raise ValueError(f"a batch of {len(x)} meets one of {batch}; the same, or a divisor of it, is expected")
    return torch.cat([x] * (batch // len(x)))


class GroupNorm(nn.GroupNorm):
    """GroupNorm with an optional SiLU behind it, through the one implementation in `sdinpaint_kernels`."""

    def __init__(self, groups: int, channels: int, *, eps: float, silu: bool = False) -> None:
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), addend (B or 1, C): to add to x before -> (B, C, H, W)."""
        if addend is not None:
            addend = addend.expand(len(x), -1)
        norm = self.num_groups, self.weight, self.bias
        return group_norm(x, *norm, eps=self.eps, silu=self.silu, addend=addend)


class LayerNorm(nn.LayerNorm):
    """LayerNorm, also of a sum that is needed itself."""

    def of_sum(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """x and h (B, N, C) -> x + h, and that normalised."""
        return add_layer_norm(h, x, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """A linear layer, through the one implementation in `sdinpaint_kernels`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., O)."""
        return linear(x, self.weight, self.bias)


class Conv3(nn.Conv2d):
    """A 3 x 3 convolution that keeps height and width, through the one implementation in `sdinpaint_kernels`."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, O, H, W)."""
        return conv3(x, self.weight, self.bias)


class UpsampleConv3(Conv3):
    """Pixels repeated, then a `Conv3`, through the one implementation in `sdinpaint_kernels`."""

    def forward(self, x: Tensor, size: Sequence[int] = ()) -> Tensor:
        """x (B, C, H, W) -> (B, O, *size), or (B, O, 2H, 2W) without a size."""
        return upsample_conv3(x, self.weight, self.bias, size)


def adds_bias_apart(x: Tensor) -> bool:
    """Whether torch adds the bias of a convolution of x in a pass over memory of its own: so it is on a GPU."""
    return x.is_cuda


def unbiased(conv: nn.Module, x: Tensor) -> Tensor:
    """A `Conv3` without its bias."""
    return conv3(x, cast(Conv3, conv).weight)


def bias(conv: nn.Module) -> Tensor:
    """The bias of a convolution that has one, (C,)."""
    return cast(Tensor, conv.bias)


def norm_conv(norm: GroupNorm, conv: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x))."""
    return norm(unbiased(conv, x), bias(conv)[None]) if adds_bias_apart(x) else norm(conv(x))


def add_conv(x: Tensor, conv: nn.Module, h: Tensor) -> Tensor:
    """x + conv(h)."""
    if adds_bias_apart(h):
        return add_bias(x, unbiased(conv, h), bias(conv))
    h = conv(h)
    return h.add_(x) if torch.is_inference_mode_enabled() else x + h


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1 x 1 convolution (or nothing), as a matrix product, which adds the bias at no cost."""
    if not isinstance(conv, nn.Conv2d):
        return conv(x)
    return to_map(linear(to_tokens(x), conv.weight.flatten(1), conv.bias), x)


def by_rows(layer: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """layer(tokens (B, N, C)), which sees each by itself; on a CPU ROWS at a time, so that what is wide stays small.

    Memory of many megabytes is fetched from the system anew each time, which takes as long as a product over it.
    """
    if tokens.is_cuda or tokens.shape[:2].numel() <= ROWS:
        return layer(tokens)
    return torch.cat([layer(part) for part in tokens.flatten(0, 1).split(ROWS)]).view(*tokens.shape[:2], -1)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C); a view when x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W) with the height and width of `like`; a channels-last view."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
