"""The settings of an image as text in AUTOMATIC1111's form, which most programs read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["SAMPLER_NAMES", "parameters", "part"]

LABELS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "spacing": "Schedule type",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "strength": "Denoising strength",
    "sdinpaint": "Version",
}
"""Setting -> its label in AUTOMATIC1111's web UI, in the order of its texts."""
SAMPLER_NAMES = {"ddim": "DDIM", "euler": "Euler", "euler_ancestral": "Euler a", "dpmpp_2m": "DPM++ 2M"}
SCHEDULE_TYPES = {"karras": "Karras", "linspace": "Uniform"}
"""Spacings that A1111 knows; without one, it assumes Karras for DPM++ 2M."""
PLAIN = re.compile(r"[\w.+/-]+( +[\w.+/-]+)*")
"""A value that readers of the text take as it stands; any other is quoted as in JSON."""
TAKEN_FOR_FIELDS = re.compile(r"\s*\n\s*(?=Negative prompt:|Steps:)")
"""A line break in a prompt, where readers would take the next line for the fields after the prompt."""


def parameters(record: Mapping[str, Any]) -> str:
    """Write settings as text in A1111's form.

    Args:
        record: the settings as JSON values, by name.

    Returns:
        The text.

    Source: A1111's modules/infotext_utils.py.
    """
    lines = [_as_prompt(record.get("prompt"))]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {_as_prompt(record['negative_prompt'])}")
    known = {**part(record, "manifest"), **record}
    values = {label: _as_a1111(key, known.get(key)) for key, label in LABELS.items()}
    lines.append(", ".join(f"{label}: {_quoted(value)}" for label, value in values.items() if value))
    return "\n".join(lines).encode("utf-8", "replace").decode()


def _as_prompt(value: Any) -> str:
    return TAKEN_FOR_FIELDS.sub(" ", "" if value is None else str(value))


def _as_a1111(key: str, value: Any) -> str:
    """Write a setting in A1111's words; return an empty text where it has none."""
    text = "" if value is None else str(value)
    match key:
        case "sampler":
            return SAMPLER_NAMES.get(text, text)
        case "spacing":
            return SCHEDULE_TYPES.get(text, "")
        case "size" if isinstance(value, list):
            return "x".join(map(str, value))
        case "model":
            return text and re.sub(r"\.(safetensors|ckpt|pth)$", "", Path(text).name)
        case "sdinpaint":
            return text and f"sdinpaint {text}"
    return text


def _quoted(value: str) -> str:
    return value if PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def part(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Look up a dictionary among settings.

    Args:
        record: the settings.
        key: name of the dictionary.

    Returns:
        The dictionary itself; an empty one where there is none.
    """
    found = record.get(key)
    return found if isinstance(found, dict) else {}
