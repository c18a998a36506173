"""Configure the models of a checkpoint: sizes come from tensor shapes, and settings without a shape from JSON files.

The weights decide: a number in a JSON file is used only where no shape tells it, and only if it fits the shapes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from sdinpaint.checkpoints.built_values import TEXT, TOKENIZER, UNET, VAE, Table
from sdinpaint.checkpoints.config_values import Json, check_divides, positive, refuse, whole_number, without_nulls
from sdinpaint.errors import CheckpointError, SettingError
from sdinpaint.families import Activation, Family, TextConfig, UNetConfig, VAEConfig

Shapes = Mapping[str, tuple[int, ...]]
Config = TypeVar("Config", UNetConfig, VAEConfig, TextConfig)

__all__ = ["PAD_TOKENS", "Shapes", "check_fit", "pad_id", "text_config", "unet_config", "vae_config"]

HEAD_DIM = 64
"""Width of each attention head in every CLIP text encoder."""
SCALING = (0.01, 10.0)
"""Bounds of a VAE's scaling factor, also divided by `latents_std`; released ones have 0.06 to 1.53."""
FURTHEST = 3.0
"""Bound of `latents_mean` in scaled latents, whose standard deviation is about 1; released ones have up to 0.24."""
ACTIVATIONS = get_args(Activation)
PADDING = {"<|endoftext|>": None, "!": 0}
"""Token that fills up prompts -> its id; None is the end token."""
PAD_TOKENS = {number: token for token, number in PADDING.items()}


def unet_config(shapes: Shapes, json: Json, base: UNetConfig, where: Path, table: Table = UNET) -> UNetConfig:
    """Find the configuration of a UNet from the shapes of its tensors and from its JSON file.

    Args:
        shapes: native name -> shape.
        json: diffusers' config.json; it may be empty.
        base: the family's UNet, for what neither tells.
        where: the file or folder that errors name.
        table: the values that are built; a ControlNet's are others.

    Returns:
        The configuration; `base` with its values replaced by those of the JSON file where needed names are missing.

    Raises:
        CheckpointError: a value of the JSON file is not built, or does not fit the shapes.
    """
    json = table.settings(json, where)
    try:
        config = _unet_sizes(shapes, base)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        config = base  # something is missing; comparing with the whole family names it best
    channels = whole_number(json, "in_channels", config.in_channels, where)
    if channels != config.in_channels:
        refuse(where, "in_channels", channels, f"{config.in_channels}, as the weights have")
    embeds = None if config.vector_dim is None else "text_time"
    if json and json.get("addition_embed_type") != embeds:
        table.refuse(where, "addition_embed_type", json.get("addition_embed_type"), f"{embeds!r} for these weights")
    shift = positive(json, "freq_shift", base.freq_shift, where, zero=True)
    if shift > 1:
        table.refuse(where, "freq_shift", shift, "a number from 0 to 1")
    own = {"freq_shift": shift, "norm_eps": positive(json, "norm_eps", base.norm_eps, where)}
    groups = whole_number(json, "norm_num_groups", base.norm_groups, where)
    heads = json.get("num_attention_heads") or json.get("attention_head_dim")  # the latter is the number of heads
    widths = [config.model_channels * mult for mult in config.channel_mult]
    check_divides(where, "norm_num_groups", groups, widths)
    if isinstance(heads, list) and heads and heads == heads[:1] * len(widths):
        heads = heads[0]
    if isinstance(heads, list):
        counted = len(heads) == len(widths) and all(type(count) is int and count > 0 for count in heads)
        dims = {width / count for width, count in zip(widths, heads, strict=True)} if counted else {}
        if len(dims) != 1 or any(width % count for width, count in zip(widths, heads, strict=True)):
            refuse(where, "attention_head_dim", heads, "numbers of heads that give one head size")
        return _fitting(config, where, norm_groups=groups, num_heads=None, head_dim=widths[0] // heads[0], **own)
    if heads is not None:
        count = whole_number({"attention_head_dim": heads}, "attention_head_dim", 0, where)
        check_divides(where, "attention_head_dim", count, widths)
        return _fitting(config, where, norm_groups=groups, num_heads=count, head_dim=None, **own)
    return _fitting(config, where, norm_groups=groups, num_heads=base.num_heads, head_dim=base.head_dim, **own)


def _fitting(config: Config, where: Path, **settings: Any) -> Config:
    try:
        return replace(config, **settings)
    except SettingError as error:
        name = error.subject.rpartition(".")[2]
        hint = "give the configuration that belongs to these weights: config=FOLDER"
        raise CheckpointError(
            "CKPT_BAD_CONFIG", where, f"{name} is {error.found}", expected=error.expected, hint=hint
        ) from error


def _unet_sizes(shapes: Shapes, base: UNetConfig) -> UNetConfig:
    """Return `base` with the sizes that the shapes tell, one norm group and one head."""
    first = shapes["input_blocks.0.0.weight"]
    rows = _count(shapes, r"input_blocks\.(\d+)\.")
    halvings = [row for row in range(rows) if f"input_blocks.{row}.0.op.weight" in shapes]
    levels = [range(a + 1, b) for a, b in zip([0, *halvings], [*halvings, rows], strict=True)]
    widths = [shapes[f"input_blocks.{level[-1]}.0.in_layers.2.weight"][0] for level in levels]
    contexts = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    projections = [len(shape) for name, shape in shapes.items() if name.endswith(".proj_in.weight")]
    vector = shapes.get("label_emb.0.0.weight")
    depths = tuple(_count(shapes, rf"input_blocks\.{level[0]}\.1\.transformer_blocks\.(\d+)\.") for level in levels)
    middle = _count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    if (depths, contexts[0]) == (base.transformer_depth, base.context_dim):
        # a released UNet lacks none; it would be a smaller one that is complete
        middle = max(middle, base.middle_depth)
    return replace(
        base,
        in_channels=first[1],
        out_channels=shapes["out.2.weight"][0],
        model_channels=first[0],
        channel_mult=tuple(width // first[0] for width in widths),
        num_res_blocks=len(levels[0]),
        transformer_depth=depths,
        middle_depth=middle,
        context_dim=contexts[0],
        linear_projection=projections[0] == 2,
        vector_dim=vector[1] if vector else None,
        norm_groups=1,
        num_heads=1,
        head_dim=None,
    )


def vae_config(shapes: Shapes, json: Json, base: VAEConfig, where: Path) -> VAEConfig:
    """Find the configuration of an autoencoder from the shapes of its tensors and from its JSON file.

    Args:
        shapes: native name -> shape.
        json: diffusers' config.json; it may be empty.
        base: the family's autoencoder, for what neither tells.
        where: the file or folder that errors name.

    Returns:
        The configuration; `base` with its values replaced by those of the JSON file where needed names are missing.

    Raises:
        CheckpointError: a value of the JSON file is not built, or does not fit the shapes.
    """
    json = VAE.settings(json, where)
    try:
        config = _vae_sizes(shapes, base)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        config = base
    groups = whole_number(json, "norm_num_groups", base.norm_groups, where)
    check_divides(where, "norm_num_groups", groups, [config.channels * mult for mult in config.channel_mult])
    factor = positive(json, "scaling_factor", base.scaling_factor, where)
    middle, spread = (json.get(key, getattr(base, key)) for key in ("latents_mean", "latents_std"))
    config = _fitting(config, where, norm_groups=groups, scaling_factor=factor, latents_mean=middle, latents_std=spread)
    scales = [factor / one for one in config.latents_std or (1.0,)]
    if not SCALING[0] <= min(scales) <= max(scales) <= SCALING[1]:
        expected = f"{SCALING[0]} to {SCALING[1]}, which gives latents a variance near 1"
        if config.latents_std is None:
            refuse(where, "scaling_factor", factor, expected)
        refuse(where, "scaling_factor divided by latents_std", scales, expected)
    if any(abs(one * scale) > FURTHEST for one, scale in zip(config.latents_mean or (0.0,), scales, strict=True)):
        expected = f"numbers of at most {FURTHEST:g} after scaling, which gives latents a mean near 0"
        refuse(where, "latents_mean", middle, expected)
    return config


def _vae_sizes(shapes: Shapes, base: VAEConfig) -> VAEConfig:
    """Return `base` with the sizes that the shapes tell, and one norm group."""
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
        norm_groups=1,
    )


def text_config(shapes: Shapes, json: Json, base: TextConfig, where: Path) -> TextConfig:
    """Find the configuration of a text encoder from the shapes of its tensors and from its JSON file.

    Args:
        shapes: native name -> shape.
        json: the config.json of transformers; it may be empty.
        base: the family's text encoder, for what neither tells.
        where: the file or folder that errors name.

    Returns:
        The configuration; `base` with its values replaced by those of the JSON file where needed names are missing.

    Raises:
        CheckpointError: a value of the JSON file is not built, or does not fit the shapes.
    """
    json = TEXT.settings(json, where)
    try:
        tokens = shapes["text_model.embeddings.token_embedding.weight"]
        config = replace(
            base,
            vocab_size=tokens[0],
            width=tokens[1],
            context_length=shapes["text_model.embeddings.position_embedding.weight"][0],
            mlp_width=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            num_layers=_layers(shapes, json, base),
            num_heads=1,
        )
        default = max(config.width // HEAD_DIM, 1)
    except (KeyError, IndexError, ValueError):
        config, default = base, base.num_heads
    projection = base.projection_dim
    if projection is not None:
        projection = shapes.get("text_projection.weight", (projection,))[0]
    heads = whole_number(json, "num_attention_heads", default, where)
    check_divides(where, "num_attention_heads", heads, [config.width])
    activation = json.get("hidden_act", base.activation)
    if activation not in ACTIVATIONS:
        TEXT.refuse(where, "hidden_act", activation, " or ".join(map(repr, ACTIVATIONS)))
    # transformers leaves out the last layers of a file that has more; every network here has them, and skips them
    layers = whole_number(json, "num_hidden_layers", config.num_layers, where)
    left_out = max(config.num_layers - layers, 0)
    if left_out and projection is not None:
        TEXT.refuse(where, "num_hidden_layers", layers, f"{config.num_layers}, as the weights have, for pooled text")
    end, last = json.get("eos_token_id", 2), config.vocab_size - 1
    if projection is not None and end not in (2, last):  # transformers takes 2 for the largest id
        TEXT.refuse(where, "eos_token_id", end, f"{last}, the largest id of the vocabulary, or 2")
    return _fitting(
        config,
        where,
        num_heads=heads,
        activation=activation,
        projection_dim=projection,
        skip_last=base.skip_last + left_out,
        norm_eps=positive(json, "layer_norm_eps", base.norm_eps, where),
    )


def _layers(shapes: Shapes, json: Json, base: TextConfig) -> int:
    """Count the layers of a text encoder, of which a released one lacks none that its configuration does not leave out.

    All sizes but this one would be those of a smaller text encoder that is complete.
    """
    held = _count(shapes, r"text_model\.encoder\.layers\.(\d+)\.")
    if shapes["text_model.embeddings.token_embedding.weight"] != (base.vocab_size, base.width):
        return held
    told = json.get("num_hidden_layers", base.num_layers)
    return max(held, min(told, base.num_layers) if isinstance(told, int) else held)


def pad_id(json: Json, specials: Json, base: TextConfig, where: Path) -> int | None:
    """Find the id that fills up prompts from the files of a tokenizer.

    Args:
        json: its tokenizer_config.json; it may be empty.
        specials: its special_tokens_map.json, which outweighs the other; it may be empty.
        base: the family's text encoder, for what neither tells.
        where: the file or folder that errors name.

    Returns:
        The id; None is the end token.

    Raises:
        CheckpointError: another kind of tokenizer, or of padding.
    """
    tokens = without_nulls({**json, **without_nulls(specials)})
    named = {key: value.get("content", value) if isinstance(value, dict) else value for key, value in tokens.items()}
    name = TOKENIZER.settings(named, where).get("pad_token")
    if name is None:
        return base.pad_id
    if not isinstance(name, str) or name not in PADDING:
        TOKENIZER.refuse(where, "pad_token", name, " or ".join(map(repr, PADDING)))
    return PADDING[name]


def check_fit(family: Family, where: Path) -> None:
    """Check that the sizes of UNet, VAE and text encoders fit each other.

    Args:
        family: the components' configurations.
        where: the file or folder that errors name.

    Raises:
        CheckpointError: names the two components that do not fit.
    """
    unet, vae = family.unet, family.vae
    width = sum(text.width for text in family.texts)
    if unet.context_dim != width:
        made = " + ".join(str(text.width) for text in family.texts)
        found = f"the UNet takes text embeddings {unet.context_dim} wide, the text encoder makes them {made} wide"
        raise CheckpointError("CKPT_MISMATCH", where, found, hint="take both from one model")
    rows = {text.vocab_size for text in family.texts}
    if len(rows) > 1:
        found = f"text encoders of {' and '.join(str(text.vocab_size) for text in family.texts)} tokens"
        raise CheckpointError("CKPT_MISMATCH", where, found, expected="one vocabulary", hint="take both from one model")
    pooled = family.texts[-1].projection_dim
    if unet.vector_dim is not None and (pooled is None or unet.vector_dim <= pooled or (unet.vector_dim - pooled) % 12):
        found = f"the UNet takes a conditioning vector of {unet.vector_dim} numbers, the pooled text has {pooled}"
        expected = "the pooled text embedding, and equally many sines and cosines for each of six sizes"
        raise CheckpointError("CKPT_MISMATCH", where, found, expected=expected, hint="take both from one model")
    takes_mask = unet.out_channels + 1 + vae.latent_channels
    if unet.out_channels != vae.latent_channels or unet.in_channels not in (unet.out_channels, takes_mask):
        found = f"a UNet of {unet.in_channels} to {unet.out_channels} channels, a VAE of {vae.latent_channels}"
        expected = "9 to 4 channels (inpainting) or 4 to 4 (text to image), and a VAE of 4"
        raise CheckpointError("CKPT_CHANNELS", where, found, expected=expected, hint="give an inpainting checkpoint")


def _count(shapes: Shapes, pattern: str) -> int:
    """Count how many of the numbers 0, 1, 2, ... the pattern finds, up to the first that it does not find."""
    compiled = re.compile(pattern)
    found = {match[1] for name in shapes if (match := compiled.match(name))}
    return next(number for number in itertools.count() if str(number) not in found)
