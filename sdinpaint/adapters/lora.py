"""A LoRA, or an adapter like it, that was added to a model: its file, and the weights at which it counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdinpaint_weights.adapter_names import UNET, Target

from sdinpaint.adapters.reading import LoraFile
from sdinpaint.errors import AdapterError, SettingError, said

__all__ = ["Lora", "checked_blocks", "checked_weight"]


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter that was added to a pipeline; `set_lora` puts another one in its place."""

    name: str
    source: str
    """Where it was read from, as it was given."""
    file: LoraFile = field(repr=False)
    weight: float
    text_weight: float | None
    """Weight in the text encoders; None follows `weight`."""
    blocks: Mapping[str, float] | None
    """Beginning of the names of modules in diffusers -> factor of the weight."""

    @property
    def sha256(self) -> str:
        """The digest of the file."""
        return self.file.sha256

    @property
    def modules(self) -> dict[str, int]:
        """Network -> number of its modules that the adapter changes."""
        return dict(Counter(target.network for target in self.file.parts))

    @property
    def kinds(self) -> dict[str, int]:
        """Algorithm -> number of modules that it changes."""
        return dict(Counter(self.file.algorithms.values()))

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts in the file's header."""
        return self.file.weights.metadata

    @property
    def skipped(self) -> tuple[str, ...]:
        """Keys of the file that were left out."""
        return tuple(self.file.skipped)

    def factor(self, target: Target) -> float:
        """Return the weight at which the adapter is added to a module.

        Args:
            target: the module.

        Returns:
            The weight of its network, times the factor of the longest of `blocks` that fits its name.
        """
        own = self.weight if target.network == UNET or self.text_weight is None else self.text_weight
        fitting = [prefix for prefix in self.blocks or () if _fits(prefix, target)]
        return own * (self.blocks or {})[max(fitting, key=len)] if fitting else own

    def to_manifest(self) -> dict[str, Any]:
        """Return what a manifest records of it."""
        file = {"kind": "lora", "name": self.name, "source": self.source, "sha256": self.sha256}
        blocks = None if self.blocks is None else dict(self.blocks)
        return {**file, "weight": self.weight, "text_weight": self.text_weight, "blocks": blocks}


def checked_weight(name: str, value: Any) -> float:
    """Check a weight.

    Args:
        name: name of the argument.
        value: what was given.

    Returns:
        The number.

    Raises:
        SettingError: it is no finite number.
    """
    number = None
    if not isinstance(value, bool | str | bytes):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor of several numbers
            number = None
    if number is None or not math.isfinite(number):
        raise SettingError("SETTING_WEIGHT", name, said(value), expected="a finite number, such as 0.8")
    return number


def checked_blocks(blocks: Any, file: LoraFile) -> dict[str, float] | None:
    """Check the factors by block.

    Args:
        blocks: what was given: beginning of names of modules -> factor, or None.
        file: the adapter.

    Returns:
        The factors, or None.

    Raises:
        AdapterError: no module of the file has one of these names.
        SettingError: a factor is no finite number, or `blocks` is no table.
    """
    if blocks is None:
        return None
    if not isinstance(blocks, Mapping):
        expected = 'a table of beginnings of modules\' names in diffusers, such as {"down_blocks.1": 0.5}'
        raise SettingError("SETTING_WEIGHT", "blocks", said(blocks), expected=expected)
    for prefix in blocks:
        if not any(_fits(str(prefix), target) for target in file.parts):
            first = sorted({".".join(target.name.split(".")[:2]) for target in file.parts})
            found, expected = f"no module of it begins with {said(prefix)}", f"one of {', '.join(first[:12])}"
            hint = "names are those of diffusers' modules, such as mid_block or up_blocks.0.attentions.1"
            raise AdapterError("ADAPTER_BLOCKS", file.weights.path, found, expected=expected, hint=hint)
    return {str(prefix): checked_weight(f"blocks[{prefix!r}]", factor) for prefix, factor in blocks.items()}


def _fits(prefix: str, target: Target) -> bool:
    return target.name == prefix or target.name.startswith(f"{prefix}.")
