"""What a checkpoint is, and why: read from headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import outside_keys
from sdinpaint_weights.reader import open_weights

from sdinpaint.errors import SdInpaintError
from sdinpaint.loading import Checkpoint, open_checkpoint

__all__ = ["Report", "inspect"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `inspect` found; every field is plain data."""

    path: str
    title: str
    family: str
    layout: str
    in_channels: int | None
    prediction: str | None
    has_ema: bool
    parameters: dict[str, int]
    """Component -> count."""
    dtypes: dict[str, dict[str, int]]
    """Component -> {dtype: tensors}."""
    junk: tuple[str, ...]
    """Keys that belong to no component."""
    why: tuple[str, ...]
    problem: str
    """What keeps it from loading; empty if nothing does."""

    @property
    def dtype(self) -> str:
        """The dtype of all tensors, or "mixed"."""
        kinds = {kind for counts in self.dtypes.values() for kind in counts}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def to_json(self) -> dict[str, Any]:
        """Every field by name."""
        return {**asdict(self), "dtype": self.dtype}

    def __str__(self) -> str:
        total = sum(self.parameters.values())
        lines = [
            f"{self.path}: {self.title}",
            f"  family      {self.family}, layout {self.layout}, {self.in_channels or 'no'} input channels",
            f"  prediction  {self.prediction or 'unknown'}",
            f"  averages    {'EMA weights of the UNet are there' if self.has_ema else 'no EMA weights'}",
            f"  parameters  {total:,}",
        ]
        for component, count in self.parameters.items():
            kinds = ", ".join(f"{kind} x {tensors}" for kind, tensors in self.dtypes[component].items())
            lines.append(f"    {component:<13} {count:>13,}  {kinds}")
        if self.junk:
            lines.append(f"  junk        {len(self.junk)} tensors of no model, e.g. {', '.join(self.junk[:5])}")
        lines += [f"  because     {sentence}" for sentence in self.why if sentence not in self.problem]
        lines.append(
            f"  does not load: {self.problem}" if self.problem else "  loads       every tensor is accounted for"
        )
        return "\n".join(lines)


def inspect(source: str | Path, *, variant: str | None = None) -> Report:
    """Say what a checkpoint file or folder is, why, and what keeps it from loading if anything does.

    Reads headers only. Raises: CheckpointError for what is no readable weights file or folder.
    """
    try:
        checkpoint = open_checkpoint(source, variant=variant)
    except SdInpaintError as error:
        return _report_foreign(Path(source), error)
    problem = ""
    try:
        checkpoint.build()
    except SdInpaintError as error:
        problem = str(error)
    return _report(checkpoint, problem)


def _report(checkpoint: Checkpoint, problem: str) -> Report:
    family, unet = checkpoint.family, checkpoint.layouts["unet"]
    kinds = {
        name: Counter(_plain(state.weights.dtype(source.key)) for source in state.sources.values())
        for name, state in checkpoint.states.items()
    }
    reasons = dict.fromkeys(sentence for layout in checkpoint.layouts.values() for sentence in layout.why)
    notes = dict.fromkeys(note for state in checkpoint.states.values() for note in state.notes)
    return Report(
        path=str(checkpoint.path),
        title=unet.title if checkpoint.folder is None else "a Stable Diffusion 1 model in a diffusers folder",
        family=family.name,
        layout=unet.naming if checkpoint.folder is None else "diffusers",
        in_channels=family.unet.in_channels,
        prediction=family.schedule.prediction,
        has_ema=unet.has_ema,
        parameters={
            name: sum(prod(shape) for shape in state.shapes().values()) for name, state in checkpoint.states.items()
        },
        dtypes={name: dict(counts) for name, counts in kinds.items()},
        junk=checkpoint.outside,
        why=(*reasons, *notes),
        problem=problem,
    )


def _report_foreign(path: Path, error: SdInpaintError) -> Report:
    """A readable file that is no model of ours: what it is instead."""
    if path.is_dir() or not path.exists():
        raise error
    weights = open_weights(path)
    layout = identify(weights.shapes())
    components = layout.components or ("tensors",)
    counts = dict.fromkeys(components, 0)
    kinds: dict[str, Counter[str]] = {name: Counter() for name in components}
    for key in weights:
        name = next((name for name in components if key.startswith(layout.prefixes.get(name, ""))), None)
        if name is not None:
            counts[name] += prod(weights.shape(key))
            kinds[name][_plain(weights.dtype(key))] += 1
    return Report(
        path=str(path),
        title=layout.title,
        family=layout.family,
        layout=layout.layout,
        in_channels=layout.in_channels,
        prediction=None,
        has_ema=layout.has_ema,
        parameters=counts,
        dtypes={name: dict(found) for name, found in kinds.items()},
        junk=outside_keys(weights, layout) if layout.prefixes else (),
        why=layout.why,
        problem=str(error),
    )


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
