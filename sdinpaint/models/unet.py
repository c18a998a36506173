"""The denoising UNet of SD1: residual blocks, text-conditioned transformers, and skip connections.

Source: https://github.com/CompVis/stable-diffusion/blob/main/ldm/modules/diffusionmodules/openaimodel.py (UNetModel)
and ldm/modules/attention.py (SpatialTransformer); names and numbers as trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from sdinpaint_kernels import attention
from torch import Tensor, nn
from torch.nn import functional as F

from sdinpaint.families import UNetConfig
from sdinpaint.models.layers import GroupNorm, conv3, to_map, to_tokens


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
            GroupNorm(groups, channels_in, eps=1e-5, silu=True), nn.Identity(), conv3(channels_in, channels_out)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, channels_out))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, channels_out, eps=1e-5, silu=True),
            nn.Identity(),
            nn.Identity(),
            conv3(channels_out, channels_out),
        )
        same = channels_in == channels_out
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W), emb (B, E) -> (B, channels_out, H, W)."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to a context (to the tokens themselves when `context_dim` is their width)."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, L, D) -> (B, N, C)."""
        q, k, v = (
            project.unflatten(-1, (self.heads, -1))
            for project in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attention(q, k, v).flatten(2))


class GEGLU(nn.Module):
    """A linear layer whose one half is gated by the GELU of the other."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, inner)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each on normalised input and added back."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, L, D) -> (B, N, C)."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map."""

    def __init__(self, channels: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        heads = config.num_heads or channels // (config.head_dim or channels)
        self.norm = GroupNorm(config.norm_groups, channels, eps=1e-6)  # as trained: not the ResBlocks' 1e-5
        linear = config.linear_projection
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config.context_dim, heads) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), context (B, L, D) -> (B, C, H, W)."""
        # A 1 x 1 convolution is a linear layer over tokens, so both kinds of projection take one path.
        tokens = F.linear(to_tokens(self.norm(x)), self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + to_map(F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias), x)


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
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """x (B, C, H, W) -> (B, C, *size); `size` is the next skip's, which is 2H - 1 where halving rounded up."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Stage(nn.ModuleList):
    """One entry of the UNet's lists: hands each layer the inputs that it takes."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
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
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))


def block(config: UNetConfig, channels_in: int, channels_out: int, depth: int) -> list[nn.Module]:
    """A residual block, and transformer blocks where there are any."""
    layers: list[nn.Module] = [ResBlock(channels_in, channels_out, 4 * config.model_channels, config.norm_groups)]
    return layers + [SpatialTransformer(channels_out, depth, config)] * bool(depth)


def input_blocks(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The way down, and the width of what each of its entries puts out; a ControlNet has the same."""
    channels = config.model_channels
    stages, widths = [Stage([conv3(config.in_channels, channels)])], [channels]
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


class UNet(nn.Module):
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
                nn.Sequential(nn.Linear(config.vector_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
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
            GroupNorm(config.norm_groups, width, eps=1e-5, silu=True), nn.Identity(), conv3(width, config.out_channels)
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x (B, in_channels, H, W), t (B,), context (B, L, D), vector (B, V) for XL -> (B, 4, H, W).

        control: a ControlNet's residuals, one to add to each of the input blocks' outputs and one to the middle's.
        """
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        if vector is not None:
            emb = emb + self.label_emb(vector)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        if control is not None:
            *residuals, middle = control
            x = x + middle
            skips = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
        for stage in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, emb, context, skips[-1].shape[-2:] if skips else None)
        return self.out(x)
