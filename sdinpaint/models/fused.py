"""Fusions: plain layers that are computed together, with fewer passes over memory than one call after the other takes.

A block asks `is_plain` of its layers before it takes one of these; a few, of single layers, ask themselves and call
what is not plain. Each gives what the calls give, within rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from sdinpaint_kernels import add_bias, add_layer_norm, attention, conv3, geglu, group_norm, linear, upsample_conv3
from torch import Tensor, nn
from torch.nn import functional as F

from sdinpaint.models.layers import Conv3, GroupNorm, LayerNorm, are_plain, is_plain, repeated, to_map, to_tokens
from sdinpaint.models.weights import joined

if TYPE_CHECKING:
    from sdinpaint.models import unet, vae

ROWS = 1024
"""Tokens that a feed-forward network takes at a time on a CPU, because it is wider inside than outside."""


POINTWISE = ((1, 1), (1, 1), 1)
"""Kernel, stride and groups of a convolution that is a matrix product."""


def norm_silu(norm: nn.Module, x: Tensor, addend: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
    """SiLU(norm(x + addend)) in two passes: x (B, C, H, W), addend (B or 1, C) -> (B, C, H, W).

    `overwrite`: x is needed no longer, and may become the result.
    """
    if not isinstance(norm, GroupNorm) or not is_plain(norm):
        return F.silu(norm(x if addend is None else x + addend[:, :, None, None]))
    if addend is not None:
        addend = addend.expand(len(x), -1)
    return group_norm(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=True, addend=addend, overwrite=overwrite
    )


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1 x 1 convolution as a matrix product, which adds the bias at no cost: x (B, C, H, W) -> (B, O, H, W)."""
    if (
        not isinstance(conv, nn.Conv2d)
        or not is_plain(conv)
        or (conv.kernel_size, conv.stride, conv.groups) != POINTWISE
    ):
        return conv(x)
    return to_map(linear(to_tokens(x), conv.weight.flatten(1), conv.bias), x)


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer by the faster of the libraries: x (..., C) -> (..., O)."""
    if not isinstance(layer, nn.Linear) or not is_plain(layer):
        return layer(x)
    return linear(x, layer.weight, layer.bias)


def adds_bias_apart(x: Tensor) -> bool:
    """Tell whether torch adds the bias of a convolution of x in a pass over memory of its own: so it is on a GPU."""
    return x.is_cuda


def add_conv(x: Tensor, conv: nn.Conv2d, h: Tensor) -> Tensor:
    """x + conv(h), without a map of its own for the sum where nothing else needs the convolution's."""
    if adds_bias_apart(x):
        return add_bias(x, conv3(h, conv.weight), bias_of(conv))
    h = conv3(h, conv.weight, conv.bias)
    return h + x if torch.is_grad_enabled() and (h.requires_grad or x.requires_grad) else h.add_(x)


def mlp(layers: nn.Module, x: Tensor) -> Tensor:
    """Linear layers with activations between: x (..., C) -> (..., O).

    Its few rows are where torch's own product depends on the address of the weights: how a file was laid out.
    """
    if not isinstance(layers, nn.Sequential) or not is_plain(layers):
        return product(layers, x)
    for layer in layers:
        x = mlp(layer, x)
    return x


def norm_silu_conv(layers: nn.Module, x: Tensor) -> Tensor:
    """GroupNorm, SiLU and convolution, three layers one after the other: x (B, C, H, W) -> (B, O, H, W)."""
    if not isinstance(layers, nn.Sequential) or not are_plain(layers, GroupNorm, nn.SiLU, Conv3):
        return layers(x)
    norm, _, conv = layers
    return conv(norm_silu(norm, x))


def upsample(conv: nn.Module, x: Tensor, size: Sequence[int] | None) -> Tensor:
    """Pixels repeated up to `size`, or twice along both sides, then conv: x (B, C, H, W) -> (B, O, *size)."""
    if isinstance(conv, Conv3) and is_plain(conv):
        return upsample_conv3(x, conv.weight, conv.bias, size or ())
    return conv(F.interpolate(x, size or [2 * side for side in x.shape[-2:]], mode="nearest"))


def res_block(block: unet.ResBlock, x: Tensor, addend: Tensor) -> Tensor:
    """A UNet's block of which the time embedding was added up with a bias: addend (B or 1, C), see `addend`."""
    norm: Any
    conv: Any
    norm, _, conv = block.in_layers
    h = conv3(norm_silu(norm, x), conv.weight)
    x, h = (repeated(one, len(addend)) for one in (x, h))
    if len(addend) > 1:
        addend = repeated(addend, len(h))
    norm, *_, conv = block.out_layers
    return add_conv(pointwise(block.skip_connection, x), conv, norm_silu(norm, h, addend, overwrite=True))


def addend(block: unet.ResBlock, emb: Tensor) -> Tensor:
    """emb (..., E) -> (..., C): what is added between the block's convolutions, with the bias of the first."""
    return mlp(block.emb_layers, emb) + bias_of(block.in_layers[-1])


def bias_of(conv: nn.Module) -> Tensor:
    """The bias of a convolution that has one, (C,)."""
    return cast(Tensor, conv.bias)


def self_attention(block: unet.SelfAttention, x: Tensor) -> Tensor:
    """Queries, keys and values from one product where their weights are packed: x (B, N, C) -> (B, N, C)."""
    layers = block.to_q, block.to_k, block.to_v
    packed = joined([layer.weight for layer in layers])
    if packed is None:
        q, k, v = (linear(x, layer.weight).unflatten(-1, (block.heads, -1)) for layer in layers)
    else:
        q, k, v = linear(x, packed).unflatten(-1, (3, block.heads, -1)).unbind(2)
    return mlp(block.to_out, attention(q, k, v).flatten(2))


def cross_attention(block: unet.CrossAttention, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """x (B, N, C) or half that batch, keys and values (B, L, C) of a context -> (B, N, C)."""
    q, k, v = (one.unflatten(-1, (block.heads, -1)) for one in (product(block.to_q, x), keys, values))
    return mlp(block.to_out, attention(repeated(q, len(k)), k, v).flatten(2))


def feed_forward(block: unet.FeedForward, x: Tensor) -> Tensor:
    """x (B, N, C) -> (B, N, C); on a CPU some tokens at a time, so that what is wide stays small.

    Memory of many megabytes is fetched from the system anew each time, which takes as long as a product over it.
    """
    gate: Any
    gate, _, back = block.net

    def run(tokens: Tensor) -> Tensor:
        return product(back, geglu(product(gate.proj, tokens)))

    if x.is_cuda or x.shape[:2].numel() <= ROWS:
        return run(x)
    return torch.cat([run(part) for part in x.flatten(0, 1).split(ROWS)]).view(*x.shape[:2], -1)


def add_norm(norm: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """x and h (B, N, C) -> x + h, and that normalised, in one pass on a GPU."""
    if isinstance(norm, LayerNorm) and is_plain(norm) and norm.weight is not None and norm.bias is not None:
        return add_layer_norm(h, x, norm.weight, norm.bias, norm.eps)
    x = x + h
    return x, norm(x)


def vae_res_block(block: vae.ResBlock, x: Tensor) -> Tensor:
    """An autoencoder's block: x (B, C, H, W) -> (B, channels_out, H, W)."""
    h = norm_silu(block.norm1, x)
    if adds_bias_apart(x):
        h = norm_silu(block.norm2, conv3(h, block.conv1.weight), bias_of(block.conv1)[None], overwrite=True)
    else:
        h = norm_silu(block.norm2, conv3(h, block.conv1.weight, block.conv1.bias), overwrite=True)
    return add_conv(pointwise(block.nin_shortcut, x) if block.has_shortcut else x, block.conv2, h)
