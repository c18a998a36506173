"""LoRA files and their like: which tensors are for which module of a model, whoever wrote them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import torch
from sdinpaint_weights.adapter_layout import EMBEDDINGS, adapter_layout, foreign_kind, other_family_of
from sdinpaint_weights.adapter_names import EMBEDDING, Target, algorithm_of, split_key
from sdinpaint_weights.reader import open_weights
from sdinpaint_weights.weights import Weights
from torch import Tensor

from sdinpaint.adapters.deltas import NUMBERS
from sdinpaint.errors import AdapterError, CheckpointError, warn
from sdinpaint.families import title_of_kind
from sdinpaint.paths import as_path, read_json

__all__ = ["EXAMPLES", "LoraFile", "Readable", "find_weights", "read_lora"]

PEFT_CONFIG, PEFT_STEM = "adapter_config.json", "adapter_model"
DIFFUSERS_CONFIG = "lora_adapter_metadata"
"""The metadata in which diffusers writes PEFT's configuration of each network, its keys behind the network's name."""
LOW_RANK = "LORA"
"""PEFT's own name of the method whose files are read."""
ENDINGS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
LAYER = re.compile(r"(encoder[._]layers[._])(\d+)")
EXPECTED = "a LoRA file, a PEFT folder, or a folder with one weights file"
INSPECT = "sdinpaint inspect says what it is"
EXAMPLES = 5
"""Keys that an error names at most."""


class Readable(Protocol):
    """The tensors of an adapter."""

    path: Path
    metadata: Mapping[str, str]

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor.

        Args:
            key: its name.
            dtype: dtype of the result; None keeps the stored one.

        Returns:
            The tensor on the CPU.
        """


@dataclass(frozen=True)
class InMemory:
    """The tensors of an adapter that was unpickled, without its file."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor, see `Readable`."""
        return self.tensors[key].to(dtype)


@dataclass(frozen=True, eq=False)
class LoraFile:
    """An adapter file whose every tensor has its place; no values have been read."""

    weights: Readable
    name: str
    """The name of the file without its ending, or that of the folder or the repository that was named."""
    sha256: str
    """Digest of the file."""
    parts: Mapping[Target, Mapping[str, str]]
    """Module -> part -> key of the file."""
    algorithms: Mapping[Target, str]
    """Module -> the algorithm of its parts."""
    embeddings: Mapping[str, Mapping[str, str]]
    """Name of an embedding in the file -> part -> key."""
    skipped: Sequence[str] = ()
    """Keys that no module has, where they may be left out."""
    alphas: Mapping[Target, float] = field(default_factory=dict)
    """Module -> alpha, where a PEFT configuration tells it."""

    def __deepcopy__(self, memo: object) -> LoraFile:
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle, which holds the tensors."""
        keys = [key for named in (*self.parts.values(), *self.embeddings.values()) for key in named.values()]
        held = InMemory(self.weights.path, dict(self.weights.metadata), {key: self.weights.tensor(key) for key in keys})
        return {**self.__dict__, "weights": held}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {key: shape} of the tensors of modules."""
        keys = (key for named in self.parts.values() for key in named.values())
        return {key: tuple(self.weights.tensor(key).shape) for key in keys}

    def tensors(self, target: Target, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read the parts of a module.

        Args:
            target: the module.
            dtype: the dtype to compute in, which single numbers are not rounded to; None keeps the stored one.

        Returns:
            Part -> tensor on the CPU.

        Raises:
            CheckpointError: bytes are damaged.
        """
        number = None if dtype is None else torch.float64
        parts = {
            name: self.weights.tensor(key, number if name in NUMBERS else dtype)
            for name, key in self.parts[target].items()
        }
        if target in self.alphas and not {"alpha", "scale"} & parts.keys():
            parts["alpha"] = torch.tensor(self.alphas[target], dtype=torch.float64, device="cpu")
        return parts

    def require_finite(self, target: Target) -> None:
        """Check the values of a module's parts.

        Args:
            target: the module.

        Raises:
            AdapterError: one is NaN or infinite.
            CheckpointError: bytes are damaged.
        """
        for name, part in self.tensors(target).items():
            if not bool(torch.isfinite(part.float()).all()):  # also of float8, and of what float32 cannot hold
                found = f"{self.parts[target].get(name, PEFT_CONFIG)} holds NaN or infinity"
                hint = "fetch the file again, or ask its author for another one"
                raise AdapterError("ADAPTER_VALUES", self.weights.path, found, expected="finite numbers", hint=hint)


class Found(NamedTuple):
    """An adapter on this machine."""

    path: Path
    config: Mapping[str, Any]
    """Its PEFT configuration; empty where there is none."""
    name: str
    """The name of the file without its ending, or that of the folder or the repository that was named."""


def find_weights(source: str | Path) -> Found:
    """Find the weights file of an adapter, and its PEFT configuration where there is one.

    Args:
        source: a file, a PEFT folder, a folder with one weights file, or "owner/name" or "owner/name:FILE" on the hub.

    Returns:
        The file, and what lies beside it.

    Raises:
        CheckpointError: there is no such file or folder, or not one weights file in it.
    """
    path = as_path(source)
    if not os.path.lexists(path):
        return _find_on_hub(str(source))
    if not path.is_dir():
        is_peft = path.stem == PEFT_STEM
        config = read_json(path.parent / PEFT_CONFIG) if is_peft else {}
        return Found(path, config, _folder_name(path.parent) if is_peft else path.stem)
    names = sorted(file.name for file in path.iterdir() if file.suffix in ENDINGS)
    named = [name for name in names if Path(name).stem == PEFT_STEM] or names
    if len({Path(name).stem for name in named}) != 1:
        found = f"the folder holds {', '.join(names[:EXAMPLES]) or 'no weights file'}"
        raise CheckpointError("CKPT_NOT_FOUND", path, found, expected="one weights file", hint="name the file itself")
    last = path / named[-1]  # .safetensors is the last in the alphabet
    return Found(last, read_json(path / PEFT_CONFIG) if last.stem == PEFT_STEM else {}, _folder_name(path))


def _find_on_hub(source: str) -> Found:
    from sdinpaint.hub import fetch, is_hub_id  # noqa: PLC0415 - what is on this machine need not wait for it

    if not is_hub_id(source):
        found, hint = "no such file or folder", "check the path"
        raise CheckpointError("CKPT_NOT_FOUND", source, found, expected=EXPECTED, hint=hint)
    path = fetch(source)
    repository, _, file = source.partition(":")
    if path.stem != PEFT_STEM:
        return Found(path, {}, Path(file).stem if file else repository.partition("/")[2])
    config = read_json(fetch(f"{repository}:{PurePosixPath(file).parent / PEFT_CONFIG}"))
    return Found(path, config, repository.partition("/")[2])


def _folder_name(folder: Path) -> str:
    return Path(os.path.abspath(folder)).name  # what a link is called, and not what it points to


def read_lora(source: str | Path, table: Mapping[str, Target], family: str, *, strict: bool = True) -> LoraFile:
    """Find the place of every tensor of an adapter file.

    Args:
        source: a file or folder, see `find_weights`.
        table: spelling -> module of the model.
        family: kind of the model: "sd1", "sd2" or "sdxl".
        strict: refuse keys that no module has.

    Returns:
        The file.

    Raises:
        AdapterError: it is no adapter, or not one for this model; the error counts and names keys.
        CheckpointError: the file cannot be read.
    """
    path, config, name = find_weights(source)
    weights = open_weights(path)
    shapes = weights.shapes()
    _require_kind(path, config, shapes, family)
    parts: dict[Target, dict[str, str]] = {}
    stems: dict[Target, set[str]] = {}
    embeddings: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    idle: list[str] = []
    twice: list[str] = []
    for key in weights:
        if found := EMBEDDING.fullmatch(key):
            embeddings.setdefault(found["name"], {})[found["part"]] = key
        elif (place := _place(key, table)) is None:
            (idle if family == "sd2" and _is_after_last_layer(key, table) else unknown).append(key)
        else:
            target, stem, part = place
            if part == "oft":
                what, hint = f"{key} belongs to OFT or BOFT", "programs differ in what these keys mean"
                raise AdapterError(
                    "ADAPTER_KIND", path, what, expected="LoRA, LoHa, LoKr, GLoRA, IA3 or full", hint=hint
                )
            if part in parts.setdefault(target, {}):
                twice.append(f"{parts[target][part]} and {key}")
            parts[target][part] = key
            stems.setdefault(target, set()).add(stem)
    if (unknown or not parts) and (other := other_family_of(shapes, family)):
        raise other_family(path, other, family)
    twice += [
        " and ".join(keys.values()) for at, keys in parts.items() if len(stems[at]) > 1 and algorithm_of(keys) is None
    ]
    if twice:
        raise _keys_error(path, "tensors under two names", twice, "one name for each module")
    if unknown and (strict or not (parts or embeddings)):
        hint = "strict=False leaves them out, with a warning"
        raise _keys_error(path, "keys that no module of the model has", unknown, "names of the model's modules", hint)
    algorithms = _algorithms(path, parts)
    if unknown:
        warn(f"{path.name}: {len(unknown)} keys that no module has are left out: {', '.join(unknown[:EXAMPLES])}")
    alphas = dict(_alphas(weights, config, parts))
    (opened,) = weights.files
    return LoraFile(weights, name, opened.sha256(), parts, algorithms, embeddings, (*unknown, *idle), alphas)


def _require_kind(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], family: str) -> None:
    """Refuse what is no adapter, or one of an algorithm or a family that is not read."""
    if (method := str(config.get("peft_type", LOW_RANK))).upper() != LOW_RANK:
        hint = "programs differ in what its factors mean; LyCORIS's own files are read"
        raise AdapterError("ADAPTER_KIND", path, f"it is {method} of PEFT", expected="LoRA or DoRA of PEFT", hint=hint)
    if foreign := foreign_kind(shapes):
        code = "ADAPTER_KIND" if foreign[0] == "ADAPTER_KIND" else "ADAPTER_FAMILY"
        expected = f"a LoRA of {title_of_kind(family)}, or an adapter like it"
        raise AdapterError(code, path, f"it is {foreign[1]}", expected=expected, hint=INSPECT)
    if path.stem == PEFT_STEM and not config:
        warn(f"{path}: there is no {PEFT_CONFIG} beside it, so that alphas which it does not hold count as its ranks")
    parts = {part for key in shapes for _, part in split_key(key)}
    if parts <= {"weight"} and not any(map(EMBEDDING.fullmatch, shapes)):  # a model's own tensors are weights, too
        raise _no_adapter(path, shapes)


def _no_adapter(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> AdapterError:
    examples = ", ".join(list(shapes)[:EXAMPLES]) or "there is none"
    layout = adapter_layout(shapes)
    is_embedding = layout is not None and layout.kind == EMBEDDINGS
    found = f"none of its {len(shapes)} keys is one of an adapter: {examples}"
    hint = "it looks like a textual inversion: take add_embedding, or --embedding" if is_embedding else INSPECT
    return AdapterError("ADAPTER_KIND", path, found, expected=EXPECTED, hint=hint)


def other_family(path: Path, other: str, family: str) -> AdapterError:
    """Make the error for an adapter of another family of models.

    Args:
        path: the file.
        other: the family that it was made for.
        family: the family of the model.

    Returns:
        The error.
    """
    found = f"its names and shapes are those of an adapter of {title_of_kind(other)}"
    own = title_of_kind(family)
    hint = f"load a model of {title_of_kind(other)}, or take an adapter that was trained on {own}"
    return AdapterError("ADAPTER_FAMILY", path, found, expected=f"one of {own}", hint=hint)


def _place(key: str, table: Mapping[str, Target]) -> tuple[Target, str, str] | None:
    """Return the module of a key, how it is spelled, and the name of the part."""
    return next(((table[stem], stem, part) for stem, part in split_key(key) if stem in table), None)


def _is_after_last_layer(key: str, table: Mapping[str, Target]) -> bool:
    """Tell whether a key is of SD 2's 24th text layer, which nothing reads, and which models therefore lack."""
    before = LAYER.sub(lambda found: f"{found[1]}{int(found[2]) - 1}", key, count=1)
    return before != key and _place(before, table) is not None


def _algorithms(path: Path, parts: Mapping[Target, Mapping[str, str]]) -> dict[Target, str]:
    found: dict[Target, str] = {}
    broken: list[str] = []
    for target, named in parts.items():
        if (algorithm := algorithm_of(named)) is None:
            broken.append(" and ".join(named.values()))
        else:
            found[target] = algorithm
    if broken:
        what = f"{len(broken)} modules whose parts are not all there: there is {'; '.join(broken[:EXAMPLES])}"
        expected = "all parts of an algorithm, such as down and up"
        raise AdapterError("ADAPTER_INCOMPLETE", path, what, expected=expected, hint="fetch the file again")
    return found


def _alphas(
    weights: Weights, config: Mapping[str, Any], parts: Mapping[Target, Mapping[str, str]]
) -> Iterator[tuple[Target, float]]:
    """Yield the alpha of each module that PEFT's configuration tells; the rank is that of the tensors.

    Source: huggingface/peft tuners/lora/layer.py, update_layer; diffusers loaders/lora_base.py.
    """
    for network in dict.fromkeys(target.network for target in parts):
        own = _of_network(weights, network) if DIFFUSERS_CONFIG in weights.metadata else config
        if own.get("lora_alpha") is None:
            continue
        alphas, default = _patterns(weights.path, own.get("alpha_pattern") or {}), own["lora_alpha"]
        for target, named in parts.items():
            if target.network == network and "down" in named:
                module, rank = target.name.removeprefix(f"{network}."), weights.shape(named["down"])[0]
                names = module, f"{network}.{module}"
                alpha = next((value for ends, value in alphas if any(map(ends, names))), default)
                try:
                    yield target, float(alpha) * (math.sqrt(rank) if own.get("use_rslora") else 1.0)
                except (TypeError, ValueError) as error:
                    found = f"the alpha of {target.name} is {alpha!r:.60}"
                    raise AdapterError("ADAPTER_VALUES", weights.path, found, expected="a number") from error


def _of_network(weights: Weights, network: str) -> dict[str, Any]:
    """Read the configuration that diffusers writes into the metadata; empty where it is no table."""
    try:
        table = json.loads(weights.metadata[DIFFUSERS_CONFIG])
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        expected = "PEFT's configuration of each network, as JSON"
        raise CheckpointError("CKPT_BAD_CONFIG", weights.path, f"{DIFFUSERS_CONFIG} is no table", expected=expected)
    start = f"{network}."
    return {key.removeprefix(start): value for key, value in table.items() if key.startswith(start)}


def _patterns(path: Path, table: Any) -> list[tuple[Callable[[str], object], Any]]:
    """Return what PEFT's table says of modules whose names end as a pattern does; what is no pattern fits none."""
    if not isinstance(table, Mapping):
        found_kind = f"PEFT's alpha_pattern is {table!r:.60}"
        raise CheckpointError("CKPT_BAD_CONFIG", path, found_kind, expected="a table of patterns and alphas")
    found: list[tuple[Callable[[str], object], Any]] = []
    for pattern, value in table.items():
        with suppress(re.error):
            found.append((re.compile(rf"(.*\.)?({pattern})").fullmatch, value))
    return found


def _keys_error(path: Path, what: str, keys: Sequence[str], expected: str, hint: str = "") -> AdapterError:
    found = f"{len(keys)} {what}, e.g. {', '.join(keys[:EXAMPLES])}"
    return AdapterError("ADAPTER_KEYS", path, found, expected=expected, hint=hint)
