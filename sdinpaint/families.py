"""What each released family is: every trained constant once, with its source. Standard library only.

Families differ by `dataclasses.replace(...)`, so that the difference between two of them can be read off.
Widths and depths of a checkpoint come from its own shapes (`sdinpaint.loading`); what shapes cannot tell
(heads, groups, activation, prediction, schedule) comes from here or from the config beside the weights.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, get_args

from sdinpaint.errors import SettingError

Activation = Literal["quick_gelu", "gelu"]
Prediction = Literal["eps", "v"]

KINDS = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
"""What is told from names and shapes alone, and its name for people."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
"""Names in a diffusers folder; SDXL alone has the second ones."""


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

    def __post_init__(self) -> None:
        """Refuse a field that no UNet can be built from, and fields that do not fit each other.

        Raises:
            SettingError: names the field, what was expected and what came.
        """
        _check_whole(self, "in_channels", "out_channels", "model_channels", "num_res_blocks", "context_dim")
        _check_whole(self, "norm_groups")
        _check_whole(self, "middle_depth", low=0)
        _check_whole(self, "num_heads", "head_dim", "vector_dim", optional=True)
        _check_row(self, "channel_mult")
        _check_row(self, "transformer_depth", low=0)
        _check_switch(self, "linear_projection")
        if len(self.transformer_depth) != len(self.channel_mult):
            _refuse(self, "transformer_depth", f"one number for each of channel_mult {self.channel_mult}")
        if self.model_channels % 2:
            _refuse(self, "model_channels", "an even number, for the sines and cosines of the timestep embedding")
        if self.model_channels % self.norm_groups:
            _refuse(self, "norm_groups", f"a number that divides model_channels {self.model_channels}")
        if (self.num_heads is None) == (self.head_dim is None):
            _refuse(
                self, "num_heads", f"one of num_heads and head_dim, and None for the other; head_dim is {self.head_dim}"
            )
        name = "head_dim" if self.num_heads is None else "num_heads"
        attending = [mult for mult, depth in zip(self.channel_mult, self.transformer_depth, strict=True) if depth]
        attending += [self.channel_mult[-1]] * bool(self.middle_depth)
        widths = sorted({self.model_channels * mult for mult in attending})
        if any(width % getattr(self, name) for width in widths):
            _refuse(self, name, f"a number that divides the widths of the levels with attention, {widths}")


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

    def __post_init__(self) -> None:
        """Refuse a field that no autoencoder can be built from, and fields that do not fit each other.

        Raises:
            SettingError: names the field, what was expected and what came.
        """
        _check_whole(self, "in_channels", "latent_channels", "channels", "num_res_blocks", "norm_groups")
        _check_row(self, "channel_mult")
        if self.channels % self.norm_groups:
            _refuse(self, "norm_groups", f"a number that divides channels {self.channels}")
        factor: object = self.scaling_factor
        if isinstance(factor, bool) or not isinstance(factor, Real) or not 0 < float(factor) < math.inf:
            _refuse(self, "scaling_factor", "a positive number")


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
    skip_last: int
    """Layers at the end that the context does not go through."""
    final_norm: bool
    """Whether the context goes through the final norm."""
    projection_dim: int | None
    """Width of the pooled text, which goes through every layer; None where there is none."""

    def __post_init__(self) -> None:
        """Refuse a field that no text encoder can be built from, and fields that do not fit each other.

        Raises:
            SettingError: names the field, what was expected and what came.
        """
        _check_whole(self, "vocab_size", "context_length", "width", "mlp_width", "num_layers", "num_heads")
        _check_whole(self, "projection_dim", optional=True)
        _check_whole(self, "pad_id", low=0, high=self.vocab_size - 1, optional=True)
        _check_whole(self, "skip_last", low=0, high=self.num_layers)
        _check_switch(self, "final_norm")
        if self.width % self.num_heads:
            _refuse(self, "num_heads", f"a number that divides width {self.width}")
        if self.activation not in get_args(Activation):
            _refuse(self, "activation", " or ".join(map(repr, get_args(Activation))))


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
    kind: str
    """One of KINDS."""
    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    text_2: TextConfig | None
    """XL's second encoder, whose states stand beside those of the first."""
    schedule: ScheduleConfig
    size: int
    """Height and width, in pixels, that the model was trained at."""
    zeros_for_none: bool
    """Whether no negative prompt (None) means zeros instead of states, and not the empty prompt."""

    @property
    def texts(self) -> tuple[TextConfig, ...]:
        """The text encoders in the order in which their states stand side by side."""
        return (self.text,) if self.text_2 is None else (self.text, self.text_2)

    @property
    def components(self) -> dict[str, UNetConfig | VAEConfig | TextConfig]:
        """The configuration of each network by its name in a diffusers folder."""
        return {"unet": self.unet, "vae": self.vae, **dict(zip(TEXT_ENCODERS, self.texts, strict=False))}


def _check_whole(config: object, *names: str, low: int = 1, high: float = math.inf, optional: bool = False) -> None:
    for name in names:
        value = getattr(config, name)
        if not (value is None and optional) and not _is_whole(value, low, high):
            bounds = f"a whole number from {low}" + ("" if high == math.inf else f" to {high}")
            _refuse(config, name, bounds + " or None" * optional)


def _check_row(config: object, name: str, low: int = 1) -> None:
    values = getattr(config, name)
    if not isinstance(values, tuple | list) or not values or not all(_is_whole(value, low) for value in values):
        _refuse(config, name, f"a tuple of whole numbers from {low}, one for each level")
    object.__setattr__(config, name, tuple(values))  # a list would make the configuration unhashable


def _check_switch(config: object, name: str) -> None:
    if not isinstance(getattr(config, name), bool):
        _refuse(config, name, "True or False")


def _is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _refuse(config: object, name: str, expected: str) -> NoReturn:
    subject = f"{type(config).__name__}.{name}"
    raise SettingError("SETTING_CONFIG", subject, f"{getattr(config, name)!r}", expected=expected)


SD15_INPAINT = Family(
    name="sd15-inpainting",
    kind="sd1",
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
        skip_last=0,
        final_norm=True,
        projection_dim=None,
    ),
    text_2=None,
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
    zeros_for_none=False,
)

# runwayml/stable-diffusion configs/stable-diffusion/v1-inference.yaml
SD15 = dataclasses.replace(SD15_INPAINT, name="sd15", unet=dataclasses.replace(SD15_INPAINT.unet, in_channels=4))

# Stability-AI/stablediffusion configs/stable-diffusion/v2-inpainting-inference.yaml
SD2_INPAINT = dataclasses.replace(
    SD15_INPAINT,
    name="sd2-inpainting",
    kind="sd2",
    unet=dataclasses.replace(SD15_INPAINT.unet, context_dim=1024, num_heads=None, head_dim=64, linear_projection=True),
    # mlfoundations/open_clip model_configs/ViT-H-14.json; of its 24 layers the last is not used, so no file needs it
    # (ldm/modules/encoders/modules.py FrozenOpenCLIPEmbedder, layer="penultimate")
    text=dataclasses.replace(
        SD15_INPAINT.text, width=1024, mlp_width=4096, num_layers=23, num_heads=16, activation="gelu", pad_id=0
    ),
)

# configs/stable-diffusion/v2-inference.yaml, and v2-inference-v.yaml with its parameterization: "v"
SD2 = dataclasses.replace(SD2_INPAINT, name="sd2", unet=dataclasses.replace(SD2_INPAINT.unet, in_channels=4))
SD2_V = dataclasses.replace(SD2, name="sd2-v", schedule=dataclasses.replace(SD2.schedule, prediction="v"), size=768)

# Stability-AI/generative-models configs/inference/sd_xl_base.yaml; in_channels of diffusers'
# stable-diffusion-xl-1.0-inpainting-0.1 unet/config.json
SDXL_INPAINT = dataclasses.replace(
    SD15_INPAINT,
    name="sdxl-inpainting",
    kind="sdxl",
    unet=dataclasses.replace(
        SD15_INPAINT.unet,
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 2, 10),
        middle_depth=10,
        context_dim=768 + 1280,
        num_heads=None,
        head_dim=64,
        linear_projection=True,
        vector_dim=1280 + 6 * 256,  # the pooled text; original height and width, crop top and left, target both
    ),
    vae=dataclasses.replace(SD15_INPAINT.vae, scaling_factor=0.13025),
    text=dataclasses.replace(SD15_INPAINT.text, skip_last=1, final_norm=False),
    # mlfoundations/open_clip model_configs/ViT-bigG-14.json
    text_2=dataclasses.replace(
        SD15_INPAINT.text,
        width=1280,
        mlp_width=5120,
        num_layers=32,
        num_heads=20,
        activation="gelu",
        pad_id=0,
        skip_last=1,
        final_norm=False,
        projection_dim=1280,
    ),
    size=1024,
    zeros_for_none=True,  # model_index.json, force_zeros_for_empty_prompt
)
SDXL = dataclasses.replace(SDXL_INPAINT, name="sdxl", unet=dataclasses.replace(SDXL_INPAINT.unet, in_channels=4))

FAMILIES: dict[str, Family] = {
    family.name: family for family in (SD15_INPAINT, SD15, SD2_INPAINT, SD2, SD2_V, SDXL_INPAINT, SDXL)
}
