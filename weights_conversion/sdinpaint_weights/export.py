"""Write components under native names as a diffusers folder, or as one file in the official layout (LDM)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sdinpaint_weights.atomic import atomic_write
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.finite import is_finite, nonfinite_error
from sdinpaint_weights.keymap import inverse, renamed, unet_table_for, vae_table_for

Tensors = Mapping[str, Tensor]

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def write_diffusers(
    folder: str | os.PathLike[str],
    components: Mapping[str, Tensors],
    configs: Mapping[str, Mapping[str, object]],
    dtype: torch.dtype | None = None,
) -> None:
    """Write {"unet": {native name: tensor}, "vae": ..., "text_encoder": ...} and {relative path: JSON table}.

    Each file is whole or not there; the configurations come last, so that an interrupted folder is not taken for one.

    Raises: CheckpointError, also for NaN and for values that `dtype` cannot hold.
    """
    for component, tensors in components.items():
        _save(diffusers_state(component, tensors), Path(folder, FILES[component]), dtype)
    for name, config in configs.items():
        _save_json(Path(folder, name), config)


def write_single_file(
    path: str | os.PathLike[str], components: Mapping[str, Tensors], dtype: torch.dtype | None = None
) -> None:
    """Write the components as one safetensors file in the official layout, whatever `path` ends with.

    Raises: CheckpointError.
    """
    _save(ldm_state(components), Path(path), dtype)


def ldm_state(components: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """All tensors under the names of the official single files."""
    return {
        PREFIXES[component] + name: tensor
        for component, tensors in components.items()
        for name, tensor in tensors.items()
    }


def diffusers_state(component: str, tensors: Tensors) -> dict[str, Tensor]:
    """One component under the names that diffusers (transformers, for the text encoder) gives it.

    Raises: CheckpointError for a name that has no counterpart.
    """
    if component == "text_encoder":
        return dict(tensors)
    table = inverse((unet_table_for if component == "unet" else vae_table_for)(tensors))
    state = {}
    for name, tensor in tensors.items():
        renamed_to = renamed(name, table)
        if renamed_to is None:
            found = f"{name} has no name in the diffusers layout"
            raise CheckpointError("CKPT_KEYS", component, found, hint="write a single file instead")
        # The VAE's attention is four 1 x 1 convolutions in LDM, and four linear layers in diffusers.
        linear = component == "vae" and ".attentions." in renamed_to and tensor.ndim == 4
        state[renamed_to] = tensor[:, :, 0, 0] if linear else tensor
    return state


def _save(tensors: Tensors, path: Path, dtype: torch.dtype | None) -> None:
    ready = {}
    for name, tensor in tensors.items():
        # A copy is made only where the dtype or the order in memory calls for one.
        ready[name] = tensor.detach().to("cpu", dtype).contiguous()
        if not is_finite(ready[name]):
            raise nonfinite_error(path, name, ready[name], tensor)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(ready, temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _write_error(path, error) from error


def _save_json(path: Path, config: Mapping[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: Exception) -> CheckpointError:
    hint = "check the disk's free space and the folder's permissions; what was there before is unchanged"
    return CheckpointError("CKPT_NOT_WRITTEN", path, f"could not be written: {error}", hint=hint)
