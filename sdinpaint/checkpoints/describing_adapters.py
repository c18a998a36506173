"""Describe a LoRA, a textual inversion, or another addition to a model, from its header."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdinpaint_weights.adapter_layout import (
    CONTROL_LORA,
    EMBEDDINGS,
    IP_ADAPTER,
    LORA,
    AdapterLayout,
    adapter_layout,
    foreign_kind,
)
from sdinpaint_weights.weights import Weights

from sdinpaint.errors import shown
from sdinpaint.families import title_of_kind

__all__ = ["AdapterReport", "describe_adapter", "title_of"]

MOST_WORDS = 12
BASES = {"sd_v1": "sd1", "sd_1": "sd1", "sd1": "sd1", "sd_v2": "sd2", "sd2": "sd2", "sd_2": "sd2", "sdxl": "sdxl"}
"""Beginning of `ss_base_model_version` -> family."""
ARCHITECTURES = {"stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl": "sdxl"}
"""Beginning of `modelspec.architecture` -> family."""
BASE_MODEL = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture", "base_model_name_or_path")
"""Keys of metadata, and of PEFT's configuration, that name the model."""
TITLES = {
    LORA: "a LoRA or an adapter like it",
    EMBEDDINGS: "a textual inversion",
    IP_ADAPTER: "an IP-Adapter",
    CONTROL_LORA: "a Control-LoRA",
}
SERVES_AS = {
    LORA: "as a LoRA: pipe.add_lora(FILE), load(loras=[FILE]) or --lora FILE",
    EMBEDDINGS: "as a textual inversion: pipe.add_embedding(FILE), load(embeddings=[FILE]) or --embedding FILE",
}


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """The part of a report that is of adapters alone."""

    kind: str
    """"lora", "textual inversion", "ip-adapter" or "control-lora"."""
    algorithms: dict[str, int]
    """Algorithm -> number of modules."""
    modules: dict[str, int]
    """"unet", "text encoder" -> number of modules."""
    ranks: dict[int, int]
    """Rank -> number of modules."""
    embeddings: dict[str, int]
    """Name of an embedding in the file -> number of its vectors."""
    base_model: str
    """The model that it was trained on, as its metadata name it; empty where they do not."""
    trigger_words: tuple[str, ...]
    """Words that its metadata name, the most frequent first."""
    doubt: str
    """A sentence where metadata and tensors tell different base models; else empty."""

    def lines(self) -> list[str]:
        """Return what a person reads of it."""
        rows = {
            "algorithm": ", ".join(f"{name} x {count}" for name, count in self.algorithms.items()),
            "modules": ", ".join(f"{name} {count}" for name, count in self.modules.items()),
            "rank": ", ".join(f"{rank} x {count}" for rank, count in sorted(self.ranks.items())),
            "embeddings": ", ".join(f"{shown(name)}: {count} vectors" for name, count in self.embeddings.items()),
            "base model": shown(self.base_model),
            "triggers": shown(", ".join(self.trigger_words)),
            "note": self.doubt,
        }
        return [f"  {name:<11} {text}" for name, text in rows.items() if text]


def describe_adapter(
    weights: Weights, config: Mapping[str, Any]
) -> tuple[AdapterLayout, AdapterReport, str, str] | None:
    """Describe an adapter file.

    Args:
        weights: the opened file.
        config: PEFT's configuration beside it; empty where there is none.

    Returns:
        Layout, report, what it serves as, and what prevents using it, one of which is empty; None where the file is no
        adapter.
    """
    shapes = weights.shapes()
    layout = adapter_layout(shapes)
    if layout is None:
        return None
    told = weights.metadata
    report = AdapterReport(
        kind=layout.kind,
        algorithms=dict(layout.algorithms),
        modules=dict(sorted(layout.modules.items(), reverse=True)),  # the UNet first
        ranks=dict(layout.ranks),
        embeddings=dict(layout.embeddings),
        base_model=_base_model({**config, **told}),
        trigger_words=_trigger_words(told),
        doubt=_doubt(told, layout.family),
    )
    foreign = foreign_kind(shapes)
    problem = f"it is {foreign[1]}" if foreign else ""
    return layout, report, "" if foreign else SERVES_AS[layout.kind], problem


def title_of(layout: AdapterLayout) -> str:
    """Name an adapter in a report.

    Args:
        layout: its layout.

    Returns:
        A few words.
    """
    family = "" if layout.family == "unknown" else f" for {title_of_kind(layout.family)}"
    return f"{TITLES[layout.kind]}{family}"


def _base_model(told: Mapping[str, Any]) -> str:
    names = (told.get(key) for key in BASE_MODEL)
    return ", ".join(dict.fromkeys(name for name in names if isinstance(name, str) and name not in ("", "None")))


def _trigger_words(told: Mapping[str, str]) -> tuple[str, ...]:
    phrase = told.get("modelspec.trigger_phrase", "")
    counts: Counter[str] = Counter()
    try:
        tables: Any = json.loads(told.get("ss_tag_frequency", "{}"))
        for table in tables.values():
            counts.update({str(word).strip(): int(count) for word, count in table.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):  # metadata are a hint only
        counts.clear()
    return (*filter(None, [phrase]), *(word for word, _ in counts.most_common(MOST_WORDS)))


def _doubt(told: Mapping[str, str], family: str) -> str:
    """Say where the metadata tell another family than names and shapes do."""
    tables = {"ss_base_model_version": BASES, "modelspec.architecture": ARCHITECTURES}
    for key, table in tables.items():
        value = told.get(key, "").lower()
        claimed = next((kind for start, kind in table.items() if value.startswith(start)), None)
        if claimed is not None and family not in (claimed, "unknown"):
            return f"its metadata name {title_of_kind(claimed)}, and its tensors are for {title_of_kind(family)}"
    return ""
