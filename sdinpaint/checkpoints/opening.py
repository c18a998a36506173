"""Open a checkpoint: its family, its components and whether they fit, concluded before any tensor is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sdinpaint_weights.layout import Layout
from sdinpaint_weights.native import NativeState, outside_keys

from sdinpaint.checkpoints.config_files import (
    config_notes,
    refuse_last_block,
    refuse_other_controlnets,
    require_configs,
    tokenizer_configs,
)
from sdinpaint.checkpoints.config_values import switch, whole_number
from sdinpaint.checkpoints.configs import pad_id, text_config, unet_config, vae_config
from sdinpaint.checkpoints.control_config import controlnet_config
from sdinpaint.checkpoints.prediction import Evidence, find_prediction, has_marker
from sdinpaint.checkpoints.schedule_buffers import check_buffers
from sdinpaint.checkpoints.schedule_config import schedule_config
from sdinpaint.checkpoints.sources import COMPONENTS, Component, open_parts
from sdinpaint.errors import CheckpointError
from sdinpaint.families import FAMILIES, TEXT_ENCODERS, TOKENIZERS, ControlNetConfig, Family, Prediction
from sdinpaint.load_options import LoadOptions
from sdinpaint.paths import Json, as_path, read_json

__all__ = ["CONTROLNET", "DEMO", "Checkpoint", "open_checkpoint"]

DEMO = Path(__file__).parents[1] / "demo"
CONTROLNET = "controlnet"
INDEX = "model_index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found and identified; none of its tensors has been read."""

    path: Path
    parts: Mapping[str, Component]
    family: Family
    prediction: Evidence
    """The prediction of the UNet, noise or v, with the reason."""
    notes: tuple[str, ...]
    """Sentences about what was chosen on the caller's behalf, or left out."""
    outside: tuple[str, ...]
    """Keys of the file that belong to no component."""
    controlnet: ControlNetConfig | None = None

    @property
    def folder(self) -> Path | None:
        """The diffusers folder; None for a single file."""
        return self.path if self.path.is_dir() else None

    @property
    def states(self) -> dict[str, NativeState]:
        """The tensors of each component under native names, not yet read."""
        return {name: part.state for name, part in self.parts.items()}

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layout of the file that each component comes from, concluded from the names in it."""
        return {name: part.layout for name, part in self.parts.items()}


def open_checkpoint(options: LoadOptions, *, progress: bool = True) -> Checkpoint:
    """Find and understand a checkpoint, reading only headers.

    Args:
        options: which files make up the model.
        progress: show a bar while files are fetched from the hub.

    Returns:
        The checkpoint, of which no tensor has been read.

    Raises:
        CheckpointError: the checkpoint cannot be found or understood, or is no whole model.
    """
    variant, ema = options.variant, options.ema
    find = partial(_existing, variant=variant, local_files_only=options.local_files_only, progress=progress)
    path, configs = find(options.source, revision=options.revision), _config_folder(options.config)
    parts = open_parts(path, config=configs, ema=ema, variant=variant)
    first = next(iter(parts.values()))
    outside = () if path.is_dir() else outside_keys(first.state.weights, first.layout)
    places = dict.fromkeys(parts, path)
    supplied: Mapping[str, Component] = {}
    if options.base is not None:
        place = find(options.base, tuple(name for name in COMPONENTS if name not in parts))
        supplied = open_parts(place, config=configs, ema=ema and "unet" not in parts, variant=variant)
        supplied = {name: part for name, part in supplied.items() if name not in parts}
        parts = parts | supplied
        places |= dict.fromkeys(supplied, place)
    if options.vae is not None:
        place = find(options.vae, ("vae",))
        config = None if place.is_dir() else configs
        parts |= open_parts(place, ("vae",), config=config, beside=path if path.is_dir() else None, variant=variant)
        places["vae"] = place
    _require(parts, ["unet"], path)
    unet = parts["unet"]
    weights = unet.state.weights

    def table(name: str) -> Json:
        if configs is not None:
            return read_json(configs / name)
        # a UNet alone has no settings of its own; those of the model that supplies the rest are used, too
        return next(filter(None, (part.table(name) for part in (unet, *supplied.values()))), {})

    scheduler, index = table("scheduler/scheduler_config.json"), table(INDEX)
    evidence = find_prediction(options.prediction, scheduler, weights.path, weights.metadata, weights)
    trained = _released(unet.layout, evidence.prediction)
    _require(parts, list(trained.components), path)
    used = {name: parts[name] for name in trained.components}
    require_configs(used, places, scheduler)
    tokenizers = {} if options.tokenizer is not None else tokenizer_configs(parts, configs)
    family = _family(trained, parts, scheduler, index, tokenizers, evidence, path)
    control = None
    if options.controlnet is not None:
        place = find(options.controlnet, (CONTROLNET,))
        used |= open_parts(place, (CONTROLNET,), variant=variant)
        places[CONTROLNET] = place
        part = used[CONTROLNET]
        refuse_other_controlnets(part, place)
        require_configs({CONTROLNET: part}, places)
        control = controlnet_config(part.state.shapes(), part.config, family.unet, place)
    rescaled = check_buffers(weights, family.schedule)
    _require_variant(variant, used, path)
    to_zero = rescaled or bool(scheduler.get("rescale_betas_zero_snr")) or has_marker(weights, "ztsnr")
    family = replace(family, schedule=replace(family.schedule, zero_snr=to_zero))
    files = {f"{name}/config.json": part.config for name, part in used.items()}
    files |= {"scheduler/scheduler_config.json": scheduler}
    files |= {f"{name}/tokenizer_config.json": table for name, (table, _) in tokenizers.items()}
    notes = (*_notes(used, family, evidence, outside), *config_notes(files, family, trained))
    return Checkpoint(path, used, family, evidence, notes, outside, control)


def _released(layout: Layout, prediction: Prediction | None) -> Family:
    """Return the released family that is closest to a UNet; the first such family where the prediction is unknown."""
    alike = [family for family in FAMILIES.values() if family.kind == layout.family]
    fitting = [family for family in alike if family.unet.in_channels == layout.in_channels] or alike
    return next((family for family in fitting if family.schedule.prediction == prediction), fitting[0])


def _family(
    base: Family,
    parts: Mapping[str, Component],
    scheduler: Json,
    index: Json,
    tokenizers: Mapping[str, tuple[Json, Json]],
    evidence: Evidence,
    path: Path,
) -> Family:
    """Return `base` with the sizes of the weights and the values of the JSON files."""
    shapes = {name: part.state.shapes() for name, part in parts.items()}
    jsons = {name: part.config for name, part in parts.items()}
    texts = [
        text_config(shapes[name], jsons[name], text, path)
        for name, text in zip(TEXT_ENCODERS, base.texts, strict=False)
    ]
    refuse_last_block(parts["text_encoder"], texts[0], path)
    nothing: tuple[Json, Json] = ({}, {})
    texts = [
        replace(text, pad_id=pad_id(*tokenizers.get(name, nothing), text, path))
        for name, text in zip(TOKENIZERS, texts, strict=False)
    ]
    schedule = schedule_config(scheduler, base.schedule, path)
    return replace(
        base,
        unet=unet_config(shapes["unet"], jsons["unet"], base.unet, path),
        vae=vae_config(shapes["vae"], jsons["vae"], base.vae, path),
        text=texts[0],
        text_2=texts[1] if len(texts) > 1 else None,
        schedule=replace(schedule, prediction=evidence.prediction or base.schedule.prediction),
        size=8 * whole_number(jsons["unet"], "sample_size", base.size // 8, path),
        zeros_for_none=base.zeros_for_none and switch(index, "force_zeros_for_empty_prompt", True, path),
    )


def _require(parts: Mapping[str, Component], components: Iterable[str], path: Path) -> None:
    missing = [name for name in components if name not in parts]
    if missing:
        what = next(iter(parts.values())).layout.title if not path.is_dir() else "a folder with part of a model"
        found = f"{what}: it holds no {' and no '.join(missing)}"
        hint = "name a model that supplies what is missing: base=FILE_OR_FOLDER"
        raise CheckpointError("CKPT_NO_COMPONENT", path, found, expected="a whole model", hint=hint)


def _require_variant(variant: str | None, parts: Mapping[str, Component], path: Path) -> None:
    """Check that some component has the variant; the others' weights are those without one, which their notes say."""
    if variant is None or any(part.state.weights.variant == variant for part in parts.values()):
        return
    found = f"no component has weights of the variant {variant!r}"
    there = ", ".join(dict.fromkeys(part.state.weights.path.name for part in parts.values()))
    raise CheckpointError("CKPT_VARIANT", path, found, expected=f"one of: {there}", hint="leave out variant=")


def _notes(parts: Mapping[str, Component], family: Family, evidence: Evidence, outside: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each choice that a caller may not have intended."""
    if outside:
        yield f"{len(outside)} tensors belong to no model and are ignored: {', '.join(outside[:5])}"
    yield from dict.fromkeys(note for part in parts.values() for note in part.state.notes)
    if evidence.prediction is None and family.kind == "sd2" and family.unet.in_channels == family.unet.out_channels:
        yield f"{evidence.why}; taken as noise. For a model trained at 768 pixels give prediction='v'"
    if family.schedule.zero_snr:
        yield "it was trained down to no signal at all, which is not built: runs start a little above that"


def _config_folder(config: str | Path | None) -> Path | None:
    if config is None:
        return None
    folder = as_path(config)
    if not os.path.isdir(folder):
        expected = "config= names a folder of JSON files"
        raise CheckpointError("CKPT_NOT_FOUND", folder, "no such folder", expected=expected)
    files = [*(f"{name}/config.json" for name in COMPONENTS), "scheduler/scheduler_config.json"]
    if not any((folder / name).is_file() for name in files):
        found, expected = "a folder with none of the JSON files", ", ".join(files)
        raise CheckpointError("CKPT_BAD_CONFIG", config, found, expected=expected)
    return folder


def _existing(source: str | Path, components: tuple[str, ...] = COMPONENTS, **hub: Any) -> Path:
    """Return the file or folder that a source names; a model of the hub is fetched, as far as `components` need it."""
    path = DEMO if str(source) == "demo" else as_path(source)
    if path.name == INDEX and os.path.isfile(path):
        return path.parent
    if os.path.lexists(path):
        return path
    from sdinpaint.hub import fetch, is_hub_id  # noqa: PLC0415 - what is on this machine need not wait for it

    if isinstance(source, str) and is_hub_id(source):
        return fetch(source, components, **hub)
    expected = "a .safetensors or .ckpt file, a diffusers folder, a model of the hub ('owner/name'), or 'demo'"
    raise CheckpointError("CKPT_NOT_FOUND", source, "no such file or folder", expected=expected, hint="check the path")
