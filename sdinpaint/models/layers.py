"""Layers that torch has not, the shapes that they take turns in, and what makes a layer plain."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any, TypeVar

import torch
from sdinpaint_kernels import conv3, group_norm, is_functional, is_transformed, layer_norm
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

Class = TypeVar("Class", bound=type[nn.Module])

_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Linear, nn.Conv2d, nn.SiLU, nn.Identity, nn.Sequential, nn.ModuleList)
}
"""The classes of plain layers, each with the forward that it has when this is imported."""
_CALL = nn.Module.__call__
_PLAIN_WEIGHTS = (nn.Parameter, Tensor, NoneType)
"""Types of weights that lie in memory as they are; `torch.func.functional_call` puts in tensors."""


def plain(kind: Class) -> Class:
    """Let instances of a class count as plain layers; a decorator."""
    _FORWARDS[kind] = kind.forward
    return kind


def is_plain(*modules: nn.Module) -> bool:
    """Tell whether calling these modules, and all within them, does what their class says and nothing else.

    A fusion computes several layers at once and so does not call them: it is taken of plain layers alone. What is
    hooked, wrapped, parametrized, compiled, quantized, adapted or replaced is called; and everything is, while it is
    traced.
    """
    return not (is_transformed() or torch_module._has_any_global_hook()) and all(map(_is_plain, modules))


def are_plain(layers: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether a sequence is plain and holds layers of these very classes, which a fusion takes for granted."""
    return [type(layer) for layer in layers.children()] == [*kinds] and is_plain(layers)


def _is_plain(module: nn.Module) -> bool:
    # it is asked some thousand times in a step: hence the loop, and the cheapest questions
    kind, own = type(module), module.__dict__
    if _FORWARDS.get(kind) is not kind.forward or kind.__call__ is not _CALL or "forward" in own:
        return False
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    if own.get("_compiled_call_impl") is not None or "_conv_forward" in own:
        return False
    if kind is Conv3 and not module.is_standard():  # type: ignore[operator]
        return False
    for weight in own["_parameters"].values():
        if type(weight) not in _PLAIN_WEIGHTS:
            return False
    return all(child is None or _is_plain(child) for child in own["_modules"].values())


@plain
class GroupNorm(nn.GroupNorm):
    """GroupNorm through the one implementation in `sdinpaint_kernels`, which is accurate in every memory layout."""

    def __init__(self, groups: int, channels: int, *, eps: float) -> None:
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        return group_norm(x, self.num_groups, self.weight, self.bias, eps=self.eps)


@plain
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, exact also where the mean of a row is many deviations."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        return layer_norm(x, self.weight, self.bias, self.eps)


STANDARD = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
"""Kernel, stride, padding, dilation, groups and the kind of padding of a `Conv3`."""


@plain
class Conv3(nn.Conv2d):
    """A 3 x 3 convolution that keeps height and width, through the one implementation in `sdinpaint_kernels`.

    Libraries of adapters make layers of the class of the one that they adapt, with other sizes and without a bias:
    they are given torch's own.
    """

    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """Return torch's convolution where it is to be of another kind."""
        if sizes[2:] in ((), (3, 1, 1)) and not options:
            return super().__new__(cls)
        return nn.Conv2d(*sizes, **options)

    def __init__(self, channels_in: int, channels_out: int, *_: Any) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)

    def is_standard(self) -> bool:
        """Tell whether nobody changed what it does since: circular padding, say, makes textures that tile."""
        sizes = self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        return sizes == STANDARD and self.bias is not None and "_conv_forward" not in self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, O, H, W)."""
        return conv3(x, self.weight, self.bias) if self.is_standard() else super().forward(x)


def repeated(x: Tensor, batch: int) -> Tensor:
    """x (B, ...) -> (batch, ...): all of it again and again, as the halves of a guided batch; as it is if B >= batch.

    Raises: ValueError where B does not divide `batch`.
    """
    if len(x) >= batch:
        return x
    if batch % len(x):
        raise ValueError(f"a batch of {len(x)} meets one of {batch}; the same, or a divisor of it, is expected")
    return torch.cat([x] * (batch // len(x)))


def channels_last(x: Tensor) -> Tensor:
    """Lay (B, C, H, W) out so that the channels of a pixel lie together; `torch.func.vmap` knows no such layout."""
    return x if is_functional() else x.contiguous(memory_format=torch.channels_last)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C); a view when x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W) with the height and width of `like`; a channels-last view."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
