"""Write adapters as other programs read them: kohya's names, those of diffusers, or a folder of PEFT.

Source: kohya-ss/sd-scripts networks/lora.py; huggingface/diffusers loaders/lora_base.py; huggingface/peft
tuners/lora/config.py and utils/save_and_load.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
from sdinpaint_weights.adapter_names import TEXT, TEXT_2, UNET, Target
from sdinpaint_weights.atomic import atomic_folder
from sdinpaint_weights.export import write_json
from sdinpaint_weights.stream import Item, not_written, write_stream
from torch import Tensor

from sdinpaint.adapters.deltas import Parts
from sdinpaint.adapters.reading import DIFFUSERS_CONFIG, EXAMPLES, PEFT_CONFIG, PEFT_STEM
from sdinpaint.checks import check_choice
from sdinpaint.errors import AdapterError, CheckpointError, SettingError, warn

__all__ = ["Adapter", "Dialect", "checked_target", "kohya_tensors", "write_adapter"]

Dialect = Literal["kohya", "diffusers", "peft"]
Adapter = Mapping[Target, Parts]
"""Module -> its parts."""
KOHYA = {
    **{"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "magnitude": "dora_scale"},
    **{name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")},
}
"""Part -> end of its key, where that is not the part's own name."""
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
LORA_PARTS = {*PEFT, "alpha", "dora_scale"}
MAGNITUDES = {"magnitude", "dora_scale"}


class File(NamedTuple):
    """The tensors of a file by key, and its metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def write_adapter(
    target: str | Path,
    adapter: Adapter,
    dialect: Dialect,
    kind: str,
    metadata: Mapping[str, str],
    embeddings: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write an adapter.

    Args:
        target: the file; for "peft" the folder.
        adapter: its tensors by module.
        dialect: "kohya" (which A1111, ComfyUI and kohya's scripts read; LyCORIS' names for what is no LoRA),
            "diffusers", or "peft".
        kind: kind of the model: "sd1", "sd2" or "sdxl".
        metadata: texts for the header of the file.
        embeddings: tensors of embeddings in the file, which "kohya" alone has names for: key -> tensor.

    Raises:
        AdapterError: the dialect has no names for an algorithm of the adapter.
        CheckpointError: the target cannot be written.
        SettingError: the dialect is not known, or the target's name does not fit it.
    """
    target = checked_target(target, dialect)
    metadata = {key: text for key, text in metadata.items() if key != DIFFUSERS_CONFIG}  # of the file that was read
    adapter = {module: _with_alpha(parts) for module, parts in adapter.items()}
    if embeddings and dialect != "kohya":
        warn(f"{target}: the dialect {dialect!r} has no place for embeddings; {len(embeddings)} tensors are left out")
    try:
        if dialect == "kohya":
            _write(target, File({**kohya_tensors(adapter, kind), **embeddings}, {"format": "pt", **metadata}))
        elif dialect == "diffusers":
            _write(target, _diffusers(adapter, metadata))
        else:
            tensors, config = _peft(adapter)
            with atomic_folder(target) as folder:
                _write(folder / f"{PEFT_STEM}.safetensors", File(tensors, {"format": "pt", **metadata}))
                write_json(folder / PEFT_CONFIG, config)
    except CheckpointError:
        raise
    except OSError as error:
        raise not_written(target, error) from error


def checked_target(target: str | Path, dialect: Dialect) -> Path:
    """Check a dialect, and that a target's name fits it.

    Args:
        target: the file; for "peft" the folder.
        dialect: "kohya", "diffusers" or "peft".

    Returns:
        The target.

    Raises:
        SettingError: the dialect is not known, or the target's name does not fit it.
    """
    check_choice("dialect", dialect, get_args(Dialect))
    target = Path(target)
    if (target.suffix == ".safetensors") != (dialect != "peft"):
        expected = "a folder's name" if dialect == "peft" else "a name that ends with .safetensors"
        raise SettingError("SETTING_TARGET", "file", f"{str(target)!r} for {dialect!r}", expected=expected)
    return target


def _write(path: Path, file: File) -> None:
    def item(key: str, tensor: Tensor) -> Item:
        return Item(key, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    write_stream(path, [item(key, tensor) for key, tensor in sorted(file.tensors.items())], file.metadata)


def kohya_tensors(adapter: Adapter, kind: str) -> dict[str, Tensor]:
    """Name the tensors of an adapter as kohya's scripts and LyCORIS do.

    Args:
        adapter: its tensors by module.
        kind: kind of the model: "sd1", "sd2" or "sdxl".

    Returns:
        Key -> tensor.
    """
    starts = {UNET: "lora_unet_", TEXT: "lora_te1_" if kind == "sdxl" else "lora_te_", TEXT_2: "lora_te2_"}

    def key(target: Target, part: str) -> str:
        name = target.module if target.network != UNET or kind == "sdxl" else target.name
        return f"{starts[target.network]}{name.replace('.', '_')}.{KOHYA.get(part, part)}"

    tensors: dict[str, Tensor] = {}
    for target, parts in adapter.items():
        tensors.update((key(target, part), tensor) for part, tensor in parts.items())
        if "magnitude" in parts:  # of rows, as (o, 1, ...)
            shape = [-1] + [1] * (parts.get("up", parts["magnitude"]).ndim - 1)
            tensors[key(target, "magnitude")] = parts["magnitude"].reshape(shape)
    return tensors


def _with_alpha(parts: Parts) -> Parts:
    """Give a LoRA the alpha that some programs expect in every module, in place of a factor, of none, or of 0."""
    if "down" not in parts or ("scale" not in parts and float(parts.get("alpha", 0.0))):
        return parts
    rank = float(len(parts["down"]))
    scale = float(parts["scale"]) if "scale" in parts else 1.0
    plain = {name: part for name, part in parts.items() if name != "scale"}
    if not scale:  # an alpha of 0 would count as none
        return {**plain, "alpha": torch.tensor(rank), "up": torch.zeros_like(parts["up"])}
    alpha = torch.tensor(scale * rank, dtype=torch.float64)
    return {**plain, "alpha": alpha.float() if alpha.float().double() == alpha else alpha}


def _diffusers(adapter: Adapter, metadata: Mapping[str, str]) -> File:
    tensors, tables = {}, {}
    for network in dict.fromkeys(target.network for target in adapter):
        part = {target: parts for target, parts in adapter.items() if target.network == network}
        found, config = _low_rank(part, "diffusers")
        tensors.update({f"{network}.{key}": tensor for key, tensor in found.items()})
        tables.update({f"{network}.{key}": value for key, value in config.items()})
    return File(tensors, {"format": "pt", **metadata, DIFFUSERS_CONFIG: json.dumps(tables)})


def _peft(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    alone = {target.network for target in adapter} in ({UNET}, {TEXT})
    tensors, config = _low_rank(adapter, "peft", named=not alone)
    return {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, {"peft_type": "LORA", **config}


def _low_rank(adapter: Adapter, dialect: str, *, named: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and configuration as PEFT has them: alphas and ranks by module."""
    odd = [target.name for target, parts in adapter.items() if not {"down", "up"} <= parts.keys() <= LORA_PARTS]
    odd += [target.name for target, parts in adapter.items() if _is_by_column(parts)]
    decomposed = sum(bool(MAGNITUDES & parts.keys()) for parts in adapter.values())
    if decomposed not in (0, len(adapter)):  # a configuration has one word for all
        odd += [target.name for target, parts in adapter.items() if MAGNITUDES & parts.keys()]
    if odd:
        listed = ", ".join(odd[:EXAMPLES])
        found = f"{len(odd)} modules that are no LoRA, or a DoRA of columns or of some modules alone, e.g. {listed}"
        hint = "take the dialect 'kohya', which has names for every algorithm"
        raise AdapterError("ADAPTER_KIND", f"dialect {dialect!r}", found, expected="LoRA alone", hint=hint)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, parts in adapter.items():
        name = target.name.removeprefix(f"{target.network}.")
        name = f"{target.network}.{name}" if named else name
        down, up = parts["down"], parts["up"]
        end = name.removeprefix("text_model.")  # fits with and without it: transformers 5 has left it out
        ranks[end], alphas[end] = len(down), float(parts["alpha"])
        tensors[f"{name}.{PEFT['down']}"], tensors[f"{name}.{PEFT['up']}"] = down, up
        rows = parts.get("magnitude", parts.get("dora_scale"))
        if rows is not None:
            shape = (-1,) if down.ndim == 2 else (1, -1, 1, 1)
            tensors[f"{name}.{PEFT['magnitude']}"] = rows.reshape(shape)
    usual, alpha = _most_frequent(ranks.values()), _most_frequent(alphas.values())
    return tensors, {
        "r": usual,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
        "lora_alpha": alpha,
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
        "target_modules": list(ranks),
        "use_dora": decomposed > 0,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }


def _is_by_column(parts: Parts) -> bool:
    scale = parts.get("dora_scale")
    return scale is not None and scale.ndim > 1 and not (len(scale) == len(parts["up"]) and scale[0].numel() == 1)


def _most_frequent(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
