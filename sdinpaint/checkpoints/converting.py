"""Convert checkpoints to another layout or dtype, tensor by tensor, so that memory does not grow with their size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from sdinpaint_weights.adapter_names import UNET
from sdinpaint_weights.atomic import atomic_folder
from sdinpaint_weights.edits import apply, shape_after
from sdinpaint_weights.export import FILES, Target, export_plan, write_json
from sdinpaint_weights.files import SourceFile
from sdinpaint_weights.native import NativeState
from sdinpaint_weights.stream import Item, not_written, require_space, write_stream
from sdinpaint_weights.targets import nearest_folder, overlap

from sdinpaint.adapters.merging import Merged, read_loras
from sdinpaint.checkpoints.alone import configured
from sdinpaint.checkpoints.building import build, find_dtype, own_tokenizer
from sdinpaint.checkpoints.configs import PAD_TOKENS
from sdinpaint.checkpoints.diffusers_configs import controlnet_json, diffusers_configs
from sdinpaint.checkpoints.embedded import embedded
from sdinpaint.checkpoints.opening import CONTROLNET, Checkpoint, open_checkpoint
from sdinpaint.checkpoints.sources import COMPONENTS, Component, open_parts
from sdinpaint.checks import check_choice, check_path, check_switch
from sdinpaint.errors import CheckpointError, SettingError, TokenizerError, warn
from sdinpaint.families import SD15, TEXT_ENCODERS, TOKENIZERS, TextConfig
from sdinpaint.keywords import knowing_keywords
from sdinpaint.load_options import OPTIONS, LoadOptions, LoraOption
from sdinpaint.paths import as_path
from sdinpaint.progress import progress_bar
from sdinpaint.text.finding import find_tokenizer
from sdinpaint.text.tokenizer import Tokenizer
from sdinpaint.text.vocabulary import CLIP_ROWS
from sdinpaint.version import __version__

__all__ = ["LAYOUTS", "Model", "check_apart", "check_request", "convert", "native_items", "source_files", "write_model"]

LAYOUTS = ("diffusers", "ldm")
PICKLES = (".ckpt", ".pth", ".pt", ".bin")
"""File endings that other programs take for a pickle, a format that is never written here."""
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A model to write: its tensors under native names, none of them read yet, with configuration and tokenizers."""

    path: Path
    """The checkpoint that it is made from; the main one for a merged model."""
    kind: str
    """"sd1", "sd2" or "sdxl"; "sd" for a VAE alone."""
    components: Mapping[str, Sequence[Item]]
    """Component -> its tensors."""
    tables: Mapping[str, Json]
    """The JSON files of a diffusers folder, by their path in it."""
    tokenizers: Mapping[str, tuple[Path | Tokenizer | None, TextConfig]]
    """Folder name in a diffusers folder -> the model's own tokenizer, if it has one, and its text encoder."""
    sources: tuple[SourceFile, ...]
    """All files that tensors are read from."""
    metadata: Mapping[str, str]
    """Further metadata of the written files."""


@knowing_keywords(*OPTIONS)
def convert(
    source: str | Path,
    target: str | Path,
    layout: str | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    ema: bool = False,
    loras: Sequence[Any] = (),
    overwrite: bool = False,
    progress: bool = True,
    **opening: Any,
) -> None:
    """Write a checkpoint in another layout or dtype: as a diffusers folder, or as a single file in the official layout.

    The target replaces an older one when it is complete. Its metadata contains the SHA-256 of the source. Memory does
    not grow with the size of the checkpoint.

    Args:
        source: a source that `load` takes, or a file or folder of a VAE or ControlNet alone.
        target: the file or folder to write.
        layout: "diffusers", or "ldm" for a single file; None chooses "ldm" if the target ends with .safetensors.
        dtype: float32, float16 or bfloat16; None keeps the dtype and every bit of each tensor.
        ema: take the UNet's averaged weights.
        loras: LoRAs to merge into the weights, given as to `load`.
        overwrite: replace the result of an earlier conversion.
        progress: show a progress bar.
        opening: other arguments of `load` with which to open the source: config, vae, base, prediction, variant,
            revision, local_files_only.

    Raises:
        CheckpointError: the source cannot be read, or the target cannot be written.
        AdapterError: a LoRA does not fit the model.
        SettingError: an argument is wrong.
    """
    source, target = check_path("source", source), as_path(check_path("target", target))
    ema, progress = check_switch("ema", ema), check_switch("progress", progress)
    layout, dtype = check_request(target, layout, dtype, (source, *places_of(opening)), overwrite)
    options = LoadOptions(source=source, ema=ema, loras=loras, **opening)
    check_apart(target, (lora.source for lora in options.loras))
    model = None if options.loras else _open_alone(as_path(source), **opening)
    if model is None:
        model = model_of(open_checkpoint(options, progress=progress), ema, options.config, options.loras)
    write_model(model, target, layout, dtype, progress=progress)


def places_of(opening: Mapping[str, Any]) -> list[str | Path]:
    """Return the files and folders among the options with which a checkpoint is opened.

    Args:
        opening: options of `load`.

    Returns:
        Their values.
    """
    return [opening[name] for name in ("config", "vae", "base") if opening.get(name) is not None]


def model_of(
    checkpoint: Checkpoint,
    ema: bool = False,
    config: str | Path | None = None,
    loras: Sequence[LoraOption] = (),
) -> Model:
    """Prepare a checkpoint for writing, after a check of all names and shapes.

    A warning says which tensors and components are left out.

    Args:
        checkpoint: the opened checkpoint.
        ema: whether it was opened with the UNet's averaged weights.
        config: a folder whose tokenizers, if it has any, are used for a single file.
        loras: LoRAs to merge into the weights.

    Returns:
        The model to write.

    Raises:
        AdapterError: a LoRA does not fit the model.
        CheckpointError: names or shapes do not fit.
    """
    networks = {name: network for name, network in build(checkpoint).items() if name in (UNET, *TEXT_ENCODERS)}
    read = read_loras(loras, networks, checkpoint.family.kind)
    merged = Merged(read, networks)
    for sentence in (*checkpoint.notes, *_left_out(checkpoint)):
        warn(f"{checkpoint.path}: {sentence}")
    family, states = checkpoint.family, checkpoint.states
    text = checkpoint.parts["text_encoder"]
    home, inside = text.model or (None if config is None else Path(config)), own_tokenizer(checkpoint)
    return Model(
        path=checkpoint.path,
        kind=family.kind,
        components={
            name: [replace(item, produce=merged(name, item.name, item.produce)) for item in native_items(state)]
            for name, state in states.items()
        },
        tables=diffusers_configs(family),
        tokenizers={
            name: (_own(home, name) or inside, text) for name, text in zip(TOKENIZERS, family.texts, strict=False)
        },
        sources=source_files(states.values()),
        metadata={
            "source": checkpoint.path.name,
            "family": family.name,
            "ema": "yes" if ema or checkpoint.layouts["unet"].ema_only else "no",
            "modelspec.prediction_type": {"eps": "epsilon", "v": "v"}[family.schedule.prediction],
            **({"merged_loras": json.dumps([lora.to_manifest() for lora in read])} if read else {}),
        },
    )


def _own(home: Path | None, name: str) -> Path | None:
    return home / name if home is not None and (home / name).is_dir() else None


def _left_out(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a sentence for each kind of thing in a checkpoint that is not written, constants aside."""
    ends = ("position_ids", "logit_scale", "v_pred")  # the metadata name the prediction
    unused = [key for state in checkpoint.states.values() for key in state.dropped if not key.endswith(ends)]
    if unused:
        yield f"{len(unused)} tensors that the model does not use are left out: {', '.join(unused[:5])}"
    others = {name for layout in checkpoint.layouts.values() for name in layout.components} - {*checkpoint.parts}
    if others:
        yield f"its {' and '.join(sorted(others))} is left out"


def _open_alone(
    path: Path, *, config: str | Path | None = None, variant: str | None = None, **_: object
) -> Model | None:
    """Open a VAE or a ControlNet alone; return None for anything else, which `open_checkpoint` opens or refuses."""
    if not path.exists():
        return None
    parts = open_parts(
        path, (*COMPONENTS, CONTROLNET), config=None if config is None else Path(config), variant=variant
    )
    if [*parts] not in (["vae"], [CONTROLNET]):
        return None
    ((name, part),) = parts.items()
    table = (_vae_table if name == "vae" else _controlnet_table)(part, path)
    kind = part.layout.family
    metadata = {"source": path.name, "family": kind}
    files = source_files([part.state])
    return Model(path, kind, {name: native_items(part.state)}, {"config.json": table}, {}, files, metadata)


def _vae_table(part: Component, path: Path) -> Json:
    config = configured("vae", part, path)
    if part.config.get("scaling_factor") is None:
        found = f"{path}: the scaling factor of its latents is unknown"
        message = f"{found}; {config.scaling_factor} is written, the one of SD1 and SD2 (SDXL has 0.13025)"
        warn(message)
    return diffusers_configs(replace(SD15, vae=config))["vae/config.json"]


def _controlnet_table(part: Component, path: Path) -> Json:
    return controlnet_json(configured(CONTROLNET, part, path))


def native_items(state: NativeState) -> list[Item]:
    """List a component's tensors for writing; each is read when it is written, and no file stays mapped.

    Args:
        state: the component.

    Returns:
        One item for each native name.
    """

    def item(name: str, shape: tuple[int, ...]) -> Item:
        source = state.sources[name]
        return Item(
            name,
            state.weights.dtype(source.key),
            shape,
            lambda: apply(source.edit, [state.weights.copy(source.key)]),
            state.weights.path,
        )

    return [item(name, shape) for name, shape in state.shapes().items()]


def source_files(states: Iterable[NativeState]) -> tuple[SourceFile, ...]:
    """List the files that hold some components.

    Args:
        states: the components.

    Returns:
        The files, each once.
    """
    files = (entry.storage.file for state in states for entry in state.weights.entries.values())
    return tuple({file.path: file for file in files}.values())


def check_request(
    target: Path, layout: str | None, dtype: str | torch.dtype | None, sources: Iterable[str | Path], overwrite: bool
) -> tuple[str, torch.dtype | None]:
    """Check a conversion before any file is read: the layout, the dtype, and that nothing would be destroyed.

    Args:
        target: the file or folder to write.
        layout: "diffusers" or "ldm"; None chooses by the target's name.
        dtype: float32, float16 or bfloat16; None keeps the dtype of each tensor.
        sources: the files and folders to be read; what is no path of this machine is left to `write_model`.
        overwrite: whether an existing target may be replaced.

    Returns:
        Layout and dtype.

    Raises:
        SettingError: the layout, the dtype or the target's name is wrong, or the target overlaps a source.
        CheckpointError: the target exists and may not be replaced.
    """
    wanted = None if dtype is None else find_dtype(dtype)
    named = "ldm" if target.suffix == ".safetensors" else "diffusers"
    overwrite = check_switch("overwrite", overwrite)
    if layout is not None:
        check_choice("layout", layout, LAYOUTS)
    if layout not in (None, named) or target.suffix in PICKLES:
        expected = "a name that ends with .safetensors" if layout == "ldm" else "a folder's name"
        found = f"{str(target)!r} for the layout {layout or named!r}"
        hint = "rename it: one .safetensors file, the layout 'ldm', or a folder, the layout 'diffusers'"
        raise SettingError("SETTING_TARGET", "target", found, expected=expected, hint=hint)
    check_apart(target, sources)
    if target.exists() and (not overwrite or target.is_dir() != (named == "diffusers")):
        found = f"a {'folder' if target.is_dir() else 'file'} of that name exists already"
        hint = "choose another name, or replace one of the same layout: overwrite=True"
        raise CheckpointError("CKPT_EXISTS", target, found, hint=hint)
    return named, wanted


def check_apart(target: Path, sources: Iterable[str | Path]) -> None:
    """Check that writing a target changes nothing of what is read.

    Args:
        target: the file or folder to write.
        sources: files and folders that are read; a name that is no path of this machine is passed over.

    Raises:
        SettingError: the target is a source, under whatever name, or one lies in the other.
    """
    for source in sources:
        if overlap(target, source):
            found = f"{str(target)!r} is, contains or lies in {str(source)!r}, which is read"
            raise SettingError("SETTING_TARGET", "target", found, hint="choose another name")


def write_model(
    model: Model, target: Path, layout: str, dtype: torch.dtype | None = None, *, progress: bool = True
) -> None:
    """Write a model; `check_request` must have accepted the request.

    Args:
        model: the model.
        target: the file or folder to write.
        layout: "diffusers" or "ldm".
        dtype: dtype of the written tensors; None keeps each tensor's own.
        progress: show a progress bar.

    Raises:
        CheckpointError: the target cannot be written, or a value is not finite in `dtype`.
        SettingError: the target is one of the files that the model is read from.
    """
    check_apart(target, (model.path, *(file.path for file in model.sources)))
    components = {name: _planned(name, items, layout, model, dtype) for name, items in model.components.items()}
    _check_replaceable(target, {*map(Path, model.tables), *(_file(name, model) for name in components)})
    size = sum(item.size for items in components.values() for item in items)
    try:
        require_space(nearest_folder(target), size)
        total = size + sum(file.size for file in model.sources)
        with progress_bar(total, f"write {target.name}", "B", show=progress, unit_scale=True) as bar:
            metadata = _metadata(model, layout, bar.update)
            if layout == "ldm":
                write_stream(target, [item for items in components.values() for item in items], metadata, bar.update)
            else:
                _write_folder(model, target, components, metadata, bar.update)
    except CheckpointError:
        raise
    except OSError as error:
        raise not_written(target, error) from error


def _planned(component: str, items: Sequence[Item], layout: str, model: Model, dtype: torch.dtype | None) -> list[Item]:
    """Return the tensors of a component as a layout has them: renamed, stacked and transposed."""
    native = {item.name: item for item in items}

    def item(target: Target) -> Item:
        parts = [native[name] for name in target.names]
        return Item(
            target.key.removeprefix("first_stage_model.") if _is_alone(model) else target.key,
            dtype or reduce(torch.promote_types, (part.dtype for part in parts)),
            shape_after(target.edit, [part.shape for part in parts]),
            lambda: apply(target.edit, [part.produce() for part in parts]),
            parts[0].source,
        )

    shapes = {name: part.shape for name, part in native.items()}
    return [item(target) for target in export_plan(component, shapes, layout, model.kind)]


def _write_folder(
    model: Model,
    target: Path,
    components: Mapping[str, list[Item]],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], object],
) -> None:
    with atomic_folder(target) as folder:
        for name, items in components.items():
            write_stream(folder / _file(name, model), items, metadata, on_bytes)
        for name, table in model.tables.items():
            write_json(folder / name, table)
        for name, (own, text) in model.tokenizers.items():
            _write_tokenizer(folder / name, own, text, target)


def _check_replaceable(target: Path, written: set[Path]) -> None:
    """Check that a folder holds nothing that a conversion would not write."""
    for path in target.rglob("*"):
        name = path.relative_to(target)
        if path.is_file() and name not in written and name.parts[0] not in TOKENIZERS:
            found = f"it holds {str(name)!r}, which a conversion would not write"
            raise CheckpointError(
                "CKPT_EXISTS", target, found, hint="choose another name, or remove the folder yourself"
            )


def _write_tokenizer(folder: Path, own: Path | Tokenizer | None, text: TextConfig, target: Path) -> None:
    if isinstance(own, Tokenizer):
        own.with_padding(text.pad_id).save(folder)
        return
    if own is not None:
        folder.mkdir()
        for file in filter(Path.is_file, own.iterdir()):
            shutil.copyfile(file, folder / file.name)  # not its mode, which may be read-only
        return
    try:
        tokenizer = find_tokenizer(embedding_rows=text.vocab_size, offline=True, pad_id=text.pad_id)
    except TokenizerError as error:
        message = f"{target}: no {folder.name} is written, and transformers needs one: {error.found}"
        warn(f"{message}; copy the model's own tokenizer there")
    else:
        tokenizer.save(folder)


def _metadata(model: Model, layout: str, on_bytes: Callable[[int], object]) -> dict[str, str]:
    """Return the metadata of the written files; `source_sha256` has the format of `sha256sum`."""
    root = model.path if model.path.is_dir() else model.path.parent

    def name(path: Path) -> str:
        return (path.relative_to(root) if path.is_relative_to(root) else Path(path.name)).as_posix()

    return {
        "format": "pt",
        "made_by": f"sdinpaint {__version__}",
        "source_sha256": "\n".join(f"{file.sha256(on_bytes)}  {name(file.path)}" for file in model.sources),
        "layout": layout,
        **model.metadata,
        **(_embedded(model) if layout == "ldm" else {}),
    }


def _embedded(model: Model) -> dict[str, str]:
    """Return the metadata that hold what a folder has beside the weights; a file that has no room for them needs it."""
    alone = next(iter(model.components)) if _is_alone(model) else None
    tables = {name if alone is None else f"{alone}/{name}": table for name, table in model.tables.items()}
    for name, (_, encoder) in model.tokenizers.items():
        tables[f"{name}/special_tokens_map.json"] = {"pad_token": PAD_TOKENS[encoder.pad_id]}
    own, text = next(iter(model.tokenizers.values()), (None, None))
    foreign = text is not None and text.vocab_size != CLIP_ROWS
    if isinstance(own, Path):
        own = Tokenizer.from_folder(own) if foreign else None
    return embedded(tables, (dict(own.vocab), list(own.merges)) if foreign and own is not None else None)


def _file(component: str, model: Model) -> Path:
    """Return the path of a component's weights in a diffusers folder."""
    path = Path(FILES[component])
    return Path(path.name) if _is_alone(model) else path


def _is_alone(model: Model) -> bool:
    return len(model.components) == 1
