"""Weights of a part of a model, and settings alone: their configuration, and what they serve as beside a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdinpaint.checkpoints import built_values
from sdinpaint.checkpoints.building import build_models
from sdinpaint.checkpoints.config_files import refuse_other_controlnets, require_configs
from sdinpaint.checkpoints.configs import text_config, unet_config, vae_config
from sdinpaint.checkpoints.control_config import controlnet_config
from sdinpaint.checkpoints.opening import CONTROLNET
from sdinpaint.checkpoints.schedule_config import schedule_config
from sdinpaint.checkpoints.sources import Component
from sdinpaint.families import FAMILIES, SD15, TEXT_ENCODERS, Family
from sdinpaint.paths import read_json
from sdinpaint.text.vocabulary import read_vocabulary

__all__ = ["SERVES_AS", "SETTINGS_FILES", "configured", "settings_serve_as"]

SERVES_AS = {
    "unet": "as a model, with base=MODEL for its VAE and text encoder (on the command line --base MODEL)",
    "vae": "beside a model, as vae=PATH (on the command line --vae PATH)",
    CONTROLNET: "beside a model, as controlnet=PATH (on the command line --controlnet PATH)",
    "text_encoder": "beside a UNet alone, as base=PATH (on the command line --base PATH)",
    "text_encoder_2": "beside a UNet alone, as base=PATH (on the command line --base PATH)",
}
"""Component -> the argument of `load` as which it serves, in words; the first one that a file has counts."""
SCHEDULER, VOCABULARIES = "scheduler_config.json", ("vocab.json", "tokenizer.json")
SETTINGS_FILES = (SCHEDULER, *VOCABULARIES)


def configured(name: str, part: Component, path: Path) -> Any:
    """Find the configuration of a component alone, and check that every name and shape fits it.

    Args:
        name: name of the component.
        part: the component.
        path: the file or folder that errors name.

    Returns:
        The configuration of its network.

    Raises:
        CheckpointError: names, shapes or the configuration do not fit, or are not built.
    """
    require_configs({name: part}, {name: path})
    config = _CONFIGURE[name](part, _released(part), path)
    build_models({name: config}, {name: part.state})
    return config


def settings_serve_as(path: Path) -> str | None:
    """Say what a folder or file of settings serves as.

    Args:
        path: the folder of a scheduler or a tokenizer, or a file in it.

    Returns:
        The argument of `load`, in words; None where the path holds no such settings.

    Raises:
        CheckpointError: a noise schedule that is not built.
        TokenizerError: a damaged vocabulary.
    """
    folder = path if path.is_dir() else path.parent
    names = SETTINGS_FILES if path.is_dir() else (path.name,)
    if SCHEDULER in names and (folder / SCHEDULER).is_file():
        schedule_config(read_json(folder / SCHEDULER), SD15.schedule, folder / SCHEDULER)
        place = f"config={folder.parent}" if folder.name == "scheduler" else "config=FOLDER, as FOLDER/scheduler"
        return f"beside a model, as {place} (on the command line --config FOLDER)"
    if any(name in names and (folder / name).is_file() for name in VOCABULARIES):
        read_vocabulary(path)
        return "beside a model, as tokenizer=PATH (on the command line --tokenizer PATH)"
    return None


def _released(part: Component) -> Family:
    """Return a released family of the kind of a component; a VAE alone is the same in all of them."""
    return next((family for family in FAMILIES.values() if family.kind == part.layout.family), SD15)


def _unet(part: Component, family: Family, path: Path) -> Any:
    return unet_config(part.state.shapes(), part.config, family.unet, path)


def _vae(part: Component, family: Family, path: Path) -> Any:
    return vae_config(part.state.shapes(), part.config, family.vae, path)


def _controlnet(part: Component, family: Family, path: Path) -> Any:
    # The UNet that it is for is not available, but the sizes of its down path are the same.
    refuse_other_controlnets(part, path)
    shapes = part.state.shapes()
    sizes = {**shapes, "out.2.weight": (family.unet.out_channels,)}
    unet = unet_config(sizes, part.config, family.unet, path, built_values.CONTROLNET)
    return controlnet_config(shapes, part.config, unet, path)


def _text(number: int) -> Callable[[Component, Family, Path], Any]:
    def configure(part: Component, family: Family, path: Path) -> Any:
        texts = family.texts if number < len(family.texts) else FAMILIES["sdxl"].texts
        return text_config(part.state.shapes(), part.config, texts[number], path)

    return configure


_CONFIGURE: Mapping[str, Callable[[Component, Family, Path], Any]] = {
    "unet": _unet,
    "vae": _vae,
    CONTROLNET: _controlnet,
    **{name: _text(number) for number, name in enumerate(TEXT_ENCODERS)},
}
