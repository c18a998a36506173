"""Write components with native names as a diffusers folder, or as a single file in the official layout (LDM).

`export_plan` lists how each tensor of the target is made, from names and shapes alone; all writers follow it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from sdinpaint_weights.atomic import atomic_write
from sdinpaint_weights.edits import apply
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.keymap import QKV, TABLES_FOR, Edit, inverse, renamed
from sdinpaint_weights.layout import MARKS, Mark
from sdinpaint_weights.openclip import openclip_table_for
from sdinpaint_weights.stream import Item, not_written, write_stream

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Place = Callable[[str], tuple[str, Edit] | None]
"""A function from a native name to its key in the target, with the edit that turns the target's tensor into ours."""

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
    "controlnet": "diffusion_pytorch_model.safetensors",  # published by itself, beside its config.json
}
"""Component -> its weights file in a diffusers folder."""


class Target(NamedTuple):
    """One tensor to write: its key, the native names that it is made of, and the edit that makes it."""

    key: str
    names: tuple[str, ...]
    """One name; for stacked rows the names of q, k and v."""
    edit: Edit


def export_plan(component: str, shapes: Shapes, layout: str, family: str) -> list[Target]:
    """Plan how to write a component in another layout.

    Args:
        component: "unet", "vae", "text_encoder", "text_encoder_2" or "controlnet".
        shapes: native name -> shape.
        layout: "diffusers" or "ldm".
        family: "sd1", "sd2" or "sdxl"; in the layout "ldm" it decides the text encoders' prefix and names.

    Returns:
        One target for each tensor to write.

    Raises:
        CheckpointError: a name has no counterpart in the layout.
    """
    place = _diffusers_place(component, shapes) if layout == "diffusers" else _ldm_place(component, shapes, family)
    parts: dict[str, dict[Edit, str]] = {}
    for name in shapes:
        found = place(name)
        if found is None:
            _refuse_names(component, f"{name} has no name in the {layout} layout of {family.upper()}")
        key, edit = found
        parts.setdefault(key, {})[edit] = name
    return [_target(component, key, names) for key, names in parts.items()]


def diffusers_state(component: str, tensors: Tensors) -> dict[str, Tensor]:
    """Rename a component's tensors as diffusers does, and those of text encoders as transformers does.

    Args:
        component: "unet", "vae", "text_encoder", "text_encoder_2" or "controlnet".
        tensors: native name -> tensor.

    Returns:
        diffusers' name -> tensor.

    Raises:
        CheckpointError: a name has no counterpart.
    """
    return _state(export_plan(component, _shapes(tensors), "diffusers", ""), tensors)


def ldm_state(components: Mapping[str, Tensors], family: str) -> dict[str, Tensor]:
    """Rename all tensors as in the official single files of a family.

    Args:
        components: component -> {native name: tensor}.
        family: "sd1", "sd2" or "sdxl".

    Returns:
        Official name -> tensor, for all components together.

    Raises:
        CheckpointError: the family's files have no such component, or a name has no counterpart.
    """
    state: dict[str, Tensor] = {}
    for component, tensors in components.items():
        state |= _state(export_plan(component, _shapes(tensors), "ldm", family), tensors)
    return state


def write_diffusers(
    folder: str | os.PathLike[str],
    components: Mapping[str, Tensors],
    configs: Mapping[str, Mapping[str, object]],
    dtype: torch.dtype | None = None,
) -> None:
    """Write components as a diffusers folder.

    Each file is written atomically. The JSON files are written last, so that an interrupted folder is not mistaken for
    a complete one.

    Args:
        folder: the folder to write to.
        components: component -> {native name: tensor}.
        configs: relative path -> JSON table.
        dtype: dtype of the written tensors; None keeps each tensor's own.

    Raises:
        CheckpointError: a name has no counterpart, a file cannot be written, or a value is not finite in `dtype`.
    """
    for component, tensors in components.items():
        _save(diffusers_state(component, tensors), Path(folder, FILES[component]), dtype)
    for name, config in configs.items():
        write_json(Path(folder, name), config)


def write_single_file(
    path: str | os.PathLike[str],
    components: Mapping[str, Tensors],
    family: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write components as a single safetensors file in the official layout of a family.

    Args:
        path: the file to write; its ending does not matter.
        components: component -> {native name: tensor}.
        family: "sd1", "sd2" or "sdxl".
        dtype: dtype of the written tensors; None keeps each tensor's own.

    Raises:
        CheckpointError: a name has no counterpart, the file cannot be written, or a value is not finite in `dtype`.
    """
    _save(ldm_state(components, family), Path(path), dtype)


def _diffusers_place(component: str, shapes: Shapes) -> Place:
    if component not in TABLES_FOR:
        return lambda name: (name, Edit.AS_IS)
    table = inverse(TABLES_FOR[component](shapes))

    def place(name: str) -> tuple[str, Edit] | None:
        key = renamed(name, table)
        # The VAE's attention consists of four 1 x 1 convolutions in LDM, and of four linear layers in diffusers.
        linear = component == "vae" and key is not None and ".attentions." in key and shapes[name][2:] == (1, 1)
        return None if key is None else (key, Edit.CONVOLUTION if linear else Edit.AS_IS)

    return place


def _ldm_place(component: str, shapes: Shapes, family: str) -> Place:
    mark = next((mark for mark in MARKS if _writes(mark, component, family)), None)
    if mark is None:
        _refuse_names(component, f"the single files of {family.upper()} hold no such component")
    table = openclip_table_for(shapes) if mark.naming == "openclip" else {name: (name, Edit.AS_IS) for name in shapes}
    return lambda name: (mark.prefix + table[name][0], table[name][1]) if name in table else None


def _writes(mark: Mark, component: str, family: str) -> bool:
    return (
        mark.component == component and mark.prefix != "" and mark.naming != "diffusers" and mark.family in ("", family)
    )


def _target(component: str, key: str, names: Mapping[Edit, str]) -> Target:
    """Return the target of a key; `names` holds its native names by the edit from the target's tensor to theirs."""
    if set(names) == set(QKV):
        return Target(key, tuple(names[edit] for edit in QKV), Edit.STACKED)
    ((edit, name),) = list(names.items())[:1]
    if edit in QKV:
        _refuse_names(component, f"{name} without the others of {key}")
    return Target(key, (name,), edit.inverse)


def _state(plan: list[Target], tensors: Tensors) -> dict[str, Tensor]:
    return {target.key: apply(target.edit, [tensors[name] for name in target.names]) for target in plan}


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _refuse_names(component: str, found: str) -> NoReturn:
    raise CheckpointError("CKPT_KEYS", component, found, hint="write another layout, or leave the component out")


def _save(tensors: Tensors, path: Path, dtype: torch.dtype | None) -> None:
    write_stream(path, [_item(name, tensor, dtype) for name, tensor in tensors.items()], {"format": "pt"})


def _item(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Item:
    return Item(name, dtype or tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_json(path: Path, config: Mapping[str, object]) -> None:
    """Write a table as JSON, whole or not at all.

    Args:
        path: the file; its folder is made if need be.
        config: the table.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")
    except OSError as error:
        raise not_written(path, error) from error
