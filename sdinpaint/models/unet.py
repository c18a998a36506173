"""The denoising UNet of SD1: residual blocks, text-conditioned transformers, and skip connections.

Source: https://github.com/CompVis/stable-diffusion/blob/main/ldm/modules/diffusionmodules/openaimodel.py (UNetModel)
and ldm/modules/attention.py (SpatialTransformer); names and numbers as trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sdinpaint_kernels import attention, geglu, linear
from torch import Tensor, nn

from sdinpaint.families import UNetConfig
from sdinpaint.models.layers import (
    Conv3,
    GroupNorm,
    LayerNorm,
    Linear,
    Model,
    UpsampleConv3,
    add_conv,
    bias,
    by_rows,
    joined,
    pointwise,
    repeated,
    to_map,
    to_tokens,
    unbiased,
)

Made = dict[nn.Module, Tensor]
"""By layer, what it makes of an input that x has no part in: computed once, for many steps."""


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t (B,), may be fractional -> (B, dim) float32: cosines, then sines, of geometrically spaced frequencies."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions around the addition of the time embedding, and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, emb_dim: int, groups: int) -> None:
        super().__init__()
        # Identity keeps the official indices: SiLU is part of the norm, dropout is not needed.
        self.in_layers = nn.Sequential(
            GroupNorm(groups, channels_in, eps=1e-5, silu=True), nn.Identity(), Conv3(channels_in, channels_out)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_dim, channels_out))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, channels_out, eps=1e-5, silu=True),
            nn.Identity(),
            nn.Identity(),
            Conv3(channels_out, channels_out),
        )
        same = channels_in == channels_out
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def addend(self, emb: Tensor) -> Tensor:
        """emb (B, E) -> (B, channels_out): what is added between the convolutions, with the bias of the first."""
        return self.emb_layers(emb) + bias(self.in_layers[-1])

    def forward(self, x: Tensor, emb: Tensor | Made) -> Tensor:
        """x (B, C, H, W), emb (B, E), or the addend made of it -> (B, channels_out, H, W)."""
        norm, _, conv = self.in_layers
        h = unbiased(conv, norm(x))
        addend = self.addend(emb) if isinstance(emb, Tensor) else emb[self]
        x, h = (repeated(one, len(addend)) for one in (x, h))
        if len(addend) > 1:
            addend = repeated(addend, len(h))
        norm, *_, conv = self.out_layers
        return add_conv(pointwise(self.skip_connection, x), conv, norm(h, addend))


class Attention(nn.Module):
    """The weights of multi-head attention from tokens to a context, which may be the tokens."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context_dim, width, bias=False)
        self.to_v = Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(Linear(width, width))


class SelfAttention(Attention):
    """Attention to the tokens themselves; queries, keys and values come from one product."""

    def packed(self) -> tuple[Tensor, ...]:
        """The weights of that product."""
        return self.to_q.weight, self.to_k.weight, self.to_v.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        q, k, v = linear(x, joined(self.packed())).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.to_out(attention(q, k, v).flatten(2))


class CrossAttention(Attention):
    """Attention to a text."""

    def keys_values(self, context: Tensor) -> Tensor:
        """context (B, L, D) -> (2, B, L, C)."""
        return torch.stack([self.to_k(context), self.to_v(context)])

    def forward(self, x: Tensor, context: Tensor | Made) -> Tensor:
        """x (B, N, C), context (B, L, D), or the keys and values made of it -> (B, N, C)."""
        keys_values = self.keys_values(context) if isinstance(context, Tensor) else context[self]
        q, k, v = (one.unflatten(-1, (self.heads, -1)) for one in (self.to_q(x), *keys_values))
        return self.to_out(attention(repeated(q, len(k)), k, v).flatten(2))


class GEGLU(nn.Module):
    """A linear layer whose one half is gated by the GELU of the other."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, inner)."""
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        return by_rows(self.net, x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each on normalised input and added back."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = SelfAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.norm3 = LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor | Made) -> Tensor:
        """x (B, N, C), context (B, L, D) -> (B, N, C)."""
        x, h = self.norm2.of_sum(x, self.attn1(self.norm1(x)))
        h = self.attn2(h, context)
        x, h = self.norm3.of_sum(repeated(x, len(h)), h)
        return x + self.ff(h)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map."""

    def __init__(self, channels: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        heads = config.num_heads or channels // (config.head_dim or channels)
        self.norm = GroupNorm(config.norm_groups, channels, eps=1e-6)  # as trained: not the ResBlocks' 1e-5
        as_linear = config.linear_projection
        self.proj_in = Linear(channels, channels) if as_linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config.context_dim, heads) for _ in range(depth)
        )
        self.proj_out = Linear(channels, channels) if as_linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | Made) -> Tensor:
        """x (B, C, H, W), context (B, L, D) -> (B, C, H, W)."""
        # A 1 x 1 convolution is a linear layer over tokens: both kinds of projection take one path.
        tokens = linear(to_tokens(self.norm(x)), self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        h = to_map(linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias), x)
        return repeated(x, len(h)) + h


class Downsample(nn.Module):
    """Halve height and width (rounded up) by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""
        return self.op(x)


class Upsample(nn.Module):
    """Repeat pixels up to a size, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpsampleConv3(channels, channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """x (B, C, H, W) -> (B, C, *size); `size` is the next skip's, which is 2H - 1 where halving rounded up."""
        return self.conv(x, size)


class Stage(nn.ModuleList):
    """One entry of the UNet's lists: hands each layer the inputs that it takes."""

    def forward(self, x: Tensor, emb: Tensor | Made, context: Tensor | Made, size: torch.Size | None = None) -> Tensor:
        """x (B, C, H, W), emb (B, E), context (B, L, D), size: where an Upsample goes -> (B, C', H', W')."""
        for layer in self:
            match layer:
                case ResBlock():
                    x = layer(x, emb)
                case SpatialTransformer():
                    x = layer(x, context)
                case Upsample():
                    x = layer(x, size)
                case _:
                    x = layer(x)
        return x


def time_embed(config: UNetConfig) -> nn.Sequential:
    """The two linear layers that turn a timestep's sines into `emb`."""
    width = config.model_channels
    return nn.Sequential(Linear(width, 4 * width), nn.SiLU(), Linear(4 * width, 4 * width))


def block(config: UNetConfig, channels_in: int, channels_out: int, depth: int) -> list[nn.Module]:
    """A residual block, and transformer blocks where there are any."""
    layers: list[nn.Module] = [ResBlock(channels_in, channels_out, 4 * config.model_channels, config.norm_groups)]
    return layers + [SpatialTransformer(channels_out, depth, config)] * bool(depth)


def input_blocks(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The way down, and the width of what each of its entries puts out; a ControlNet has the same."""
    channels = config.model_channels
    stages, widths = [Stage([Conv3(config.in_channels, channels)])], [channels]
    levels = list(zip(config.channel_mult, config.transformer_depth, strict=True))
    for level, (mult, depth) in enumerate(levels):
        for _ in range(config.num_res_blocks):
            stages.append(Stage(block(config, channels, mult * config.model_channels, depth)))
            channels = mult * config.model_channels
            widths.append(channels)
        if level < len(levels) - 1:
            stages.append(Stage([Downsample(channels)]))
            widths.append(channels)
    return nn.ModuleList(stages), widths


def middle_block(config: UNetConfig) -> Stage:
    """The lowest resolution; a ControlNet has the same."""
    channels = config.model_channels * config.channel_mult[-1]
    last = ResBlock(channels, channels, 4 * config.model_channels, config.norm_groups)
    return Stage([*block(config, channels, channels, config.middle_depth), last])


class UNet(Model):
    """Predicts the noise (or v) in noisy latents, given the time and a text.

    Inpainting models take 9 channels: noisy latents 4, mask 1, masked image's latents 4, in this order.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, emb_dim = config.model_channels, 4 * config.model_channels
        self.time_embed = time_embed(config)
        if config.vector_dim is not None:
            self.label_emb = nn.Sequential(
                nn.Sequential(Linear(config.vector_dim, emb_dim), nn.SiLU(), Linear(emb_dim, emb_dim))
            )
        self.input_blocks, skips = input_blocks(config)
        self.middle_block = middle_block(config)

        up, channels = [], skips[-1]
        for level, (mult, depth) in reversed(
            list(enumerate(zip(config.channel_mult, config.transformer_depth, strict=True)))
        ):
            for index in range(config.num_res_blocks + 1):
                layers = block(config, channels + skips.pop(), mult * width, depth)
                channels = mult * width
                if level and index == config.num_res_blocks:
                    layers.append(Upsample(channels))
                up.append(Stage(layers))
        self.output_blocks = nn.ModuleList(up)

        self.out = nn.Sequential(
            GroupNorm(config.norm_groups, width, eps=1e-5, silu=True), nn.Identity(), Conv3(width, config.out_channels)
        )

    def embed(self, t: Tensor, vector: Tensor | None = None) -> Tensor:
        """t (B,), vector (B, V) for XL -> emb (B, E); t (1,) stands for the t of every vector."""
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(next(self.parameters()).dtype))
        return emb if vector is None else repeated(emb, len(vector)) + self.label_emb(vector)

    def forward(
        self,
        x: Tensor,
        t: Tensor | Made,
        context: Tensor | Made,
        vector: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x (B, in_channels, H, W), t (B,), context (B, L, D), vector (B, V) for XL -> (B, 4, H, W).

        control: a ControlNet's residuals, one to add to each of the input blocks' outputs and one to the middle's.
        Under guidance, x and t may have half the batch of context and vector: what both halves have in common, which is
        all before they meet the first of the two, is computed once.
        """
        emb = self.embed(t, vector) if isinstance(t, Tensor) else t
        x = x.contiguous(memory_format=torch.channels_last)  # and so is all that is made of it
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        if control is not None:
            *residuals, middle = control
            x = x + middle
            skips = [repeated(skip, len(x)) + residual for skip, residual in zip(skips, residuals, strict=True)]
        for stage in self.output_blocks:
            x = torch.cat([x, repeated(skips.pop(), len(x))], dim=1)
            x = stage(x, emb, context, skips[-1].shape[-2:] if skips else None)
        return self.out(x)

    def prepare(self, context: Tensor, vector: Tensor | None = None) -> PreparedUNet:
        """This UNet for one text: context (B, L, D), vector (B, V) for XL."""
        layers = list(self.modules())
        texts = [layer.attn2 for layer in layers if isinstance(layer, TransformerBlock)]
        return PreparedUNet(
            self,
            [layer for layer in layers if isinstance(layer, ResBlock)],
            texts,
            [layer.keys_values(context) for layer in texts],
            vector,
            str([weight.data_ptr() for weight in self.parameters()]),
        )


@dataclass(frozen=True)
class PreparedUNet:
    """A UNet that knows its text, so that what depends on text and time alone is computed before, and once."""

    unet: UNet
    blocks: list[ResBlock]
    texts: list[CrossAttention]
    kept: list[Tensor]
    """Keys and values of the text, (2, B, L, C), for each of `texts`."""
    vector: Tensor | None
    key: str
    """The same as long as the UNet computes with the very same weights."""

    def embed(self, t: Tensor) -> Tensor:
        """t (S,) -> (S, B, sum of C): what all residual blocks add at each t; B is 1 without vector."""
        label = 0 if self.vector is None else self.unet.label_emb(self.vector)
        emb = self.unet.embed(t)[:, None] + label
        return torch.cat([block.addend(emb) for block in self.blocks], dim=-1)

    def __call__(self, x: Tensor, emb: Tensor, kept: Sequence[Tensor], control: Sequence[Tensor] | None) -> Tensor:
        """x (B, in_channels, H, W) or half that batch, emb: a row of `embed`, kept: as here -> (B, 4, H, W)."""
        addends = emb.split([len(bias(block.in_layers[-1])) for block in self.blocks], dim=-1)
        made: Made = dict(zip(self.blocks, addends, strict=True))
        return self.unet(x, made, dict(zip(self.texts, kept, strict=True)), None, control)
