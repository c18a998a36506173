"""Layers that torch lacks, changes of memory layout, and the test for whether a layer is plain."""

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
    kind: kind.forward
    for kind in (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.SiLU, nn.Identity, nn.Sequential, nn.ModuleList)
}
"""The classes of plain layers, each with its `forward` at the time of import."""
_CALL = nn.Module.__call__
_PLAIN_WEIGHTS = (nn.Parameter, Tensor, NoneType)
"""The types of weights whose memory holds the plain numbers; `torch.func.functional_call` substitutes tensors."""


def plain(kind: Class) -> Class:
    """Register a class whose unmodified instances count as plain layers; a decorator.

    Args:
        kind: a module class.

    Returns:
        The same class.
    """
    _FORWARDS[kind] = kind.forward
    return kind


def is_plain(*modules: nn.Module) -> bool:
    """Tell whether calling these modules, and all within them, does what their classes say and nothing else.

    A fusion computes several layers without calling them, so it may only replace plain layers. A layer that is hooked,
    wrapped, parametrized, compiled, quantized, adapted or replaced must be called. So must every layer during tracing.

    Args:
        *modules: the modules to check, with all their children.

    Returns:
        True if none of them was modified and nothing traces the model.
    """
    return not (is_transformed() or torch_module._has_any_global_hook()) and all(map(_is_plain, modules))


def are_plain(layers: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether a container is plain and its children have exactly these classes, as a fusion requires.

    Args:
        layers: a container of layers.
        *kinds: the expected class of each child, in order.

    Returns:
        True if both hold.
    """
    return [type(layer) for layer in layers.children()] == [*kinds] and is_plain(layers)


def _is_plain(module: nn.Module) -> bool:
    # Called some thousand times per step: hence the loop, and the cheapest checks.
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


def needs_gradients(module: nn.Module, *given: Tensor | None) -> bool:
    """Tell whether gradients are enabled and required by any tensor or weight.

    Args:
        module: a network.
        *given: its inputs.

    Returns:
        True if autograd would record the call.
    """
    if not torch.is_grad_enabled():
        return False
    return any(one is not None and one.requires_grad for one in (*given, *module.parameters()))


@plain
class GroupNorm(nn.GroupNorm):
    """GroupNorm with the implementation of `sdinpaint_kernels`, which is accurate in every memory layout."""

    def __init__(self, groups: int, channels: int, *, eps: float) -> None:
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W) by groups of channels; return the same shape."""
        return group_norm(x, self.num_groups, self.weight, self.bias, eps=self.eps)


@plain
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, exact even where the mean of a row is many standard deviations."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of x (..., C); return the same shape."""
        return layer_norm(x, self.weight, self.bias, self.eps)


STANDARD = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
"""The kernel size, stride, padding, dilation, groups and padding mode of a `Conv3`."""


@plain
class Conv3(nn.Conv2d):
    """A 3 x 3 convolution that keeps height and width, with the implementation of `sdinpaint_kernels`.

    Adapter libraries construct layers of the class of the layer that they adapt, with other sizes and without a bias.
    For those the constructor returns torch's own convolution.
    """

    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """Return torch's convolution for any arguments but those of a standard 3 x 3 convolution."""
        if sizes[2:] in ((), (3, 1, 1)) and not options:
            return super().__new__(cls)
        return nn.Conv2d(*sizes, **options)

    def __init__(self, channels_in: int, channels_out: int, *_: Any) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)

    def is_standard(self) -> bool:
        """Tell whether nobody changed the convolution since, for example to circular padding for seamless textures."""
        sizes = self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        return sizes == STANDARD and self.bias is not None and "_conv_forward" not in self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, H, W); return (B, O, H, W)."""
        return conv3(x, self.weight, self.bias) if self.is_standard() else super().forward(x)


def repeated(x: Tensor, batch: int) -> Tensor:
    """Repeat a batch cyclically up to a size, as guidance does with what its halves share.

    Args:
        x: (B, ...).
        batch: the batch size to reach.

    Returns:
        (batch, ...): x repeated batch / B times; x itself if B >= batch.

    Raises:
        ValueError: B does not divide `batch`.
    """
    if len(x) >= batch:
        return x
    if batch % len(x):
        raise ValueError(f"a batch of {len(x)} does not divide a batch of {batch}")
    return torch.cat([x] * (batch // len(x)))


def channels_last(x: Tensor) -> Tensor:
    """Return x in channels-last memory; unchanged under `torch.func.vmap`, which does not support it.

    Args:
        x: feature map (B, C, H, W).

    Returns:
        The same numbers (B, C, H, W).
    """
    return x if is_functional() else x.contiguous(memory_format=torch.channels_last)


def to_tokens(x: Tensor) -> Tensor:
    """Flatten a feature map to a sequence of tokens.

    Args:
        x: feature map (B, C, H, W).

    Returns:
        Tokens (B, H * W, C); a view if x is channels-last.
    """
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Arrange tokens as a feature map.

    Args:
        tokens: (B, H * W, C).
        like: a tensor with the height and width of the result, (..., H, W).

    Returns:
        (B, C, H, W), a channels-last view.
    """
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
