"""The ControlNet: a copy of the UNet's encoder that sees a conditioning image and returns residuals for the UNet.

Source: Zhang et al. 2023; https://github.com/lllyasviel/ControlNet/blob/main/cldm/cldm.py (ControlNet); names and
numbers as trained.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from sdinpaint.families import ControlNetConfig
from sdinpaint.models import fused
from sdinpaint.models.layers import Conv3, plain
from sdinpaint.models.prepared_unet import timestep_embedding
from sdinpaint.models.unet import input_blocks, middle_block, time_embed
from sdinpaint.models.weights import Model


def hint_block(widths: tuple[int, ...], channels: int) -> nn.Sequential:
    """Build the convolutions that encode the conditioning image; each width but the first halves height and width.

    Args:
        widths: channels at each resolution, finest first.
        channels: channels of the output.

    Returns:
        A network from (B, 3, 8H, 8W) to (B, channels, H, W), for four widths.
    """
    layers: list[nn.Module] = [Conv3(3, widths[0])]
    for wide, wider in pairwise(widths):
        layers += [nn.SiLU(), Conv3(wide, wide), nn.SiLU(), nn.Conv2d(wide, wider, 3, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.SiLU(), Conv3(widths[-1], channels))


def zero_conv(channels: int) -> nn.Sequential:
    """Build a 1 x 1 convolution. Training starts with zero weights, so that a new ControlNet changes nothing.

    Args:
        channels: channels of input and output.

    Returns:
        The convolution, in a sequence as in the official checkpoint.
    """
    return nn.Sequential(nn.Conv2d(channels, channels, 1))


@plain
class ControlNet(Model):
    """Computes residuals for a UNet's `control` from the UNet's inputs and a conditioning image."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        emb_dim = 4 * config.unet.model_channels
        self.time_embed = time_embed(config.unet)
        if config.unet.vector_dim is not None:
            self.label_emb = nn.Sequential(
                nn.Sequential(nn.Linear(config.unet.vector_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
            )
        self.input_blocks, widths = input_blocks(config.unet)
        self.input_hint_block = hint_block(config.hint_widths, config.unet.model_channels)
        self.zero_convs = nn.ModuleList(zero_conv(width) for width in widths)
        self.middle_block = middle_block(config.unet)
        self.middle_block_out = zero_conv(widths[-1])

    def hint_features(self, hint: Tensor) -> Tensor:
        """Encode the conditioning image. The features are the same at every step, so they are computed once per run.

        Args:
            hint: the conditioning image (B, 3, 8H, 8W).

        Returns:
            Features (B, model_channels, H, W).
        """
        return self.input_hint_block(hint)

    def forward(
        self, x: Tensor, features: Tensor, t: Tensor, context: Tensor, vector: Tensor | None = None
    ) -> list[Tensor]:
        """Compute the residuals that guide a UNet.

        Args:
            x: noisy latents (B, 4, H, W).
            features: what `hint_features` returned, (B, model_channels, H, W).
            t: training timesteps (B,), may be fractional.
            context: text embeddings (B, L, D).
            vector: pooled text with size and crop conditioning (B, V), for SDXL.

        Returns:
            One residual for each of the UNet's input blocks, and one for its middle block.
        """
        sines = timestep_embedding(t, self.config.unet.model_channels, self.config.unet.freq_shift)
        sines = sines.to(next(self.parameters()).dtype)
        emb = fused.mlp(self.time_embed, sines)
        if vector is not None:
            emb = emb + fused.mlp(self.label_emb, vector)
        states = [self.input_blocks[0](x, emb, context) + features]
        for stage in self.input_blocks[1:]:
            states.append(stage(states[-1], emb, context))
        middle = self.middle_block_out(self.middle_block(states[-1], emb, context))
        return [*(zero_conv(state) for zero_conv, state in zip(self.zero_convs, states, strict=True)), middle]
