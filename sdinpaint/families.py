"""The released model families: every trained constant once, with its source. Standard library only.

Families differ by `dataclasses.replace(...)`, so that the difference between two of them can be read directly. Widths
and depths of a checkpoint come from its own shapes (`sdinpaint.loading`). What shapes cannot show (heads, groups,
activation, prediction, schedule) comes from here or from the config beside the weights.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, get_args

from sdinpaint.errors import SettingError, said

Activation = Literal["quick_gelu", "gelu"]
Prediction = Literal["eps", "v"]

Kind = Literal["sd1", "sd2", "sdxl"]

KINDS: dict[Kind, str] = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
"""Kinds that tensor names and shapes identify -> title in reports."""


def title_of_kind(kind: str) -> str:
    """Name a kind of models in a report.

    Args:
        kind: "sd1", "sd2" or "sdxl".

    Returns:
        Its title; another text stays as it is.
    """
    return next((title for name, title in KINDS.items() if name == kind), kind)


TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
"""Names in a diffusers folder; only SDXL has the second ones."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a denoising UNet; either `num_heads` or `head_dim` is given, never both."""

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    transformer_depth: tuple[int, ...]
    """Transformer blocks in each attention of a level; 0 for a level without attention."""
    middle_depth: int
    context_dim: int
    num_heads: int | None
    head_dim: int | None
    norm_groups: int
    linear_projection: bool
    """True if proj_in and proj_out of a transformer are linear layers (SD2, SDXL), not 1 x 1 convolutions (SD1)."""
    vector_dim: int | None
    norm_eps: float = 1e-5
    """Added to the variance in the norms of residual blocks and of the output; a transformer's first norm has 1e-6."""
    freq_shift: float = 0
    """Taken from the number of frequencies of a sinusoidal embedding: it stretches them towards lower ones."""

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
        _check_positive(self, "norm_eps")
        if not _is_number(self.freq_shift) or not 0 <= self.freq_shift <= 1:
            _refuse(self, "freq_shift", "a number from 0 to 1")
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
    """The shape of a VAE, and the factor that scales its latents to unit variance."""

    in_channels: int
    latent_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    norm_groups: int
    scaling_factor: float
    latents_mean: tuple[float, ...] | None = None
    """Mean of each channel of unscaled latents, which is subtracted; None subtracts nothing."""
    latents_std: tuple[float, ...] | None = None
    """Standard deviation of each channel of unscaled latents, by which they are divided; None divides by nothing."""

    def __post_init__(self) -> None:
        """Refuse a field that no autoencoder can be built from, and fields that do not fit each other.

        Raises:
            SettingError: names the field, what was expected and what came.
        """
        _check_whole(self, "in_channels", "latent_channels", "channels", "num_res_blocks", "norm_groups")
        _check_row(self, "channel_mult")
        if self.channels % self.norm_groups:
            _refuse(self, "norm_groups", f"a number that divides channels {self.channels}")
        _check_positive(self, "scaling_factor")
        _check_channels(self, "latents_mean")
        _check_channels(self, "latents_std", low=0)
        if (self.latents_mean is None) != (self.latents_std is None):
            _refuse(self, "latents_std", "as many numbers as latents_mean, or None where that is None")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The shape of a CLIP text encoder, and which of its hidden states condition the UNet."""

    vocab_size: int
    context_length: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    activation: Activation
    pad_id: int | None
    """Id of the token that fills up to `context_length`; None is the end-of-text token."""
    skip_last: int
    """Number of layers at the end that the text embeddings skip (clip skip)."""
    final_norm: bool
    """True if the text embeddings go through the final norm."""
    projection_dim: int | None
    """Width of the pooled text embedding, which goes through every layer; None without one."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm."""

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
        _check_positive(self, "norm_eps")
        if self.width % self.num_heads:
            _refuse(self, "num_heads", f"a number that divides width {self.width}")
        if self.activation not in get_args(Activation):
            _refuse(self, "activation", " or ".join(map(repr, get_args(Activation))))


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """The shape of a ControlNet."""

    unet: UNetConfig
    """The configuration of the UNet whose encoder is copied, with as many input channels as latents have."""
    hint_widths: tuple[int, ...]
    """The channels of the conditioning image's features, from full resolution down to the resolution of the latents."""

    def __post_init__(self) -> None:
        """Refuse a field that no ControlNet can be built from.

        Raises:
            SettingError: names the field, what was expected and what came.
        """
        if not isinstance(self.unet, UNetConfig):
            _refuse(self, "unet", "a UNetConfig")
        _check_row(self, "hint_widths")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The noise schedule of training, and its convention for the timesteps of sampling."""

    train_steps: int
    beta_start: float
    beta_end: float
    prediction: Prediction
    steps_offset: int
    """Offset of every timestep in leading spacing."""
    end_at_zero: bool
    """True if DDIM ends at sigma 0 (`set_alpha_to_one`), not at the first sigma of the training schedule."""
    clip_range: float | None = None
    """Largest absolute value of latents that DDIM predicts (`clip_sample`); None does not clip."""
    zero_snr: bool = False
    """True if it was trained down to no signal at all (zero terminal SNR); runs start a little above that."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of checkpoint: its components and its noise schedule."""

    name: str
    kind: Kind
    """A key of KINDS."""
    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    text_2: TextConfig | None
    """The second text encoder of SDXL, whose embeddings are concatenated to those of the first."""
    schedule: ScheduleConfig
    size: int
    """Height and width in pixels at which the model was trained."""
    zeros_for_none: bool
    """True if no negative prompt (None) means zeros for text embeddings instead of the empty prompt."""

    @property
    def texts(self) -> tuple[TextConfig, ...]:
        """The text encoders in the order in which their embeddings are concatenated."""
        return (self.text,) if self.text_2 is None else (self.text, self.text_2)

    @property
    def components(self) -> dict[str, UNetConfig | VAEConfig | TextConfig]:
        """The configuration of each network, by its name in a diffusers folder."""
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


def _check_positive(config: object, name: str) -> None:
    value = getattr(config, name)
    if not _is_number(value) or not 0 < value < math.inf:
        _refuse(config, name, "a positive number")


def _check_channels(config: Any, name: str, low: float = -math.inf) -> None:
    """Check one number above `low` for each channel of latents, or None."""
    values, channels = getattr(config, name), config.latent_channels
    if values is None:
        return
    if not isinstance(values, tuple | list) or len(values) != channels:
        _refuse(config, name, f"{channels} numbers, one for each channel of latents")
    if not all(_is_number(value) and low < value < math.inf for value in values):
        _refuse(config, name, "finite numbers" + " above 0" * (low == 0))
    object.__setattr__(config, name, tuple(values))


def _check_switch(config: object, name: str) -> None:
    if not isinstance(getattr(config, name), bool):
        _refuse(config, name, "True or False")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _refuse(config: object, name: str, expected: str) -> NoReturn:
    subject = f"{type(config).__name__}.{name}"
    raise SettingError("SETTING_CONFIG", subject, said(getattr(config, name)), expected=expected)


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
    # v1-inpainting-inference.yaml, first_stage_config and scale_factor
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
    # v1-inpainting-inference.yaml ("linear" in ldm is linear in sqrt(beta)); scheduler_config.json
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
    # mlfoundations/open_clip model_configs/ViT-H-14.json; its last of 24 layers is not used, and files may lack it
    # (ldm/modules/encoders/modules.py FrozenOpenCLIPEmbedder, layer="penultimate")
    text=dataclasses.replace(
        SD15_INPAINT.text, width=1024, mlp_width=4096, num_layers=23, num_heads=16, activation="gelu", pad_id=0
    ),
)

# Stability-AI/stablediffusion v2-inference.yaml, and v2-inference-v.yaml with its parameterization: "v"
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
        vector_dim=1280
        + 6 * 256,  # pooled text; height and width of the original, top and left of the crop, target size
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

_SHAPELESS: dict[str, tuple[str, ...]] = {
    "unet": ("norm_eps", "freq_shift"),
    "vae": ("scaling_factor", "latents_mean", "latents_std"),
    "text": ("activation", "pad_id", "skip_last", "norm_eps"),
    "text_2": ("activation", "pad_id", "skip_last", "norm_eps"),
    "schedule": ("train_steps", "beta_start", "beta_end", "steps_offset", "end_at_zero", "clip_range", "zero_snr"),
}
"""Part of a family -> the fields that change results without changing a shape, and that its name stands for."""


def deviations(family: Family) -> dict[str, object]:
    """List what a model has otherwise than the released family of its name, as far as no shape tells it.

    Args:
        family: the model's configuration.

    Returns:
        "part.field" -> the model's value; empty for a family without a released one.
    """
    released = FAMILIES.get(family.name)
    if released is None:
        return {}
    return {
        f"{part}.{name}": getattr(ours, name)
        for part, names in _SHAPELESS.items()
        if (ours := getattr(family, part)) is not None and (theirs := getattr(released, part)) is not None
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    }
