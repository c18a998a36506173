"""Fusions: several plain layers computed together, with fewer passes over memory than separate calls take.

A block checks `is_plain` of its layers before it uses a fusion of a whole block. Fusions of a few layers check that
themselves, and call layers that are not plain. Each fusion gives the result of the separate calls, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeGuard, cast

import torch
from sdinpaint_kernels import (
    add_layer_norm,
    attention,
    conv3,
    conv3_add,
    downsample_conv3,
    geglu,
    group_norm,
    joint_linear,
    linear,
    linear_geglu,
    upsample_conv3,
)
from torch import Tensor, nn
from torch.nn import functional as F

from sdinpaint.models.layers import Conv3, GroupNorm, LayerNorm, are_plain, is_plain, repeated, to_map, to_tokens
from sdinpaint.models.weights import joined

ROWS = 1024
"""The tokens that a feed-forward network processes at a time on a CPU, to keep its wide hidden layer small."""


POINTWISE = ((1, 1), (1, 1), 1)
"""The kernel size, stride and groups of a convolution that is a matrix product."""
HALVING = ((3, 3), (2, 2), (1, 1), 1, "zeros")
"""The kernel size, stride, dilation, groups and padding mode of a convolution that halves height and width."""


class ResBlock(Protocol):
    """The layers of a UNet's residual block."""

    in_layers: nn.Sequential
    emb_layers: nn.Sequential
    out_layers: nn.Sequential
    skip_connection: nn.Module

    def is_fusible(self) -> bool:
        """Tell whether `res_block` computes what calling the layers does."""


class Attention(Protocol):
    """The layers of self-attention or cross-attention in a UNet."""

    heads: int
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.Sequential


class FeedForward(Protocol):
    """The layers of a feed-forward network in a UNet."""

    net: nn.Sequential


class VAEResBlock(Protocol):
    """The layers of a VAE's residual block."""

    norm1: GroupNorm
    conv1: Conv3
    norm2: GroupNorm
    conv2: Conv3
    has_shortcut: bool
    nin_shortcut: nn.Conv2d
    """A 1 x 1 convolution; it exists only if `has_shortcut`."""


def norm_silu(norm: nn.Module, x: Tensor, addend: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
    """Compute SiLU(norm(x + addend)) in two passes over memory.

    Args:
        norm: a GroupNorm, or a module that stands in for one.
        x: feature map (B, C, H, W).
        addend: added to every pixel first, (B or 1, C).
        overwrite: x is not needed afterwards, so the result may reuse its memory.

    Returns:
        The activations (B, C, H, W).
    """
    if not isinstance(norm, GroupNorm) or not is_plain(norm):
        return F.silu(norm(x if addend is None else x + addend[:, :, None, None]))
    if addend is not None:
        addend = addend.expand(len(x), -1)
    return group_norm(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=True, addend=addend, overwrite=overwrite
    )


def pointwise(conv: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Apply a 1 x 1 convolution as a matrix product, which adds the bias and a residual at no cost.

    Args:
        conv: the convolution; one that is not 1 x 1 or not plain is called.
        x: feature map (B, C, H, W).
        residual: feature map (B, O, H, W), or None.

    Returns:
        The output (B, O, H, W).
    """
    if not is_pointwise(conv):
        return conv(x) if residual is None else residual + conv(x)
    added = None if residual is None else to_tokens(residual)
    return to_map(linear(to_tokens(x), conv.weight, conv.bias, added), x)


def is_pointwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Tell whether a layer is a plain convolution that is a matrix product.

    Args:
        conv: any layer.

    Returns:
        True if it is.
    """
    if not isinstance(conv, nn.Conv2d) or not is_plain(conv):
        return False
    return (conv.kernel_size, conv.stride, conv.groups) == POINTWISE


def product(layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Apply a linear layer with the faster of torch's libraries, and add a residual.

    Args:
        layer: the linear layer; one that is not plain is called.
        x: (..., C).
        residual: (..., O), or None.

    Returns:
        The output (..., O).
    """
    if not isinstance(layer, nn.Linear) or not is_plain(layer):
        return layer(x) if residual is None else residual + layer(x)
    return linear(x, layer.weight, layer.bias, residual)


def adds_bias_apart(x: Tensor) -> bool:
    """Tell whether torch adds a convolution's bias in a separate pass over memory, as it does on a GPU.

    Args:
        x: the input of the convolution.

    Returns:
        True on a GPU.
    """
    return x.is_cuda


def add_conv(x: Tensor, conv: nn.Conv2d, h: Tensor) -> Tensor:
    """Compute x + conv(h) without a separate feature map for the sum.

    Args:
        x: feature map (B, O, H, W).
        conv: a plain 3 x 3 convolution with a bias.
        h: its input (B, C, H, W).

    Returns:
        The sum (B, O, H, W).
    """
    if adds_bias_apart(x):
        return conv3_add(h, conv.weight, bias_of(conv), residual=x)
    return conv3(h, conv.weight, conv.bias, x)


def add_shortcut(x: Tensor, shortcut: nn.Module, conv: nn.Conv2d, h: Tensor) -> Tensor:
    """Compute shortcut(x) + conv(h), on a GPU without a separate feature map for the shortcut where that is faster.

    Args:
        x: feature map (B, C, H, W).
        shortcut: a 1 x 1 convolution to O channels, or nn.Identity.
        conv: a plain 3 x 3 convolution with a bias.
        h: its input (B, C', H, W).

    Returns:
        The sum (B, O, H, W).
    """
    if not adds_bias_apart(x) or not is_pointwise(shortcut) or shortcut.bias is None:
        return add_conv(pointwise(shortcut, x), conv, h)
    projection, addend = shortcut.weight.flatten(1), shortcut.bias[None]
    return conv3_add(h, conv.weight, bias_of(conv), addend=addend, maps=[x], projection=projection)


def mlp(layers: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Apply linear layers and the activations between them, and add a residual.

    For few rows torch's own product would depend on the address of the weights, and so on how a file was laid out.

    Args:
        layers: one layer, or a sequence of layers.
        x: (..., C).
        residual: (..., O), or None.

    Returns:
        The output (..., O).
    """
    if not isinstance(layers, nn.Sequential) or not is_plain(layers):
        return product(layers, x, residual)
    *before, last = layers
    for layer in before:
        x = mlp(layer, x)
    return mlp(last, x, residual)


def norm_silu_conv(layers: nn.Module, x: Tensor) -> Tensor:
    """Apply a GroupNorm, a SiLU and a convolution.

    Args:
        layers: a sequence of these three layers; any other is called.
        x: feature map (B, C, H, W).

    Returns:
        The output (B, O, H, W).
    """
    if not isinstance(layers, nn.Sequential) or not are_plain(layers, GroupNorm, nn.SiLU, Conv3):
        return layers(x)
    norm, _, conv = layers
    return conv(norm_silu(norm, x))


def upsample(conv: nn.Module, x: Tensor, size: Sequence[int] | None) -> Tensor:
    """Upsample to the nearest pixel, then convolve.

    Args:
        conv: a 3 x 3 convolution.
        x: feature map (B, C, H, W).
        size: height and width of the output; None doubles them.

    Returns:
        The output (B, O, H', W').
    """
    if isinstance(conv, Conv3) and is_plain(conv):
        return upsample_conv3(x, conv.weight, conv.bias, size or ())
    return conv(F.interpolate(x, size or [2 * side for side in x.shape[-2:]], mode="nearest"))


def downsample(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution that halves height and width.

    Args:
        conv: the convolution; one that is not plain, or not 3 x 3 with a stride of 2, is called.
        x: feature map (B, C, H, W).

    Returns:
        The output (B, O, H', W').
    """
    if not isinstance(conv, nn.Conv2d) or not is_plain(conv):
        return conv(x)
    sizes = conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode
    if sizes != HALVING or conv.padding not in ((0, 0), (1, 1)):
        return conv(x)
    return downsample_conv3(x, conv.weight, conv.bias, int(conv.padding[0]))


def res_block(block: ResBlock, x: Tensor, addend: Tensor) -> Tensor:
    """Apply a residual block of a UNet whose time embedding was already projected by `addend`.

    Args:
        block: a block whose layers are plain.
        x: feature map (B, C, H, W).
        addend: the projected time embedding with the first convolution's bias, (B or 1, O).

    Returns:
        The output (B, O, H, W).
    """
    norm: Any
    conv: Any
    norm, _, conv = block.in_layers
    h = conv3(norm_silu(norm, x), conv.weight)
    x, h = (repeated(one, len(addend)) for one in (x, h))
    if len(addend) > 1:
        addend = repeated(addend, len(h))
    norm, *_, conv = block.out_layers
    return add_shortcut(x, block.skip_connection, conv, norm_silu(norm, h, addend, overwrite=True))


def addend(block: ResBlock, emb: Tensor) -> Tensor:
    """Project the time embedding for a residual block, and add the bias of the block's first convolution.

    Args:
        block: a residual block of a UNet.
        emb: time embedding (..., E).

    Returns:
        The vector that is added between the block's convolutions, (..., O).
    """
    return mlp(block.emb_layers, emb) + bias_of(block.in_layers[-1])


def bias_of(conv: nn.Module) -> Tensor:
    """Return the bias (C,) of a convolution that has one.

    Args:
        conv: the convolution.

    Returns:
        Its bias, typed as a tensor.
    """
    return cast(Tensor, conv.bias)


def self_attention(block: Attention, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Apply self-attention, with one product for queries, keys and values where that needs no copy of the weights.

    Args:
        block: a self-attention whose layers are plain.
        x: tokens (B, N, C).
        residual: tokens (B, N, C) that are added to the output, or None.

    Returns:
        The output (B, N, C).
    """
    weights = [layer.weight for layer in (block.to_q, block.to_k, block.to_v)]
    projected = joint_linear(x, weights, joined(weights))
    q, k, v = (one.unflatten(-1, (block.heads, -1)) for one in projected)
    return mlp(block.to_out, attention(q, k, v).flatten(2), residual)


def cross_attention(
    block: Attention,
    x: Tensor,
    sources: Iterable[tuple[Sequence[Tensor] | Tensor, float]],
    residual: Tensor | None = None,
) -> Tensor:
    """Apply cross-attention with precomputed keys and values.

    Args:
        block: a cross-attention whose layers are plain.
        x: tokens (B, N, C); the batch may be a divisor of that of the keys.
        sources: for each source its keys and values, (B, L, C) each, and its weight.
        residual: tokens that are added to the output, with the batch of x or of the keys; or None.

    Returns:
        The output (B, N, C), with the batch of the keys.
    """
    mixed = attend(product(block.to_q, x), sources, block.heads)
    return mlp(block.to_out, mixed, None if residual is None else repeated(residual, len(mixed)))


def attend(q: Tensor, sources: Iterable[tuple[Sequence[Tensor] | Tensor, float]], heads: int) -> Tensor:
    """Attend to several sources, each by a softmax of its own, and add up what they give.

    Args:
        q: queries (B, N, C); the batch may be a divisor of that of the keys.
        sources: for each source its keys and values, (B, L, C) each, and its weight.
        heads: number of heads.

    Returns:
        The weighted sum (B, N, C), with the batch of the keys.
    """
    total: Tensor | None = None
    for (keys, values), weight in sources:
        by_head = (one.unflatten(-1, (heads, -1)) for one in (repeated(q, len(keys)), keys, values))
        out = attention(*by_head).flatten(2)
        out = out if weight == 1 else weight * out
        total = out if total is None else total + out
    return cast(Tensor, total)


def feed_forward(block: FeedForward, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Apply a feed-forward network; on a CPU to some tokens at a time, so that its hidden layer stays small.

    The system provides memory of many megabytes anew each time, which takes as long as a product over it.

    Args:
        block: a feed-forward network whose layers are plain.
        x: tokens (B, N, C).
        residual: tokens (B, N, C) that are added to the output, or None.

    Returns:
        The output (B, N, C).
    """
    gate: Any
    gate, _, back = block.net

    def run(tokens: Tensor, added: Tensor | None) -> Tensor:
        return product(back, gated(gate.proj, tokens), added)

    if x.is_cuda or x.shape[:2].numel() <= ROWS:
        return run(x, residual)
    parts = x.flatten(0, 1).split(ROWS)
    added = [None] * len(parts) if residual is None else residual.flatten(0, 1).split(ROWS)
    return torch.cat(list(map(run, parts, added))).view(*x.shape[:2], -1)


def gated(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer and GEGLU.

    Args:
        layer: the linear layer; one that is not plain is called.
        x: (..., C).

    Returns:
        The gated half (..., O / 2).
    """
    if not isinstance(layer, nn.Linear) or not is_plain(layer) or layer.bias is None:
        return geglu(product(layer, x))
    return linear_geglu(x, layer.weight, layer.bias)


def add(layer: nn.Module, x: Tensor, h: Tensor, *given: Any) -> Tensor:
    """Compute x + layer(h); on a CPU in the last product of the layer, which then rounds once.

    Args:
        layer: self-attention, cross-attention or a feed-forward network.
        x: tokens (B, N, C); the batch may be a divisor of that of the output.
        h: the input of the layer (B, N, C).
        given: the other inputs of the layer.

    Returns:
        The sum (B, N, C).
    """
    if not adds_bias_apart(x) and is_plain(layer):
        return layer(h, *given, residual=x)
    h = layer(h, *given)
    return repeated(x, len(h)) + h


def add_norm(norm: nn.Module, layer: nn.Module, x: Tensor, h: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """Compute x + layer(h) and normalise it; on a GPU the sum and the norm in one pass over memory.

    Args:
        norm: a LayerNorm.
        layer: self-attention or cross-attention.
        x: tokens (B, N, C); the batch may be a divisor of that of the output.
        h: the input of the layer (B, N, C).
        given: the other inputs of the layer.

    Returns:
        The sum, and the normalised sum, (B, N, C) each.
    """
    if adds_bias_apart(x) and isinstance(norm, LayerNorm) and is_plain(norm) and norm.bias is not None:
        h = layer(h, *given)
        return add_layer_norm(h, repeated(x, len(h)), norm.weight, norm.bias, norm.eps)
    x = add(layer, x, h, *given)
    return x, norm(x)


def vae_res_block(block: VAEResBlock, x: Tensor) -> Tensor:
    """Apply a residual block of the VAE.

    Args:
        block: a block whose layers are plain.
        x: feature map (B, C, H, W).

    Returns:
        The output (B, O, H, W).
    """
    h = norm_silu(block.norm1, x)
    if adds_bias_apart(x):
        h = norm_silu(block.norm2, conv3(h, block.conv1.weight), bias_of(block.conv1)[None], overwrite=True)
    else:
        h = norm_silu(block.norm2, conv3(h, block.conv1.weight, block.conv1.bias), overwrite=True)
    return add_shortcut(x, block.nin_shortcut, block.conv2, h) if block.has_shortcut else add_conv(x, block.conv2, h)
