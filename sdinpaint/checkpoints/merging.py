"""Make inpainting models from text-to-image models: by zero input channels, or by adding a difference of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sdinpaint_weights.stream import Item
from torch import Tensor

from sdinpaint.checkpoints.converting import (
    check_request,
    model_of,
    native_items,
    places_of,
    source_files,
    write_model,
)
from sdinpaint.checkpoints.diffusers_configs import diffusers_configs
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.checkpoints.sources import Component, open_parts
from sdinpaint.checks import check_path
from sdinpaint.errors import CheckpointError, SettingError, said
from sdinpaint.families import FAMILIES, Family
from sdinpaint.keywords import knowing_keywords
from sdinpaint.load_options import OPTIONS, LoadOptions
from sdinpaint.models import UNet
from sdinpaint.paths import as_path

__all__ = ["to_inpainting", "widen_input"]

FIRST = "input_blocks.0.0.weight"
TEXT_TO_IMAGE, INPAINTING = 4, 9
"""Input channels of UNets: noisy latents 4; for inpainting also the mask 1 and the masked image's latents 4."""

Items = Mapping[str, Item]


@torch.no_grad()
def widen_input(unet: UNet) -> UNet:
    """Add the five input channels of inpainting to a UNet, as a start for training.

    The weights of the new channels are zero, so that mask and masked image have no effect yet. All other weights are
    shared with the given UNet.

    Args:
        unet: a UNet with 4 input channels.

    Returns:
        A UNet with 9 input channels.

    Raises:
        SettingError: the UNet does not have 4 input channels.
    """
    if unet.config.in_channels != TEXT_TO_IMAGE:
        found, expected = f"a UNet of {unet.config.in_channels} input channels", f"{TEXT_TO_IMAGE}: text to image"
        raise SettingError("SETTING_UNET", "unet", found, expected=expected)
    with torch.device("meta"):
        wide = UNet(replace(unet.config, in_channels=INPAINTING))
    state = unet.state_dict()
    wide.load_state_dict(state | {FIRST: _widened(state[FIRST], INPAINTING)}, strict=True, assign=True)
    return wide.train(unet.training)


@knowing_keywords(*OPTIONS)
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
    """Write an inpainting checkpoint made from a text-to-image checkpoint.

    With `base` and `inpaint`, the UNet becomes custom + inpaint - base, with the weights of `inpaint` for the five new
    input channels. With neither, these weights are zero, as a start for training. VAE and text encoders are those of
    `custom`. Sources may have any layout and dtype. The sum is computed in float32, tensor by tensor.

    Args:
        custom: the text-to-image checkpoint.
        target: a .safetensors file, or else a diffusers folder, to write.
        base: the model that `custom` was trained from.
        inpaint: the inpainting model of that base.
        dtype: float32, float16 or bfloat16; None keeps the dtypes of `custom`.
        overwrite: replace an existing target.
        progress: show a progress bar.
        opening: other arguments of `load` with which to open `custom`.

    Raises:
        CheckpointError: a source cannot be read, the sources do not fit each other, or the target cannot be written.
        SettingError: an argument is wrong, or only one of `base` and `inpaint` is given.
    """
    target = as_path(check_path("target", target))
    given = {"custom": custom, "base": base, "inpaint": inpaint}
    sources = [check_path(name, source) for name, source in given.items() if source is not None or name == "custom"]
    if len(sources) == 2:
        found = f"base={said(base)}, inpaint={said(inpaint)}"
        expected = "both, or neither to add input channels of zeros"
        raise SettingError("SETTING_MERGE", "base and inpaint", found, expected=expected)
    layout, dtype = check_request(target, None, dtype, (*sources, *places_of(opening)), overwrite)
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


def _unet(source: str | Path) -> Component:
    path = Path(source)
    return (open_parts(path, ("unet",)) if path.exists() else open_checkpoint(LoadOptions(source=source)).parts)["unet"]


def _added(custom: Items, base: Items, inpaint: Items) -> Items:
    """Return inpaint + (custom - base), in this order so that custom = base gives exactly inpaint."""

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
    """Append input channels of zeros: weight (C, c, 3, 3) -> (C, channels, 3, 3)."""
    return torch.cat([weight, weight.new_zeros(len(weight), channels - weight.shape[1], *weight.shape[2:])], dim=1)


def _inpainting(family: Family) -> Family:
    """Return the family with 9 input channels, under the name of the released inpainting family."""
    name = next(one.name for one in FAMILIES.values() if one.kind == family.kind and one.unet.in_channels == INPAINTING)
    return replace(family, name=name, unet=replace(family.unet, in_channels=INPAINTING))


def _check_alike(parts: list[Component], family: Family) -> None:
    """Check that the base and the inpainting model have the family, channels and shapes that `custom` needs."""
    custom = parts[0].state
    roles = zip(("custom", "base", "inpaint"), parts, (TEXT_TO_IMAGE, TEXT_TO_IMAGE, INPAINTING), strict=False)
    for role, part, channels in roles:
        path, shapes = part.state.weights.path, part.state.shapes()
        if part.layout.family != family.kind:
            hint = "only models that were trained from the same base can be merged"
            raise CheckpointError(
                "CKPT_MISMATCH", path, part.layout.title, expected=f"a model of {family.kind}", hint=hint
            )
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
