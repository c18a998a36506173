"""Configure the ControlNet of a checkpoint from the shapes of its tensors and its JSON file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from sdinpaint.checkpoints.built_values import CONTROLNET
from sdinpaint.checkpoints.config_values import Json
from sdinpaint.checkpoints.configs import Shapes, unet_config
from sdinpaint.errors import CheckpointError
from sdinpaint.families import ControlNetConfig, UNetConfig

__all__ = ["controlnet_config"]

HINT_WIDTHS = (16, 32, 96, 256)
"""Channels of the convolutions that embed the conditioning image in all released ControlNets.

A file's own numbers are read from its shapes.
"""
HINT_WEIGHT = re.compile(r"input_hint_block\.(\d+)\.weight")
ALIKE = ("model_channels", "channel_mult", "num_res_blocks", "context_dim", "vector_dim")
"""Fields of `UNetConfig` in which a ControlNet and its UNet must agree."""
KINDS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""Model by the width of its text embeddings."""


def controlnet_config(shapes: Shapes, json: Json, unet: UNetConfig, where: Path) -> ControlNetConfig:
    """Find the configuration of a ControlNet from the shapes of its tensors and from its JSON file.

    Args:
        shapes: native name -> shape.
        json: diffusers' config.json; it may be empty.
        unet: the UNet that the ControlNet is for.
        where: the file or folder that errors name.

    Returns:
        The configuration.

    Raises:
        CheckpointError: a ControlNet of another family or kind, or a number that does not fit the shapes.
    """
    # A ControlNet has no up path, of which `unet_config` reads the last layer.
    end = {"out.2.weight": (unet.out_channels, unet.model_channels, 3, 3)}
    found = unet_config({**shapes, **end}, json, unet, where, CONTROLNET)
    if any(getattr(found, name) != getattr(unet, name) for name in ALIKE):
        hint = "give a ControlNet that was trained for the family of the checkpoint"
        raise CheckpointError(
            "CKPT_MISMATCH",
            where,
            f"a ControlNet for {_kind(found)}",
            expected=f"one for {_kind(unet)}, as the UNet has them",
            hint=hint,
        )
    if unet.vector_dim is not None and found.freq_shift != unet.freq_shift:
        CONTROLNET.refuse(where, "freq_shift", found.freq_shift, f"{unet.freq_shift}, the UNet's, for both embed sizes")
    rows = sorted(int(match[1]) for name in shapes if (match := HINT_WEIGHT.fullmatch(name)))
    widths = tuple(shapes[f"input_hint_block.{row}.weight"][0] for row in rows[:-1:2])
    return ControlNetConfig(unet=replace(found, in_channels=unet.out_channels), hint_widths=widths or HINT_WIDTHS)


def _kind(unet: UNetConfig) -> str:
    name = KINDS.get(unet.context_dim, "an unknown model")
    return f"{name}: text embeddings {unet.context_dim} wide, {unet.model_channels} channels times {unet.channel_mult}"
