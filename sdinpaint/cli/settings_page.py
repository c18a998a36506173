"""Format the settings of an image that sdinpaint wrote as a page of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdinpaint_weights.errors import LINE, shown

__all__ = ["settings_page"]

FIRST = ("prompt", "negative_prompt", "seed")


def settings_page(path: str, settings: Mapping[str, Any]) -> str:
    """Format the settings of an image for a person to read.

    Args:
        path: the image file.
        settings: the settings that it holds.

    Returns:
        A title and one line for each fact.
    """
    manifest = settings.get("manifest")
    made = manifest if isinstance(manifest, Mapping) else {}
    title = f"{path}: {made.get('kind', 'an image')} by sdinpaint {made.get('sdinpaint', '')}".rstrip()
    rows = list(_rows(settings, made))
    width = max((len(name) for name, _ in rows), default=0)
    lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    return "\n".join(shown(line, LINE) for line in lines)


def _rows(settings: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in FIRST:
        if settings.get(name) not in (None, ""):
            yield name.replace("_", " "), str(settings[name])
    others = [f"{name}={value}" for name, value in settings.items() if name not in (*FIRST, "manifest")]
    for start in range(0, len(others), 4):
        yield "" if start else "settings", ", ".join(others[start : start + 4])
    if "model" in made:
        with_it = ", ".join(f"{name}={value}" for name, value in made.get("load", {}).items())
        yield "model", f"{made['model']} ({made.get('family')})" + f", loaded with {with_it}" * bool(with_it)
        for number, one in enumerate(made.get("adapters", [])):
            yield "" if number else "adapters", _adapter(one)
        yield "computed", f"in {made.get('dtype')} on {made.get('device')}, torch {made.get('torch')}"
    for name in ("image", "mask"):
        if isinstance(made.get(name), Mapping):
            yield name, _input(made[name])
    if made.get("also"):
        yield "also given", ", ".join(map(str, made["also"]))
    for number, (name, digest) in enumerate(made.get("weights", {}).items()):
        yield "" if number else "weights", f"{name} {str(digest)[:12]}..."


def _adapter(record: Mapping[str, Any]) -> str:
    weights = [f"{name}={record[name]}" for name in ("weight", "text_weight", "blocks") if record.get(name) is not None]
    facts = ", ".join([*weights, f"sha256 {str(record.get('sha256'))[:12]}..."])
    return f"{record.get('kind')} {record.get('name')}, {record.get('source')}: {facts}"


def _input(record: Mapping[str, Any]) -> str:
    height, width = record.get("size", ("?", "?"))
    facts = [f"{width} x {height} pixels", f"sha256 {str(record.get('sha256'))[:12]}..."]
    if "share" in record:
        facts.insert(1, f"{100 * record['share']:.1f}% repainted")
    return f"{record.get('path') or 'from memory'}: {', '.join(facts)}"
