"""A way of loading a model as a value: which files, in which dtype, on which device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

from sdinpaint.checks import check_choice, check_number, check_path, check_switch, check_whole, dtype_name
from sdinpaint.errors import SettingError, said
from sdinpaint.families import Prediction
from sdinpaint.keywords import knowing_keywords

__all__ = ["OPTIONS", "LoadOptions", "LoraOption"]

MAX_TILE = 2**16
AUTO = "auto"
_RECORDED = {"recorded": True}
"""Marks what decides which weights are loaded and how images come out, and so belongs into a manifest."""


class LoraOption(NamedTuple):
    """A LoRA to add to a model, with the arguments of `add_lora`."""

    source: str | Path
    weight: float = 1.0
    text_weight: float | None = None
    name: str | None = None
    blocks: Mapping[str, float] | None = None
    strict: bool = True


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """All that `sdinpaint.load` is told of a model; checked at once, as far as that needs no file.

    Args:
        source: a weights file, a diffusers folder, a model of the hub, or "demo".
        config: a folder of JSON files in the diffusers layout.
        vae: another VAE, file or folder.
        controlnet: a ControlNet, file or folder.
        base: a model that supplies the components that `source` lacks.
        tokenizer: a Tokenizer, or a folder or file that holds CLIP's vocabulary.
        device: name of a device, None for the GPU where there is one.
        dtype: "float32", "float16" or "bfloat16"; None for float32 on a CPU and float16 on a GPU.
        offload: whether models stay in host memory between uses.
        tile: side of the VAE's tiles in pixels; 0 for none, None for tiles from 1024 x 1024 pixels on.
        prediction: "eps" or "v", None where the checkpoint tells.
        ema: whether the averaged weights of the UNet are taken.
        variant: a variant of a folder's files, such as "fp16".
        revision: a branch, tag or commit of `source` on the hub.
        local_files_only: whether the hub's cache is all that is used of the hub.
        mmap: whether weights may stay mapped to their file.
        loras: LoRAs to add: files, or pairs of a file and its weight, or `LoraOption`s.
        embeddings: textual inversions to add: files, or pairs of a file and its token.

    Raises:
        SettingError: a value is of the wrong type or out of its bounds.
    """

    source: Any
    config: str | Path | None = field(default=None, metadata=_RECORDED)
    vae: str | Path | None = field(default=None, metadata=_RECORDED)
    controlnet: str | Path | None = field(default=None, metadata=_RECORDED)
    base: str | Path | None = field(default=None, metadata=_RECORDED)
    tokenizer: Any = field(default=None, metadata=_RECORDED)
    device: Any = None
    dtype: Any = None
    offload: bool = False
    tile: int | None = field(default=None, metadata=_RECORDED)
    prediction: Prediction | None = field(default=None, metadata=_RECORDED)
    ema: bool = field(default=False, metadata=_RECORDED)
    variant: str | None = field(default=None, metadata=_RECORDED)
    revision: str | None = field(default=None, metadata=_RECORDED)
    local_files_only: bool = False
    mmap: bool = True
    loras: Any = ()
    embeddings: Any = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        if isinstance(self.source, LoadOptions):
            put(self, "source", self.source.source)
        for name in ("source", "config", "vae", "controlnet", "base"):
            if getattr(self, name) is not None or name == "source":
                put(self, name, check_path(name, getattr(self, name)))
        for name in ("variant", "revision"):
            if getattr(self, name) is not None:
                put(self, name, _name(name, getattr(self, name)))
        for name in ("offload", "ema", "local_files_only", "mmap"):
            put(self, name, check_switch(name, getattr(self, name)))
        if self.tile is not None:
            put(self, "tile", check_whole("tile", self.tile, 0, MAX_TILE))
        if self.prediction is not None:
            check_choice("prediction", self.prediction, get_args(Prediction))
        put(self, "loras", tuple(map(_lora, _several("loras", self.loras))))
        put(self, "embeddings", tuple(map(_embedding, _several("embeddings", self.embeddings))))
        put(self, "tokenizer", _tokenizer(self.tokenizer))
        put(self, "device", _device(self.device))
        put(self, "dtype", None if self.dtype is None or _is_auto(self.dtype) else dtype_name(self.dtype))

    @property
    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}

    @property
    def places(self) -> list[str | Path]:
        """The paths, and names of the hub, that the model is read from, as they were given."""
        added = (*(lora.source for lora in self.loras), *(file for file, _ in self.embeddings))
        given = (self.source, self.config, self.vae, self.controlnet, self.base, self.tokenizer, *added)
        return [place for place in given if isinstance(place, str | Path)]

    def to_manifest(self) -> dict[str, Any]:
        """Return what a manifest keeps beside model, device and dtype, where it is not the default."""
        recorded = {one.name for one in fields(self) if one.metadata}
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.given.items()
            if name in recorded and isinstance(value, str | Path | int)  # a Tokenizer's vocabulary is among the weights
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], **changes: Any) -> LoadOptions:
        """Return the options by which the model of a manifest is loaded again.

        Args:
            manifest: a manifest; one without the key "load" was made by the model alone.
            changes: options to be taken in place of the recorded ones.

        Returns:
            The options, with the dtype and the model of the manifest.

        Raises:
            SettingError: the manifest names an option that this version does not have, or a wrong value.
        """
        stored = manifest.get("load", {})
        known = [one.name for one in fields(cls) if one.metadata == _RECORDED]
        for name in stored:
            check_choice("load", name, known, code="MANIFEST_BROKEN", of="manifest")
        adapters = manifest.get("adapters", [])
        loras = [  # with the keys that were left out then: that the file is the same one is checked by its digest
            LoraOption(one["source"], one["weight"], one["text_weight"], one["name"], one["blocks"], strict=False)
            for one in adapters
            if one["kind"] == "lora"
        ]
        embeddings = [(one["source"], one["name"]) for one in adapters if one["kind"] == "embedding"]
        added = {"loras": loras, "embeddings": embeddings}
        return cls(**{"source": manifest["model"], "dtype": manifest["dtype"], **stored, **added, **changes})


OPTIONS = [one.name for one in fields(LoadOptions)]
"""The names of all options."""
LoadOptions.__init__ = knowing_keywords()(LoadOptions.__init__)  # type: ignore[method-assign]


def _several(name: str, given: Any) -> list[Any]:
    """Return what was given as a list; a path alone is a list of one."""
    if given is None:
        return []
    if isinstance(given, str | os.PathLike | LoraOption):
        return [given]
    if isinstance(given, Mapping | bytes) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        found, expected = f"a {type(given).__name__}", "a list of files, or of pairs of a file and what belongs to it"
        raise SettingError(f"SETTING_{name.upper()}", name, found, expected=expected)
    return list(given)


def _lora(given: Any) -> LoraOption:
    """Return a LoRA that was given as a path, or with its weights behind it."""
    parts = (given,) if isinstance(given, str | os.PathLike) else given
    if not isinstance(parts, tuple | list) or not 1 <= len(parts) <= len(LoraOption._fields):
        expected = "a file, (file, weight), (file, weight, text_weight) or a LoraOption"
        raise SettingError("SETTING_LORAS", "loras", said(given), expected=expected)
    option = LoraOption(*parts)
    text = option.text_weight
    return option._replace(
        source=check_path("loras", option.source),
        weight=check_number("loras", option.weight, code="SETTING_WEIGHT"),
        text_weight=None if text is None else check_number("loras", text, code="SETTING_WEIGHT"),
    )


def _embedding(given: Any) -> tuple[str | Path, str | None]:
    """Return a textual inversion that was given as a path, or with its token behind it."""
    parts = (given, None) if isinstance(given, str | os.PathLike) else given
    if not isinstance(parts, tuple | list) or len(parts) != 2 or not isinstance(parts[1], str | NoneType):
        raise SettingError("SETTING_EMBEDDINGS", "embeddings", said(given), expected="a file, or (file, token)")
    return check_path("embeddings", parts[0]), parts[1]


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == AUTO


def _tokenizer(value: Any) -> Any:
    if value is None or (callable(value) and hasattr(value, "vocab")):
        return value
    if isinstance(value, str | os.PathLike):
        return check_path("tokenizer", value)
    found, expected = f"a {type(value).__name__}", "a Tokenizer, or the path of a vocabulary"
    raise SettingError("SETTING_TOKENIZER", "tokenizer", found, expected=expected)


def _device(value: Any) -> str | None:
    if value is None or _is_auto(value):
        return None
    if isinstance(value, str) or type(value).__module__ == "torch":
        return str(value)
    found, expected = f"a {type(value).__name__}", "a name, such as 'cpu', 'cuda' or 'cuda:1'"
    raise SettingError("SETTING_DEVICE", "device", found, expected=expected)


def _name(name: str, value: Any) -> str:
    if isinstance(value, str) and value and value.isprintable():
        return value
    found = said(value) if isinstance(value, str) else f"a {type(value).__name__}"
    raise SettingError(f"SETTING_{name.upper()}", name, found, expected="a name")
