"""The KL autoencoder (VAE): images to latents of an eighth of their height and width, and back.

Source: https://github.com/CompVis/stable-diffusion/blob/main/ldm/modules/diffusionmodules/model.py (Encoder, Decoder);
names and numbers as trained.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from sdinpaint_kernels import attention
from torch import Tensor, nn
from torch.nn import functional as F

from sdinpaint.families import VAEConfig
from sdinpaint.models import fused
from sdinpaint.models.layers import Conv3, GroupNorm, channels_last, is_plain, plain, to_map, to_tokens
from sdinpaint.models.weights import Model

Direction = Literal["encode", "decode"]
EPS = 1e-6  # for every GroupNorm in the VAE, as trained


@plain
class ResBlock(nn.Module):
    """A residual block: two normalised convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in, eps=EPS)
        self.conv1 = Conv3(channels_in, channels_out)
        self.norm2 = GroupNorm(groups, channels_out, eps=EPS)
        self.conv2 = Conv3(channels_out, channels_out)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)
        self.has_shortcut = channels_in != channels_out

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x (B, C, H, W); return (B, channels_out, H, W)."""
        kinds = [type(layer) for layer in (self.norm1, self.conv1, self.norm2, self.conv2)]
        if kinds == [GroupNorm, Conv3] * 2 and is_plain(self.norm1, self.conv1, self.norm2, self.conv2):
            return fused.vae_res_block(self, x)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if self.has_shortcut else x) + h


@plain
class Attention(nn.Module):
    """Single-head self-attention over all positions; its projections are 1 x 1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Let every position of x (B, C, H, W) attend to all of them; return (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (to_tokens(fused.pointwise(conv, h)).unsqueeze(2) for conv in (self.q, self.k, self.v))
        return fused.pointwise(self.proj_out, to_map(attention(q, k, v).squeeze(2), x), x)


@plain
class Downsample(nn.Module):
    """Halves height and width. It pads at the right and at the bottom only, as trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x (B, C, H, W); return (B, C, H / 2, W / 2)."""
        return fused.downsample(self.conv, F.pad(x, (0, 1, 0, 1)))


@plain
class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample x (B, C, H, W); return (B, C, 2H, 2W)."""
        return fused.upsample(self.conv, x, None)


@plain
class Level(nn.Module):
    """The residual blocks of one resolution; its owner adds a `downsample` or `upsample` where there is one."""

    def __init__(self, widths: list[int], groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b, groups) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the level to x (B, C, H, W); return (B, widths[-1], H', W')."""
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


@plain
class Middle(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x (B, C, H, W); return (B, C, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


@plain
class Encoder(nn.Module):
    """Maps an image to mean and log-variance of the posterior, before `quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        groups, blocks = config.norm_groups, config.num_res_blocks
        widths = [config.channels * mult for mult in config.channel_mult]
        self.conv_in = Conv3(config.in_channels, config.channels)
        self.down = nn.ModuleList(
            Level([before, *[wide] * blocks], groups) for before, wide in pairwise([config.channels, *widths])
        )
        for level, wide in list(zip(self.down, widths, strict=True))[:-1]:
            level.downsample = Downsample(wide)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv3(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Encode x (B, 3, 8H, 8W) in [-1, 1]; return (B, 8, H, W)."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(fused.norm_silu(self.norm_out, self.mid(x)))


@plain
class Decoder(nn.Module):
    """Maps latents, after `post_quant_conv`, to an image."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        groups, blocks = config.norm_groups, config.num_res_blocks + 1
        widths = [config.channels * mult for mult in config.channel_mult]
        self.conv_in = Conv3(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1], groups)
        # `up` is indexed from the finest level to the coarsest, but run in reverse.
        self.up = nn.ModuleList(
            Level([above, *[wide] * blocks], groups) for wide, above in pairwise([*widths, widths[-1]])
        )
        for level, wide in list(zip(self.up, widths, strict=True))[1:]:
            level.upsample = Upsample(wide)
        self.norm_out = GroupNorm(groups, config.channels, eps=EPS)
        self.conv_out = Conv3(config.channels, config.in_channels)

    def forward(self, z: Tensor) -> Tensor:
        """Decode z (B, 4, H, W); return (B, 3, 8H, 8W)."""
        z = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            z = level(z)
        return self.conv_out(fused.norm_silu(self.norm_out, z))


@plain
class VAE(Model):
    """The autoencoder, whose methods take and return *scaled* latents; unscaled ones stay inside `models`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def forward(self, x: Tensor, direction: Direction = "encode") -> tuple[Tensor, ...]:
        """Run one direction, so that a module that wraps or replaces the VAE is called like it.

        Args:
            x: an image (B, 3, 8H, 8W) in [-1, 1], or scaled latents (B, 4, H, W).
            direction: which half to run.

        Returns:
            The result of `posterior(x)`, or the tuple `(decode(x),)`.
        """
        return self.posterior(x) if direction == "encode" else (self.decode(x),)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode an image to the distribution of its latents.

        Args:
            image: (B, 3, 8H, 8W) in [-1, 1].

        Returns:
            Mean and standard deviation of the scaled latents, (B, 4, H, W) each.
        """
        return self.scaled(self.encoder(channels_last(image)))

    def scaled(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Convert the encoder's output to mean and standard deviation.

        Args:
            moments: the output of the encoder (B, 8, H, W).

        Returns:
            Mean and standard deviation of the scaled latents, (B, 4, H, W) each.
        """
        mean, logvar = self.quant_conv(moments).chunk(2, dim=1)
        std = (0.5 * logvar.clamp(-30.0, 20.0)).exp()
        if (statistics := self._statistics(mean)) is not None:
            middle, spread = statistics
            mean, std = (mean - middle) / spread, std / spread
        return mean * self.config.scaling_factor, std * self.config.scaling_factor

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode an image to latents: the mean, or a sample if there is a generator.

        The sample is drawn in float32 on the generator's device, so that a seed gives the same noise in every dtype and
        on every device.

        Args:
            image: (B, 3, 8H, 8W) in [-1, 1].
            generator: source of the sample's noise.

        Returns:
            Scaled latents (B, 4, H, W).
        """
        mean, std = self.posterior(image)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=torch.float32)
        return mean + std * noise.to(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to an image.

        Args:
            latents: scaled latents (B, 4, H, W).

        Returns:
            The image (B, 3, 8H, 8W), about in [-1, 1].
        """
        return self.decoder(self.unscaled(latents))

    def unscaled(self, latents: Tensor) -> Tensor:
        """Convert scaled latents to the input of the decoder.

        Args:
            latents: scaled latents (B, 4, H, W).

        Returns:
            Unscaled latents after `post_quant_conv`, (B, 4, H, W).
        """
        latents = channels_last(latents) / self.config.scaling_factor
        if (statistics := self._statistics(latents)) is not None:
            middle, spread = statistics
            latents = latents * spread + middle
        return self.post_quant_conv(latents)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return mean and standard deviation of each channel of unscaled latents, (C, 1, 1) each, where they count."""
        middle, spread = self.config.latents_mean, self.config.latents_std
        if middle is None or spread is None:
            return None
        return latents.new_tensor(middle)[:, None, None], latents.new_tensor(spread)[:, None, None]
