"""What each released family is: every trained constant once, with its source. Standard library only.

Families differ by `dataclasses.replace(...)`, so that the difference between two of them can be read off.
Widths and depths of a checkpoint come from its own shapes (`sdinpaint.loading`); what shapes cannot tell
(heads, groups, activation, prediction, schedule) comes from here or from the config beside the weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Activation = Literal["quick_gelu", "gelu"]
Prediction = Literal["eps", "v"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a denoising UNet; `num_heads` or `head_dim` is given, never both."""

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    transformer_depth: tuple[int, ...]
    """Transformer blocks in each attention of a level; 0 where the level has none."""
    middle_depth: int
    context_dim: int
    num_heads: int | None
    head_dim: int | None
    norm_groups: int
    linear_projection: bool
    """Whether proj_in and proj_out of a transformer are Linear (SD2, XL) or 1 x 1 convolutions (SD1)."""
    vector_dim: int | None


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of a KL autoencoder, and the factor that brings its latents to unit variance."""

    in_channels: int
    latent_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    norm_groups: int
    scaling_factor: float


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Shape of a CLIP text encoder, and which of its states condition the UNet."""

    vocab_size: int
    context_length: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    activation: Activation
    pad_id: int | None
    """Token that fills up to `context_length`; None: the end-of-text token."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The noise schedule a model was trained with, and how its samplers space their steps."""

    train_steps: int
    beta_start: float
    beta_end: float
    prediction: Prediction
    steps_offset: int
    """Added to every leading timestep."""
    end_at_zero: bool
    """Whether DDIM ends at sigma 0 (`set_alpha_to_one`) or at the training schedule's first sigma."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint: its components and its schedule."""

    name: str
    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    schedule: ScheduleConfig
    size: int
    """Height and width, in pixels, that the model was trained at."""


SD15_INPAINT = Family(
    name="sd15-inpainting",
    # runwayml/stable-diffusion configs/stable-diffusion/v1-inpainting-inference.yaml, unet_config
    unet=UNetConfig(
        in_channels=9,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        transformer_depth=(1, 1, 1, 0),
        middle_depth=1,
        context_dim=768,
        num_heads=8,
        head_dim=None,
        norm_groups=32,  # ldm/modules/diffusionmodules/util.py GroupNorm32, ldm/modules/attention.py Normalize
        linear_projection=False,
        vector_dim=None,
    ),
    # the same file, first_stage_config and scale_factor
    vae=VAEConfig(
        in_channels=3,
        latent_channels=4,
        channels=128,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        norm_groups=32,
        scaling_factor=0.18215,
    ),
    # openai/clip-vit-large-patch14 config.json, text_config
    text=TextConfig(
        vocab_size=49408,
        context_length=77,
        width=768,
        mlp_width=3072,
        num_layers=12,
        num_heads=12,
        activation="quick_gelu",
        pad_id=None,
    ),
    # the yaml's linear_start and linear_end (ldm's "linear" is linear in sqrt(beta)); scheduler_config.json
    schedule=ScheduleConfig(
        train_steps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        prediction="eps",
        steps_offset=1,
        end_at_zero=False,
    ),
    size=512,
)

# runwayml/stable-diffusion configs/stable-diffusion/v1-inference.yaml
SD15 = dataclasses.replace(SD15_INPAINT, name="sd15", unet=dataclasses.replace(SD15_INPAINT.unet, in_channels=4))

FAMILIES: dict[str, Family] = {family.name: family for family in (SD15_INPAINT, SD15)}
