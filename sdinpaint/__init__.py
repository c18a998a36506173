"""Latent diffusion for inpainting: change the part of a picture under a mask, keep the rest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdinpaint.converting import convert
    from sdinpaint.errors import SdInpaintError, SdInpaintWarning
    from sdinpaint.inspecting import Report, inspect
    from sdinpaint.loading import load, save_diffusers
    from sdinpaint.masks import Mask
    from sdinpaint.merging import to_inpainting, widen_input
    from sdinpaint.pipeline import Pipeline
    from sdinpaint.results import Result

__version__ = "0.1.0"

__all__ = ["Mask", "Pipeline", "Report", "Result", "SdInpaintError", "SdInpaintWarning", "inspect", "load"]
__all__ += ["convert", "save_diffusers", "to_inpainting", "widen_input"]

# Found on first use, so that the command line can explain itself without waiting for torch.
_HOMES = {
    "SdInpaintError": "errors",
    "SdInpaintWarning": "errors",
    "Report": "inspecting",
    "inspect": "inspecting",
    "load": "loading",
    "Mask": "masks",
    "convert": "converting",
    "to_inpainting": "merging",
    "widen_input": "merging",
    "save_diffusers": "loading",
    "Pipeline": "pipeline",
    "Result": "results",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
