"""Inpainting models made of others: by new input channels that count nothing yet, or by a difference of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sdinpaint_weights.stream import Item
from torch import Tensor

from sdinpaint.checkpoints.converting import check_request, model_of, native_items, source_files, write_model
from sdinpaint.checkpoints.diffusers_configs import diffusers_configs
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.checkpoints.sources import Part, open_parts
from sdinpaint.errors import CheckpointError, SettingError
from sdinpaint.families import FAMILIES, Family
from sdinpaint.load_options import LoadOptions
from sdinpaint.models import UNet

__all__ = ["to_inpainting", "widen_input"]

FIRST = "input_blocks.0.0.weight"
TEXT_TO_IMAGE, INPAINTING = 4, 9
"""Input channels: noisy latents 4; then the mask, and the masked picture's latents 4."""

Items = Mapping[str, Item]


@torch.no_grad()
def widen_input(unet: UNet) -> UNet:
    """A UNet of 9 input channels that does what one of 4 does, whatever mask and picture it is shown: to train from.

    The new channels' weights are zero; all others are shared with the given UNet. Raises: SettingError.
    """
    if unet.config.in_channels != TEXT_TO_IMAGE:
        found, expected = f"a UNet of {unet.config.in_channels} input channels", f"{TEXT_TO_IMAGE}: text to image"
        raise SettingError("SETTING_UNET", "unet", found, expected=expected)
    with torch.device("meta"):
        wide = UNet(replace(unet.config, in_channels=INPAINTING))
    state = unet.state_dict()
    wide.load_state_dict(state | {FIRST: _widened(state[FIRST], INPAINTING)}, strict=True, assign=True)
    return wide.train(unet.training)


def to_inpainting(
    custom: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    inpaint: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **opening: Any,
) -> None:
    """Write an inpainting checkpoint made of a text-to-image one: a .safetensors file, or else a diffusers folder.

    With `base`, the model that `custom` was trained from, and `inpaint`, the inpainting model of that base:
    custom + inpaint - base, and inpaint's own weights for the 5 new input channels. With neither: custom and zeros for
    them, a start for training. VAE and text encoders are custom's; of the others only the UNet is read.
    Sources may have any layout and dtype. opening: what else `load` takes to open custom. Computed in float32, tensor
    by tensor, and written in custom's dtype unless another one is asked for.
    Raises: CheckpointError, SettingError.
    """
    target = Path(target)
    sources = [source for source in (custom, base, inpaint) if source is not None]
    if len(sources) == 2:
        found, expected = f"base={base!r}, inpaint={inpaint!r}", "both, or neither to add channels of zeros"
        raise SettingError("SETTING_MERGE", "base and inpaint", found, expected=expected)
    layout, dtype = check_request(target, None, dtype, sources, overwrite)
    checkpoint = open_checkpoint(LoadOptions(source=custom, **opening), progress=progress)
    parts = [checkpoint.parts["unet"], *(_unet(source) for source in sources[1:])]
    _check_alike(parts, checkpoint.family)
    ours, *others = [{item.name: item for item in native_items(part.state)} for part in parts]
    unet = _added(ours, *others) if others else ours | {FIRST: _widened_item(ours[FIRST])}
    names = [Path(source).name for source in sources]
    model, family = model_of(checkpoint), _inpainting(checkpoint.family)
    merged = replace(
        model,
        components={**model.components, "unet": list(unet.values())},
        tables=diffusers_configs(family),
        sources=source_files([*checkpoint.states.values(), *(part.state for part in parts[1:])]),
        metadata={
            **model.metadata,
            "family": family.name,
            "source": "{0} + {2} - {1}".format(*names) if others else f"{names[0]} + input channels of zeros",
        },
    )
    write_model(merged, target, layout, dtype, progress=progress)


def _unet(source: str | Path) -> Part:
    path = Path(source)
    return (open_parts(path, ("unet",)) if path.exists() else open_checkpoint(LoadOptions(source=source)).parts)["unet"]


def _added(custom: Items, base: Items, inpaint: Items) -> Items:
    """inpaint + (custom - base): in this order, so that custom = base gives inpaint to the last bit."""

    def item(name: str) -> Item:
        wanted = inpaint[name].shape

        def produce() -> Tensor:
            difference = custom[name].produce().float() - base[name].produce().float()
            if name == FIRST:
                difference = _widened(difference, wanted[1])
            return inpaint[name].produce().float() + difference

        return replace(custom[name], shape=wanted, produce=produce)

    return {name: item(name) for name in custom}


def _widened_item(item: Item) -> Item:
    wide, _, *kernel = item.shape
    return replace(item, shape=(wide, INPAINTING, *kernel), produce=lambda: _widened(item.produce(), INPAINTING))


def _widened(weight: Tensor, channels: int) -> Tensor:
    """weight (C, c, 3, 3) -> (C, channels, 3, 3): zeros after the channels that it has."""
    return torch.cat([weight, weight.new_zeros(len(weight), channels - weight.shape[1], *weight.shape[2:])], dim=1)


def _inpainting(family: Family) -> Family:
    """The family with 9 input channels: its own sizes and schedule, and the name of the released one."""
    name = next(one.name for one in FAMILIES.values() if one.kind == family.kind and one.unet.in_channels == INPAINTING)
    return replace(family, name=name, unet=replace(family.unet, in_channels=INPAINTING))


def _check_alike(parts: list[Part], family: Family) -> None:
    """Compare custom with the base and the inpainting model that it is merged with. Raises: CheckpointError."""
    custom = parts[0].state
    roles = zip(("custom", "base", "inpaint"), parts, (TEXT_TO_IMAGE, TEXT_TO_IMAGE, INPAINTING), strict=False)
    for role, part, channels in roles:
        path, shapes = part.state.weights.path, part.state.shapes()
        if part.layout.family != family.kind:
            hint = "a difference of weights has a meaning only between models that were trained from one"
            raise CheckpointError("CKPT_MISMATCH", path, part.layout.title, expected=f"one of {family.kind}", hint=hint)
        if part.layout.in_channels != channels:
            found = f"{role} has {part.layout.in_channels} input channels"
            raise CheckpointError("CKPT_CHANNELS", path, found, expected=f"{channels}")
        own = custom.shapes()
        odd = [name for name in own.keys() | shapes.keys() if name != FIRST and own.get(name) != shapes.get(name)]
        if odd:
            name = min(odd)
            found = f"{role} differs from custom in {len(odd)} tensors, e.g. {name}: {shapes.get(name, 'missing')}"
            raise CheckpointError("CKPT_MISMATCH", path, found, expected=f"{own.get(name, 'nothing of that name')}")
    if len(parts) > 1 and family.schedule.prediction != "eps":
        found = "a model that predicts v, to be merged with one that predicts noise"
        raise CheckpointError("CKPT_MISMATCH", custom.weights.path, found, expected="a model that predicts noise")
