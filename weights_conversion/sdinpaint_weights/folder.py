"""Open the weights in a component's folder of the diffusers layout: a single file, or shards with an index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.files import FETCH_AGAIN, SourceFile, size_text
from sdinpaint_weights.reader import open_weights
from sdinpaint_weights.weights import Entry, Weights
from sdinpaint_weights.wrappers import unwrapped

NAMES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
"""File names in order of preference; each may also be sharded, with an index `<name>.index.json`."""
MAX_INDEX = 16_000_000
"""Bytes of an index that are read at most."""
_VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)\.(?:([\w-]+)\.(?:safetensors|bin)"
    r"|(?:safetensors|bin)\.index\.([\w-]+)\.json)"
)
_INDEX = re.compile(r"(\w+)\.(safetensors|bin)\.index(\.[\w-]+)?\.json")
_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}")


def open_folder_component(folder: str | os.PathLike[str], variant: str | None = None) -> Weights:
    """Open the weights in a folder such as `unet/` lazily, with its shards merged into one mapping.

    Args:
        folder: the component's folder.
        variant: "fp16" for `diffusion_pytorch_model.fp16.safetensors`. Where there is none of it, or for None, the file
            without a variant is chosen, or else the only variant that exists; `notes` say so.

    Returns:
        The weights; only headers have been read.

    Raises:
        CheckpointError: there is no such folder or file, the choice is ambiguous, or a file is damaged.
    """
    folder = Path(folder)
    try:
        present = {entry.name for entry in folder.iterdir()}
    except (OSError, ValueError) as error:
        hint = "check the path; each component has its folder: unet, vae, text_encoder"
        raise CheckpointError("CKPT_NOT_FOUND", folder, "no such folder", hint=hint) from error
    chosen = _choose(present, variant) or _choose(present, None)
    if chosen is None:
        _refuse_choice(folder, present, variant)
    weights = _open(folder, chosen)
    weights.variant = _variant(chosen)
    used = "the weights without one are" if weights.variant is None else f"the variant {weights.variant!r} is"
    if weights.variant != variant:
        missing = "weights without a variant" if variant is None else f"weights of the variant {variant!r}"
        weights.notes += (f"{folder.name}: there are no {missing}, so {used} used",)
    return weights


def weights_files(names: Collection[str], variant: str | None = None) -> list[str]:
    """Choose the files that `open_folder_component` reads: a single file, or an index and its shards.

    Args:
        names: names of all files in a component's folder.
        variant: as for `open_folder_component`.

    Returns:
        Names of the files; none where the choice is ambiguous or a shard is missing.
    """
    chosen = _choose(names, variant)
    if chosen is None:
        return []
    index = _INDEX.fullmatch(chosen)
    if index is None:
        return [chosen]
    stem, ending, middle, number = index[1], index[2], re.escape(index[3] or ""), _SHARD_NUMBER.pattern
    # diffusers writes the variant before the number; earlier versions wrote it after.
    shard = re.compile(rf"{stem}(?:{middle}{number}|{number}{middle})\.{ending}")
    shards = sorted(name for name in names if shard.fullmatch(name))
    whole = shards and all(f"-of-{len(shards):05}" in name for name in shards)
    return [chosen, *shards] if whole else []


def _choose(names: Collection[str], variant: str | None) -> str | None:
    found = next((name for name in _candidates(variant) if name in names), None)
    variants = _variants(names)
    if found is None and variant is None and len(variants) == 1:
        return _choose(names, variants[0])
    return found


def _candidates(variant: str | None) -> Iterator[str]:
    for name in NAMES:
        for full in (name, f"{name}.index.json"):
            stem, _, ending = full.rpartition(".")
            yield full if variant is None else f"{stem}.{variant}.{ending}"


def _variant(name: str) -> str | None:
    match = _VARIANT.fullmatch(name)
    middle = match and (match[1] or match[2])
    return None if middle is None or _SHARD_NUMBER.search(middle) else middle


def _variants(names: Collection[str]) -> list[str]:
    return sorted({variant for variant in map(_variant, names) if variant})


def _refuse_choice(folder: Path, present: set[str], variant: str | None) -> NoReturn:
    variants = _variants(present)
    if variant is None and variants:
        found = f"no weights without a variant, but the variants {', '.join(variants)}"
        raise CheckpointError("CKPT_VARIANT", folder, found, hint="choose one of them: variant=...")
    found = f"no weights of the variant {variant!r}" if variant else "no weights"
    there = ", ".join(sorted(present)[:8]) or "nothing"
    expected = next(_candidates(variant))
    raise CheckpointError("CKPT_NOT_FOUND", folder, f"{found}; it holds {there}", expected=expected, hint=FETCH_AGAIN)


def _open(folder: Path, name: str) -> Weights:
    if not name.endswith(".json"):
        return open_weights(folder / name)
    index = unwrapped(_read_index(folder / name), folder / name)
    shards = {shard: open_weights(folder / shard) for shard in dict.fromkeys(index.values())}
    entries: dict[str, Entry] = {}
    for key, shard in index.items():
        if key not in shards[shard]:
            raise CheckpointError("CKPT_BAD_INDEX", folder / name, f"{key!r} is not in {shard!r}", hint=FETCH_AGAIN)
        entries[key] = shards[shard].entries[key]
    extra = [key for weights in shards.values() for key in weights if key not in entries]
    if extra:
        found = f"{len(extra)} tensors of the shards are not listed, e.g. {extra[0]!r}"
        raise CheckpointError("CKPT_BAD_INDEX", folder / name, found, hint=FETCH_AGAIN)
    ignored = sorted({inert for weights in shards.values() for inert in weights.ignored})
    first = next(iter(shards.values()))
    return Weights(folder / name, first.kind, entries, first.metadata, tuple(ignored))


def _read_index(path: Path) -> dict[str, str]:
    """Return {tensor name: shard name}; a shard's name may not lead out of the folder."""
    file = SourceFile(path)
    if file.size > MAX_INDEX:
        found, expected = f"an index of {size_text(file.size)}", f"at most {size_text(MAX_INDEX)}"
        raise CheckpointError("CKPT_BAD_INDEX", path, found, expected=expected, hint=FETCH_AGAIN)
    text = file.read(0, file.size)
    try:
        index = json.loads(text)
        table = index["weight_map"]
        if not table or not all(isinstance(shard, str) for shard in table.values()):
            raise TypeError("weight_map")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        found = "an index that cannot be read"
        raise CheckpointError(
            "CKPT_BAD_INDEX", path, found, expected="JSON with a weight_map", hint=FETCH_AGAIN
        ) from error
    for shard in set(table.values()):
        if shard in ("", ".", "..") or re.search(r"[/\\:\0]", shard):
            found = f"the shard name {shard[:80]!r} leads out of the folder"
            raise CheckpointError("CKPT_BAD_INDEX", path, found, expected="a file name", hint="do not use this folder")
    return dict(table)
