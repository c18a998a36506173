"""Adding adapters to the networks of a checkpoint, and taking them off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdinpaint_weights.adapter_names import UNET
from torch import nn

from sdinpaint.adapters.deltas import as_layer
from sdinpaint.adapters.dialects import Dialect, write_adapter
from sdinpaint.adapters.embeddings import checked_token, embedding_of, read_embedding
from sdinpaint.adapters.lora import Lora, checked_blocks, checked_weight
from sdinpaint.adapters.reading import EXAMPLES
from sdinpaint.adapters.stack import Stack, read_fitting
from sdinpaint.checks import check_path, check_switch
from sdinpaint.errors import AdapterError, explaining_memory, said
from sdinpaint.families import TEXT_ENCODERS, Family
from sdinpaint.load_options import LoraOption
from sdinpaint.models.offloading import Offloading
from sdinpaint.progress import Bar, progress_bar
from sdinpaint.text.conditioning import TextConditioner
from sdinpaint.text.embeddings import Embedding

__all__ = ["Adaptable"]

_KEEP: Any = object()
"""The default of an argument that stays as it is."""


class Adaptable:
    """Networks to which LoRAs, adapters like them, and textual inversions can be added."""

    family: Family
    unet: nn.Module
    condition: TextConditioner
    offloading: Offloading | None

    @property
    def adapters(self) -> Stack:
        """The weights that adapters have changed, with the weights from before."""
        if "_adapters" not in self.__dict__:
            self.__dict__["_adapters"] = Stack(self.offloading)
        return self.__dict__["_adapters"]

    @property
    def loras(self) -> Mapping[str, Lora]:
        """The adapters that were added, by name, in the order of addition."""
        return MappingProxyType(self.adapters.loras)

    @property
    def embeddings(self) -> Mapping[str, Embedding]:
        """The textual inversions that were added, by token, in the order of addition."""
        return MappingProxyType({one.token: one for one in self.condition.embeddings.values()})

    def add_lora(
        self,
        source: str | Path,
        weight: float = 1.0,
        *,
        text_weight: float | None = None,
        name: str | None = None,
        blocks: Mapping[str, float] | None = None,
        strict: bool = True,
    ) -> Lora:
        """Add a LoRA, or an adapter like it (LoCon, LoHa, LoKr, DoRA, GLoRA, IA3, full differences), in any dialect.

        Weights are W0 + sum of weight * delta(W0) over all adapters, where W0 are the checkpoint's own, so that the
        order of addition does not matter. All that computes with the model sees it at once, and a step costs what it
        costs without. An embedding within the file is added, too.

        Args:
            source: a file, a PEFT folder, a folder with one weights file, or "owner/name" or "owner/name:FILE" on the
                hub.
            weight: the weight at which it counts.
            text_weight: the weight in the text encoders; None follows `weight`.
            name: the name of the adapter; the name of the file, without its ending, by default.
            blocks: factors of the weight by beginnings of modules' names in diffusers, such as {"mid_block": 0.5}; the
                longest that fits counts.
            strict: refuse a file with keys that no module has; otherwise they are left out, with a warning.

        Returns:
            The adapter.

        Raises:
            AdapterError: it is no adapter, or does not fit this model, or the name is taken; nothing has changed then.
            CheckpointError: the file cannot be found or read.
            SettingError: a weight is no finite number.
            OutOfMemoryError: memory does not suffice.
        """
        return self.add_option(LoraOption(source, weight, text_weight, name, blocks, strict))

    @explaining_memory()
    def add_option(self, option: LoraOption, *, progress: bool = True) -> Lora:
        """Add a LoRA that was asked for as a value, as `add_lora` does.

        Args:
            option: the arguments of `add_lora`.
            progress: show a bar in a terminal or a notebook.

        Returns:
            The adapter.

        Raises:
            SdInpaintError: as `add_lora` does.
        """
        source, weight, text_weight, name, blocks, strict = option
        check_path("source", source)
        weight, strict = checked_weight("weight", weight), check_switch("strict", strict)
        text_weight = None if text_weight is None else checked_weight("text_weight", text_weight)
        if name is not None:
            self._require_free(name)
        file = read_fitting(source, self.networks, self.family.kind, strict=strict)
        name = file.name if name is None else name
        self._require_free(name)
        lora = Lora(name, str(source), file, weight, text_weight, checked_blocks(blocks, file))
        inside = [
            embedding_of(file.weights, _unprefixed(keys), checked_token(token), self.family, str(source), file.sha256)
            for token, keys in file.embeddings.items()
        ]
        words = dict(self.condition.embeddings)
        for embedding in inside:
            _put_new(words, embedding)
        self._put({**self.loras, name: lora}, f"add {name}", progress=progress)
        self.condition.embeddings.update(words)
        return lora

    @explaining_memory()
    def set_lora(
        self,
        name: str,
        *,
        weight: float = _KEEP,
        text_weight: float | None = _KEEP,
        blocks: Mapping[str, float] | None = _KEEP,
    ) -> Lora:
        """Change the weights of an adapter; what is not given stays.

        Args:
            name: its name.
            weight: as in `add_lora`.
            text_weight: as in `add_lora`.
            blocks: as in `add_lora`.

        Returns:
            The adapter with its new weights.

        Raises:
            AdapterError: there is no adapter of that name, or no module of it has the name of a block.
            SettingError: a weight is no finite number.
        """
        lora = self._lora(name)
        changes: dict[str, Any] = {}
        if weight is not _KEEP:
            changes["weight"] = checked_weight("weight", weight)
        if text_weight is not _KEEP:
            changes["text_weight"] = None if text_weight is None else checked_weight("text_weight", text_weight)
        if blocks is not _KEEP:
            changes["blocks"] = checked_blocks(blocks, lora.file)
        changed = replace(lora, **changes)
        self._put({**self.loras, name: changed}, f"set {name}")
        return changed

    def remove_lora(self, name: str) -> None:
        """Take an adapter off: weights that no other one changes have their very bits from before.

        Args:
            name: its name.

        Raises:
            AdapterError: there is no adapter of that name.
        """
        lora = self._lora(name)
        self._put({key: one for key, one in self.loras.items() if key != name}, f"remove {name}")
        self._forget_embeddings(lora)

    def clear_loras(self) -> None:
        """Take all LoRAs and adapters like them off: all weights have their very bits from before."""
        loras = list(self.loras.values())
        self._put({}, "remove LoRAs")
        for lora in loras:
            self._forget_embeddings(lora)

    def save_lora(self, name: str, file: str | Path, dialect: Dialect = "kohya") -> None:
        """Write an adapter as other programs read it, at weight 1.

        Args:
            name: its name in `loras`.
            file: the .safetensors file to write; for "peft" a folder.
            dialect: "kohya" (A1111, ComfyUI, kohya's scripts; LyCORIS' names for what is no LoRA), "diffusers" or
                "peft".

        Raises:
            AdapterError: there is no adapter of that name, or the dialect has no names for its algorithm.
            CheckpointError: the file cannot be written.
            SettingError: the dialect is not known, or does not fit the name of the file.
        """
        lora = self._lora(name)
        networks = self.networks
        adapter = {
            target: as_layer(parts, networks[target.network].get_parameter(f"{target.module}.weight"))
            for target, parts in ((target, lora.file.tensors(target)) for target in lora.file.parts)
        }
        inside = {key: lora.file.weights.tensor(key) for keys in lora.file.embeddings.values() for key in keys.values()}
        write_adapter(check_path("file", file), adapter, dialect, self.family.kind, lora.metadata, inside)

    @contextmanager
    def adapted(self, source: str | Path, weight: float = 1.0, **options: Any) -> Iterator[Lora]:
        """Add an adapter for the duration of a `with` block, and take it off at its end, whatever happened inside.

        Args:
            source: as in `add_lora`.
            weight: as in `add_lora`.
            options: further arguments of `add_lora`.

        Yields:
            The adapter.

        Raises:
            SdInpaintError: as `add_lora` does.
        """
        lora = self.add_lora(source, weight, **options)
        try:
            yield lora
        finally:
            if lora.name in self.loras:
                self.remove_lora(lora.name)

    def add_embedding(self, source: str | Path, token: str | None = None) -> Embedding:
        """Add a textual inversion: a word of prompts that stands for learned vectors.

        In a prompt the word is found whatever its case, where no letter, digit, `_` or `-` stands beside it.

        Args:
            source: a file, a folder with one weights file, or a name on the hub.
            token: the word; None is the one in the file, or the file's name.

        Returns:
            The embedding.

        Raises:
            AdapterError: it is no embedding, does not fit this model, or the word is taken.
            CheckpointError: the file cannot be found or read.
        """
        check_path("source", source)
        given = None if token is None else checked_token(token)
        embedding = read_embedding(source, given, self.family)
        _put_new(self.condition.embeddings, embedding)
        return embedding

    def remove_embedding(self, token: str) -> None:
        """Take a textual inversion off.

        Args:
            token: its word, in any case.

        Raises:
            AdapterError: there is none of that word, or it is a part of a LoRA.
        """
        there = self.condition.embeddings
        if not isinstance(token, str) or token.lower() not in there:
            found, expected = (
                f"no embedding {said(token)}",
                f"one of: {', '.join(self.embeddings) or 'none were added'}",
            )
            raise AdapterError("EMBEDDING_TOKEN", "token", found, expected=expected)
        for name, lora in self.loras.items():
            if there[token.lower()] in self._inside(lora):
                found, hint = f"{said(token)} is in the file of {name}", f"remove_lora({name!r}) takes off both"
                raise AdapterError("EMBEDDING_TOKEN", "token", found, expected="one added by itself", hint=hint)
        del there[token.lower()]

    def recorded_adapters(self) -> list[dict[str, Any]]:
        """Return what a manifest records of all that was added.

        Returns:
            LoRAs, then embeddings that were added themselves, each as plain JSON values.
        """
        inside = [one for lora in self.loras.values() for one in self._inside(lora)]
        alone = [one for one in self.condition.embeddings.values() if one not in inside]
        return [lora.to_manifest() for lora in self.loras.values()] + [one.to_manifest() for one in alone]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that adapters change, by name: "unet", "text_encoder", and for SDXL "text_encoder_2"."""
        names = (UNET, *TEXT_ENCODERS)
        networks = (self.unet, *self.condition.encoders)
        # what torch.compile returns holds the network itself
        return {name: getattr(one, "_orig_mod", one) for name, one in zip(names, networks, strict=False)}

    def _put(self, loras: Mapping[str, Lora], what: str, *, progress: bool = True) -> None:
        def bar(total: int) -> AbstractContextManager[Bar]:
            return progress_bar(total, what, " weights", show=progress, leave=False)

        self.adapters.put(loras, self.networks, bar)

    def _inside(self, lora: Lora) -> list[Embedding]:
        """Return the embeddings that came with a LoRA."""
        tokens = {checked_token(token).lower() for token in lora.file.embeddings}
        there = self.condition.embeddings.items()
        return [one for token, one in there if token in tokens]

    def _forget_embeddings(self, lora: Lora) -> None:
        for one in self._inside(lora):
            del self.condition.embeddings[one.token.lower()]

    def _lora(self, name: str) -> Lora:
        if not isinstance(name, str) or name not in self.loras:
            there = ", ".join(self.loras) or "none were added"
            raise AdapterError("ADAPTER_NAME", "name", f"no adapter {said(name)}", expected=f"one of: {there}")
        return self.loras[name]

    def _require_free(self, name: object) -> None:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise AdapterError("ADAPTER_NAME", "name", said(name), expected="a text that is not empty")
        if name in self.loras:
            hint = f"give another one: name=..., or change its weight: set_lora({name!r}, weight=...)"
            raise AdapterError("ADAPTER_NAME", "name", f"{name!r} was added already", expected="a new name", hint=hint)


def _put_new(embeddings: dict[str, Embedding], embedding: Embedding) -> None:
    """Put an embedding among others, unless its word is taken."""
    token = embedding.token
    if token.lower() in embeddings:
        there = ", ".join([one.token for one in embeddings.values()][:EXAMPLES])
        hint = "give another word: add_embedding(file, token='...') or --embedding TOKEN=FILE, or remove it first"
        found, expected = f"{said(token)} is taken", f"none of: {there}"
        raise AdapterError("EMBEDDING_TOKEN", "token", found, expected=expected, hint=hint)
    embeddings[token.lower()] = embedding


def _unprefixed(keys: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix("string_to_param."): key for name, key in keys.items()}
