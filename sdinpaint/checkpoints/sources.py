"""Find the components in a file or folder, each with its configuration; only headers of weights files are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdinpaint_weights.folder import open_folder_component, weights_files
from sdinpaint_weights.layout import Layout, identify, require_family
from sdinpaint_weights.native import NativeState, native_state
from sdinpaint_weights.reader import open_weights
from sdinpaint_weights.weights import Weights

from sdinpaint.checkpoints.embedded import embedded_tables
from sdinpaint.errors import CheckpointError
from sdinpaint.families import KINDS
from sdinpaint.paths import Json, read_json

__all__ = ["COMPONENTS", "Component", "open_parts"]

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Component:
    """One component of a checkpoint."""

    state: NativeState
    """Its tensors under native names, not yet read."""
    layout: Layout
    """The layout of its weights file."""
    config: Json
    """Its config.json; empty where there is none."""
    model: Path | None
    """The diffusers folder of the model that it belongs to; None for other files."""

    def table(self, name: str) -> Json:
        """Read a JSON file of the model that it belongs to.

        Args:
            name: path of the file in a diffusers folder.

        Returns:
            The table in that folder, or else in the metadata of its own file; empty where neither has it.

        Raises:
            CheckpointError: the file is not JSON, not a table, or too large.
        """
        if self.model is not None:
            return read_json(self.model / name)
        return embedded_tables(self.state.weights).get(name, {})


def open_parts(
    path: Path,
    components: Sequence[str] = COMPONENTS,
    *,
    config: Path | None = None,
    beside: Path | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> dict[str, Component]:
    """Open the components in a file, in a model's diffusers folder, or in a component's own folder.

    Args:
        path: the file or folder.
        components: names of the components to look for.
        config: a folder whose JSON files are used instead of those of the weights.
        beside: a folder whose JSON files are used for a file that holds none itself.
        ema: take the UNet's averaged weights.
        variant: weights variant of a folder, such as "fp16".

    Returns:
        Name -> component, for those that exist.

    Raises:
        CheckpointError: none of the components exists, or a file is damaged or not supported.
    """
    if not path.is_dir():
        own = path.parent if weights_files([path.name]) and (path.parent / "config.json").is_file() else None
        model = None if own is None else _model_around(own)
        return _parts(open_weights(path), components, ema, config, own=own, beside=beside, model=model)
    folders = {name: path / name for name in components if (path / name).is_dir()}
    if not folders and weights_files([entry.name for entry in path.iterdir()], variant):
        weights = open_folder_component(path, variant)
        return _parts(weights, components, ema, config, own=path, model=_model_around(path))
    parts: dict[str, Component] = {}
    for name, folder in folders.items():
        parts |= _parts(open_folder_component(folder, variant), [name], ema, config or path, model=path)
    if not parts:
        found, expected = f"a folder without {', '.join(components)}", "a diffusers folder, or the file of a model"
        raise CheckpointError("CKPT_NO_COMPONENT", path, found, expected=expected, hint="give the model's own folder")
    return parts


def _model_around(folder: Path) -> Path | None:
    """Return the diffusers folder in which a component's own folder is; None where it is in none."""
    return folder.parent if (folder.parent / "model_index.json").is_file() else None


def _parts(
    weights: Weights,
    components: Sequence[str],
    ema: bool,
    config: Path | None,
    *,
    own: Path | None = None,
    beside: Path | None = None,
    model: Path | None = None,
) -> dict[str, Component]:
    """Return the components of a weights file, each with its configuration.

    It is in the folder `config` of a model, or else in the component's `own`, in the file itself, or `beside` it.
    """
    layout = identify(weights.shapes())
    if layout.components != ("vae",):  # a VAE with other latents is refused when it is compared with its UNet
        require_family(layout, weights.path, (*KINDS, "sd"))
    inside, alone = embedded_tables(weights), len(layout.components) == 1

    def table(name: str) -> Json:
        if config is not None:
            return read_json(config / name / "config.json")
        if own is not None and alone:
            return read_json(own / "config.json")
        if f"{name}/config.json" in inside:
            return inside[f"{name}/config.json"]
        return {} if beside is None else read_json(beside / name / "config.json")

    parts = {}
    for name in components:
        if name in layout.components:
            state = native_state(weights, name, layout, ema=ema and name == "unet")
            parts[name] = Component(state, layout, table(name), model)
    if not parts:
        found = f"{layout.title}: it holds no {' and no '.join(components)}"
        raise CheckpointError("CKPT_NO_COMPONENT", weights.path, found, hint="give a file that does")
    return parts
