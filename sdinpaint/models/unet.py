"""The denoising UNet of Stable Diffusion: residual blocks, text-conditioned transformers, and skip connections.

Source: https://github.com/CompVis/stable-diffusion/blob/main/ldm/modules/diffusionmodules/openaimodel.py (UNetModel)
and ldm/modules/attention.py (SpatialTransformer); names and numbers as trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sdinpaint_kernels import attention
from torch import Tensor, nn

from sdinpaint.families import UNetConfig
from sdinpaint.models import fused
from sdinpaint.models.layers import (
    Conv3,
    GroupNorm,
    LayerNorm,
    are_plain,
    channels_last,
    is_plain,
    needs_gradients,
    plain,
    repeated,
    to_map,
    to_tokens,
)
from sdinpaint.models.prepared_unet import (
    Conditioned,
    Context,
    Precomputed,
    PreparedUNet,
    sources_of,
    timestep_embedding,
)
from sdinpaint.models.weights import Places, Snapshot

__all__ = ["UNet", "input_blocks", "middle_block", "time_embed", "timestep_embedding"]


@plain
class ResBlock(nn.Module):
    """A residual block: two convolutions, with the time embedding added between them, and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, config: UNetConfig) -> None:
        super().__init__()
        groups, eps = config.norm_groups, config.norm_eps
        self.in_layers = nn.Sequential(
            GroupNorm(groups, channels_in, eps=eps), nn.SiLU(), Conv3(channels_in, channels_out)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.model_channels, channels_out))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, channels_out, eps=eps),
            nn.SiLU(),
            nn.Identity(),  # keeps the official indices: dropout is not needed
            Conv3(channels_out, channels_out),
        )
        same = channels_in == channels_out
        self.skip_connection: nn.Module = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def is_fusible(self) -> bool:
        """Tell whether the layers that `fused.res_block` computes are plain, and of the classes set up here."""
        first = are_plain(self.in_layers, GroupNorm, nn.SiLU, Conv3)
        return first and are_plain(self.out_layers, GroupNorm, nn.SiLU, nn.Identity, Conv3)

    def forward(self, x: Tensor, emb: Tensor | Precomputed) -> Tensor:
        """Apply the block.

        Args:
            x: feature map (B, C, H, W).
            emb: time embedding (B, E), or the precomputed vectors that this block and others add.

        Returns:
            The output (B, channels_out, H, W).
        """
        if isinstance(emb, dict):
            return fused.res_block(self, x, emb[self])
        if self.is_fusible():
            return fused.res_block(self, x, fused.addend(self, emb))
        h, added = self.in_layers(x), self.emb_layers(emb)
        x, h, added = (repeated(one, max(len(x), len(added))) for one in (x, h, added))
        return self.skip_connection(x) + self.out_layers(h + added[:, :, None, None])


class Attention(nn.Module):
    """The projections of multi-head attention from tokens to a context, which may be the tokens themselves."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def heads_of(self, x: Tensor) -> Tensor:
        """Split channels into heads.

        Args:
            x: (B, N, C).

        Returns:
            A view (B, N, heads, C / heads).
        """
        return x.unflatten(-1, (self.heads, -1))


@plain
class SelfAttention(Attention):
    """Attention from tokens to the same tokens."""

    def packed(self) -> tuple[nn.Linear, ...]:
        """Return the layers that one product computes where they are plain."""
        return self.to_q, self.to_k, self.to_v

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Let every token attend to all of them.

        Args:
            x: tokens (B, N, C).
            residual: tokens (B, N, C) that are added to the output, or None.

        Returns:
            The output (B, N, C).
        """
        if is_plain(self) and all(type(layer) is nn.Linear and layer.bias is None for layer in self.packed()):
            return fused.self_attention(self, x, residual)
        q, k, v = (self.heads_of(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        h = self.to_out(attention(q, k, v).flatten(2))
        return h if residual is None else residual + h


@plain
class CrossAttention(Attention):
    """Attention from tokens to text embeddings."""

    def keys_values(self, context: Tensor) -> Tensor:
        """Project text embeddings to keys and values.

        Args:
            context: text embeddings (B, L, D).

        Returns:
            Keys and values, stacked, (2, B, L, C).
        """
        return torch.stack([self.to_k(context), self.to_v(context)])

    def forward(self, x: Tensor, context: Context | Precomputed, residual: Tensor | None = None) -> Tensor:
        """Let every token attend to the text, or to several sources.

        Args:
            x: tokens (B, N, C).
            context: text embeddings (B, L, D), or sources, or the precomputed keys and values of this block and others.
            residual: tokens that are added to the output, with the batch of x or of the context; or None.

        Returns:
            The output (B, N, C).
        """
        if isinstance(context, dict):
            return fused.cross_attention(self, x, context[self], residual)
        if is_plain(self):
            products = (
                ([fused.product(project, one) for project in (self.to_k, self.to_v)], weight)
                for one, weight in sources_of(context)
            )
            return fused.cross_attention(self, x, products, residual)
        called = (((self.to_k(one), self.to_v(one)), weight) for one, weight in sources_of(context))
        h = self.to_out(fused.attend(self.to_q(x), called, self.heads))
        return h if residual is None else repeated(residual, len(h)) + h


@plain
class GEGLU(nn.Module):
    """A linear layer whose first half of channels is gated by the GELU of its second half."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (B, N, C); return (B, N, inner)."""
        return fused.gated(self.proj, x)


@plain
class FeedForward(nn.Module):
    """A feed-forward network: GEGLU to four times the width, and a projection back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the network to each token.

        Args:
            x: tokens (B, N, C).
            residual: tokens (B, N, C) that are added to the output, or None.

        Returns:
            The output (B, N, C).
        """
        if are_plain(self.net, GEGLU, nn.Identity, nn.Linear):
            return fused.feed_forward(self, x, residual)
        return self.net(x) if residual is None else residual + self.net(x)


@plain
class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on normalised input with a residual connection."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = SelfAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.norm3 = LayerNorm(width)

    def forward(self, x: Tensor, context: Context | Precomputed) -> Tensor:
        """Apply the block.

        Args:
            x: tokens (B, N, C).
            context: text embeddings (B, L, D), or sources, or precomputed keys and values.

        Returns:
            The output (B, N, C).
        """
        x, h = fused.add_norm(self.norm2, self.attn1, x, self.norm1(x))
        x, h = fused.add_norm(self.norm3, self.attn2, x, h, context)
        return fused.add(self.ff, x, h)


@plain
class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map."""

    def __init__(self, channels: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        heads = config.num_heads or channels // (config.head_dim or channels)
        self.norm = GroupNorm(config.norm_groups, channels, eps=1e-6)  # as trained: not the ResBlocks'
        self.linear_projection = config.linear_projection
        self.proj_in = nn.Linear(channels, channels) if self.linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config.context_dim, heads) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if self.linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context | Precomputed) -> Tensor:
        """Apply the blocks.

        Args:
            x: feature map (B, C, H, W).
            context: text embeddings (B, L, D), or sources, or precomputed keys and values.

        Returns:
            The output (B, C, H, W).
        """
        h = self.norm(x)
        if self.linear_projection:
            tokens = fused.product(self.proj_in, to_tokens(h))
        else:
            tokens = to_tokens(fused.pointwise(self.proj_in, h))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        x = repeated(x, len(tokens))
        if self.linear_projection:
            return to_map(fused.product(self.proj_out, tokens, to_tokens(x)), x)
        return fused.pointwise(self.proj_out, to_map(tokens, x), x)


@plain
class Downsample(nn.Module):
    """Halves height and width (rounded up) by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x (B, C, H, W); return (B, C, ceil(H / 2), ceil(W / 2))."""
        return fused.downsample(self.op, x)


@plain
class Upsample(nn.Module):
    """Upsamples to the nearest pixel, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3(channels, channels)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample a feature map.

        Args:
            x: feature map (B, C, H, W).
            size: height and width of the next skip connection, 2H - 1 where halving rounded up; None doubles.

        Returns:
            The output (B, C, *size).
        """
        return fused.upsample(self.conv, x, size)


INPUTS: dict[type[nn.Module], tuple[str, ...]] = {
    ResBlock: ("emb",),
    SpatialTransformer: ("context",),
    Upsample: ("size",),
}
"""The inputs beside the feature map that a layer of a `Stage` takes, by the layer's class."""


@plain
class Stage(nn.ModuleList):
    """One entry of the UNet's lists of blocks; it passes each layer, even a wrapped one, the inputs that it takes."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__(layers)
        self.inputs = [INPUTS.get(type(layer), ()) for layer in layers]

    def forward(
        self,
        x: Tensor,
        emb: Tensor | Precomputed,
        context: Context | Precomputed,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """Apply the layers.

        Args:
            x: feature map (B, C, H, W).
            emb: time embedding (B, E), or precomputed vectors.
            context: text embeddings (B, L, D), or sources, or precomputed keys and values.
            size: height and width for an Upsample; None doubles.

        Returns:
            The output (B, C', H', W').
        """
        given = {"emb": emb, "context": context, "size": size}
        for layer, names in zip(self, self.inputs, strict=True):
            x = layer(x, *(given[name] for name in names))
        return x


def time_embed(config: UNetConfig) -> nn.Sequential:
    """Build the two linear layers that turn a sinusoidal embedding into the time embedding.

    Args:
        config: the shape of the UNet.

    Returns:
        A network from (B, model_channels) to (B, 4 * model_channels).
    """
    width = config.model_channels
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))


def block(config: UNetConfig, channels_in: int, channels_out: int, depth: int) -> list[nn.Module]:
    """Build a residual block, and a transformer where there is one.

    Args:
        config: the shape of the UNet.
        channels_in: channels of the input.
        channels_out: channels of the output.
        depth: number of transformer blocks; 0 for none.

    Returns:
        The layers in order.
    """
    layers: list[nn.Module] = [ResBlock(channels_in, channels_out, config)]
    return layers + [SpatialTransformer(channels_out, depth, config)] * bool(depth)


def input_blocks(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """Build the encoder of a UNet, which a ControlNet copies.

    Args:
        config: the shape of the UNet.

    Returns:
        The blocks, and the number of output channels of each.
    """
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
    """Build the middle block, at the lowest resolution, which a ControlNet copies.

    Args:
        config: the shape of the UNet.

    Returns:
        The block, which keeps the shape of its input.
    """
    channels = config.model_channels * config.channel_mult[-1]
    last = ResBlock(channels, channels, config)
    return Stage([*block(config, channels, channels, config.middle_depth), last])


@plain
class UNet(Conditioned):
    """Predicts the noise (or v) in noisy latents, given the timestep and the text conditioning.

    Inpainting models take 9 channels: noisy latents (4), mask (1), and latents of the masked image (4), in this order.
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
            GroupNorm(config.norm_groups, width, eps=config.norm_eps), nn.SiLU(), Conv3(width, config.out_channels)
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor | Precomputed,
        context: Context | Precomputed,
        vector: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict the noise (or v).

        Under guidance, x and t may have half the batch of context and vector. Everything up to the first layer that
        sees context or vector is the same for both halves, and is then computed once.

        Args:
            x: noisy latents, with mask and masked latents for inpainting models, (B, in_channels, H, W).
            t: timesteps (B,), or precomputed vectors of the residual blocks.
            context: text embeddings (B, L, D), or sources, or precomputed keys and values.
            vector: pooled text with size and crop conditioning (B, V), for SDXL.
            control: residuals of a ControlNet, one for the output of each input block and one for the middle block.

        Returns:
            The raw network output (B, 4, H, W).
        """
        emb = self.embed(t, vector) if isinstance(t, Tensor) else t
        x = channels_last(x)  # so is everything computed from it
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
        return fused.norm_silu_conv(self.out, x)

    def prepare(self, context: Context, vector: Tensor | None = None) -> PreparedUNet | None:
        """Precompute the conditioning that is the same at every step.

        Args:
            context: text embeddings (B, L, D), or sources.
            vector: pooled text with size and crop conditioning (B, V), for SDXL.

        Returns:
            The UNet with precomputed conditioning; None where a layer is not plain, or gradients are needed.
        """
        sources = sources_of(context)
        if not is_plain(self) or needs_gradients(self, vector, *(one for one, _ in sources)):
            return None
        layers = list(self.modules())
        blocks = [layer for layer in layers if isinstance(layer, ResBlock)]
        texts = [layer.attn2 for layer in layers if isinstance(layer, TransformerBlock)]
        if not all(block.is_fusible() for block in blocks):
            return None
        used = Snapshot(PreparedUNet.precomputed_from(self, blocks, texts))
        cache = [layer.keys_values(one) for layer in texts for one, _ in sources]
        weights = [weight for _, weight in sources]
        return PreparedUNet(self, blocks, texts, cache, weights, vector, Places(self), used)
