"""A checkpoint's configuration: sizes from the shapes of its tensors, and what shapes cannot tell from its JSON files.

The weights decide: a number in a JSON file is used only where no shape tells it, and only if it fits the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdinpaint.errors import CheckpointError
from sdinpaint.families import (
    TEXT_ENCODERS,
    TOKENIZERS,
    Family,
    Prediction,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from sdinpaint.sampling.schedules import train_sigmas

Shapes = Mapping[str, tuple[int, ...]]
Json = Mapping[str, Any]

__all__ = [
    "check_fit",
    "diffusers_configs",
    "prediction_in",
    "schedule_config",
    "text_config",
    "unet_config",
    "vae_config",
    "whole_number",
]

HEAD_DIM = 64  # of every CLIP text encoder
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}


def unet_config(shapes: Shapes, json: Json, base: UNetConfig, where: Path) -> UNetConfig:
    """The UNet of which these are the native shapes. Raises: CheckpointError for a number that fits no shape."""
    try:
        config = _unet_sizes(shapes, base)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        config = base  # something is missing; comparing with the whole family names it best
    channels = whole_number(json, "in_channels", config.in_channels, where)
    if channels != config.in_channels:
        _refuse(where, "in_channels", channels, f"{config.in_channels}, as the weights have")
    groups = whole_number(json, "norm_num_groups", base.norm_groups, where)
    heads = json.get("num_attention_heads") or json.get("attention_head_dim")  # the latter is the number of heads
    widths = [config.model_channels * mult for mult in config.channel_mult]
    _check_divides(where, "norm_num_groups", groups, widths)
    if isinstance(heads, list):
        dims = {
            width // count for width, count in zip(widths, heads, strict=False) if isinstance(count, int) and count > 0
        }
        if len(dims) != 1:
            _refuse(where, "attention_head_dim", heads, "numbers of heads that give one head size")
        return replace(config, norm_groups=groups, num_heads=None, head_dim=dims.pop())
    if heads is not None:
        count = whole_number({"attention_head_dim": heads}, "attention_head_dim", 0, where)
        _check_divides(where, "attention_head_dim", count, widths)
        return replace(config, norm_groups=groups, num_heads=count, head_dim=None)
    return replace(config, norm_groups=groups)


def _unet_sizes(shapes: Shapes, base: UNetConfig) -> UNetConfig:
    first = shapes["input_blocks.0.0.weight"]
    rows = _count(shapes, r"input_blocks\.(\d+)\.")
    halvings = [row for row in range(rows) if f"input_blocks.{row}.0.op.weight" in shapes]
    levels = [range(a + 1, b) for a, b in zip([0, *halvings], [*halvings, rows], strict=True)]
    widths = [shapes[f"input_blocks.{level[-1]}.0.in_layers.2.weight"][0] for level in levels]
    contexts = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    projections = [len(shape) for name, shape in shapes.items() if name.endswith(".proj_in.weight")]
    vector = shapes.get("label_emb.0.0.weight")
    return replace(
        base,
        in_channels=first[1],
        out_channels=shapes["out.2.weight"][0],
        model_channels=first[0],
        channel_mult=tuple(width // first[0] for width in widths),
        num_res_blocks=len(levels[0]),
        transformer_depth=tuple(
            _count(shapes, rf"input_blocks\.{level[0]}\.1\.transformer_blocks\.(\d+)\.") for level in levels
        ),
        middle_depth=_count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        context_dim=contexts[0],
        linear_projection=projections[0] == 2,
        vector_dim=vector[1] if vector else None,
    )


def vae_config(shapes: Shapes, json: Json, base: VAEConfig, where: Path) -> VAEConfig:
    """The autoencoder of which these are the native shapes. Raises: CheckpointError for a number that fits no shape."""
    try:
        config = _vae_sizes(shapes, base)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        config = base
    groups = whole_number(json, "norm_num_groups", base.norm_groups, where)
    _check_divides(where, "norm_num_groups", groups, [config.channels * mult for mult in config.channel_mult])
    return replace(
        config, norm_groups=groups, scaling_factor=_positive(json, "scaling_factor", base.scaling_factor, where)
    )


def _vae_sizes(shapes: Shapes, base: VAEConfig) -> VAEConfig:
    first, latent = shapes["encoder.conv_in.weight"], shapes["decoder.conv_in.weight"]
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
    return replace(
        base,
        in_channels=first[1],
        latent_channels=latent[1],
        channels=first[0],
        channel_mult=tuple(width // first[0] for width in widths),
        num_res_blocks=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
    )


def text_config(shapes: Shapes, json: Json, base: TextConfig, where: Path) -> TextConfig:
    """The text encoder of which these are the native shapes. Raises: CheckpointError for a number that fits none."""
    try:
        tokens = shapes["text_model.embeddings.token_embedding.weight"]
        config = replace(
            base,
            vocab_size=tokens[0],
            width=tokens[1],
            context_length=shapes["text_model.embeddings.position_embedding.weight"][0],
            mlp_width=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            num_layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
            num_heads=max(tokens[1] // HEAD_DIM, 1),
        )
    except (KeyError, IndexError):
        config = base
    if base.projection_dim is not None:
        config = replace(config, projection_dim=shapes.get("text_projection.weight", (base.projection_dim,))[0])
    heads = whole_number(json, "num_attention_heads", config.num_heads, where)
    _check_divides(where, "num_attention_heads", heads, [config.width])
    activation = json.get("hidden_act", base.activation)
    if activation not in ("quick_gelu", "gelu"):
        _refuse(where, "hidden_act", activation, "'quick_gelu' or 'gelu'")
    return replace(config, num_heads=heads, activation=activation)


def schedule_config(json: Json, base: ScheduleConfig, where: Path) -> ScheduleConfig:
    """The trained schedule as `scheduler_config.json` gives it. Raises: CheckpointError for a kind not built here."""
    kind = json.get("beta_schedule", "scaled_linear")
    if kind != "scaled_linear" or json.get("trained_betas") is not None:
        _refuse(where, "beta_schedule", "trained_betas" if kind == "scaled_linear" else kind, "'scaled_linear'")
    schedule = replace(
        base,
        train_steps=whole_number(json, "num_train_timesteps", base.train_steps, where),
        beta_start=_positive(json, "beta_start", base.beta_start, where),
        beta_end=_positive(json, "beta_end", base.beta_end, where),
        prediction=prediction_in(json, where) or base.prediction,
        steps_offset=whole_number({"steps_offset": 1, **json}, "steps_offset", base.steps_offset, where, low=0),
        end_at_zero=bool(json.get("set_alpha_to_one", base.end_at_zero)),
    )
    if not bool(train_sigmas(schedule).isfinite().all()):
        _refuse(where, "beta_end", schedule.beta_end, "betas below 1 that leave some signal at the last step")
    return schedule


def prediction_in(json: Json, where: Path) -> Prediction | None:
    """What `scheduler_config.json` says the UNet predicts; None where it says nothing. Raises: CheckpointError."""
    if "prediction_type" not in json:
        return None
    name = json["prediction_type"]
    if not isinstance(name, str) or name not in PREDICTIONS:
        _refuse(where, "prediction_type", name, " or ".join(map(repr, PREDICTIONS)))
    return PREDICTIONS[name]


def check_fit(family: Family, where: Path) -> None:
    """Compare the components with each other. Raises: CheckpointError naming the two that do not fit."""
    unet, vae = family.unet, family.vae
    width = sum(text.width for text in family.texts)
    if unet.context_dim != width:
        made = " + ".join(str(text.width) for text in family.texts)
        found = f"the UNet reads text states {unet.context_dim} wide, the text encoder makes them {made} wide"
        raise CheckpointError("CKPT_MISMATCH", where, found, hint="take both from one model")
    rows = {text.vocab_size for text in family.texts}
    if len(rows) > 1:
        found = f"text encoders of {' and '.join(str(text.vocab_size) for text in family.texts)} tokens"
        raise CheckpointError("CKPT_MISMATCH", where, found, expected="one vocabulary", hint="take both from one model")
    pooled = family.texts[-1].projection_dim
    if unet.vector_dim is not None and (pooled is None or unet.vector_dim <= pooled or (unet.vector_dim - pooled) % 12):
        found = f"the UNet reads a vector of {unet.vector_dim} numbers, the pooled text has {pooled}"
        expected = "the pooled text, and as many cosines and sines for each of six sizes"
        raise CheckpointError("CKPT_MISMATCH", where, found, expected=expected, hint="take both from one model")
    takes_mask = unet.out_channels + 1 + vae.latent_channels
    if unet.out_channels != vae.latent_channels or unet.in_channels not in (unet.out_channels, takes_mask):
        found = f"a UNet of {unet.in_channels} to {unet.out_channels} channels, a VAE of {vae.latent_channels}"
        expected = "9 to 4 channels (inpainting) or 4 to 4 (text to image), and a VAE of 4"
        raise CheckpointError("CKPT_CHANNELS", where, found, expected=expected, hint="give an inpainting checkpoint")


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that `pattern` finds; 0 where it finds none."""
    compiled = re.compile(pattern)
    return max((int(match[1]) + 1 for name in shapes if (match := compiled.match(name))), default=0)


def whole_number(json: Json, name: str, default: int, where: Path, low: int = 1) -> int:
    """A whole number of a JSON table, `default` where it has none. Raises: CheckpointError."""
    value = json.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= 2**20:
        _refuse(where, name, value, f"a whole number from {low}")
    return int(value)


def _positive(json: Json, name: str, default: float, where: Path) -> float:
    value = json.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        _refuse(where, name, value, "a positive number")
    return float(value)


def _check_divides(where: Path, name: str, number: int, widths: list[int]) -> None:
    if any(width % number for width in widths):
        _refuse(where, name, number, f"a number that divides the widths {widths}")


def _refuse(where: Path, name: str, value: object, expected: str) -> None:
    hint = "give the configuration that belongs to these weights: config=FOLDER"
    raise CheckpointError("CKPT_BAD_CONFIG", where, f"{name} is {value!r}", expected=expected, hint=hint)


def diffusers_configs(family: Family) -> dict[str, dict[str, object]]:
    """{relative path: JSON table}: what diffusers' pipelines need beside the weights."""
    texts = {
        f"{name}/config.json": _text_json(config) for name, config in zip(TEXT_ENCODERS, family.texts, strict=False)
    }
    return {
        "unet/config.json": _unet_json(family),
        "vae/config.json": _vae_json(family.vae, family.size),
        **texts,
        "scheduler/scheduler_config.json": _scheduler_json(family),
        "model_index.json": _index_json(family),
    }


def _unet_json(family: Family) -> dict[str, object]:
    unet = family.unet
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = ["CrossAttn" if depth else "" for depth in unet.transformer_depth]
    # the last number is also the depth of the middle, where a level without attention has 0 here
    depths = [*(max(depth, 1) for depth in unet.transformer_depth[:-1]), unet.middle_depth]
    pooled = family.texts[-1].projection_dim
    sizes = (
        {}
        if unet.vector_dim is None or pooled is None
        else {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (unet.vector_dim - pooled) // 6,
            "projection_class_embeddings_input_dim": unet.vector_dim,
        }
    )
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": unet.num_heads or [width // (unet.head_dim or width) for width in widths],
        "block_out_channels": widths,
        "cross_attention_dim": unet.context_dim,
        "down_block_types": [f"{kind}DownBlock2D" for kind in attends],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attends)],
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "layers_per_block": unet.num_res_blocks,
        "norm_num_groups": unet.norm_groups,
        "sample_size": family.size // 8,
        "transformer_layers_per_block": depths,
        "use_linear_projection": unet.linear_projection,
        **sizes,
    }


def _vae_json(vae: VAEConfig, size: int) -> dict[str, object]:
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [vae.channels * mult for mult in vae.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.channel_mult),
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.channel_mult),
        "in_channels": vae.in_channels,
        "out_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.num_res_blocks,
        "norm_num_groups": vae.norm_groups,
        "sample_size": size,
        "scaling_factor": vae.scaling_factor,
    }


def _text_json(text: TextConfig) -> dict[str, object]:
    return {
        "architectures": [_text_class(text)],
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "max_position_embeddings": text.context_length,
        "hidden_act": text.activation,
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": text.vocab_size - 1,
        "pad_token_id": text.vocab_size - 1 if text.pad_id is None else text.pad_id,
        **({} if text.projection_dim is None else {"projection_dim": text.projection_dim}),
    }


def _text_class(text: TextConfig) -> str:
    return "CLIPTextModel" if text.projection_dim is None else "CLIPTextModelWithProjection"


def _scheduler_json(family: Family) -> dict[str, object]:
    schedule = family.schedule
    return {
        "_class_name": _scheduler_class(family),
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "num_train_timesteps": schedule.train_steps,
        "prediction_type": next(theirs for theirs, ours in PREDICTIONS.items() if ours == schedule.prediction),
        "steps_offset": schedule.steps_offset,
        "set_alpha_to_one": schedule.end_at_zero,
        "timestep_spacing": "leading",
        "clip_sample": False,
    }


def _scheduler_class(family: Family) -> str:
    """As in the releases; either can be made of the other's table."""
    return "DDIMScheduler" if family.text_2 is None else "EulerDiscreteScheduler"


def _index_json(family: Family) -> dict[str, object]:
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": _scheduler_class(family)}
    for name, tokenizer, text in zip(TEXT_ENCODERS, TOKENIZERS, family.texts, strict=False):
        parts |= {name: _text_class(text), tokenizer: "CLIPTokenizer"}
    libraries = {name: "transformers" if kind.startswith("CLIP") else "diffusers" for name, kind in parts.items()}
    index: dict[str, object] = {
        "_class_name": _pipeline_class(family),
        "_diffusers_version": "0.42.0",  # an inpainting folder without one is refused
        **{name: [libraries[name], part] for name, part in parts.items()},
    }
    if family.text_2 is not None:
        return index | {"force_zeros_for_empty_prompt": family.zeros_for_none}
    return index | {
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }


def _pipeline_class(family: Family) -> str:
    kind = "" if family.text_2 is None else "XL"
    task = "" if family.unet.in_channels == family.unet.out_channels else "Inpaint"
    return f"StableDiffusion{kind}{task}Pipeline"
