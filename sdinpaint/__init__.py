"""Latent diffusion for inpainting: change the part of a picture under a mask, keep the rest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sdinpaint.version import __version__

if TYPE_CHECKING:
    from sdinpaint.checkpoints.converting import convert
    from sdinpaint.checkpoints.inspecting import Report, inspect
    from sdinpaint.checkpoints.merging import to_inpainting, widen_input
    from sdinpaint.errors import SdInpaintError, SdInpaintWarning
    from sdinpaint.loading import load, save_diffusers
    from sdinpaint.masks import Mask
    from sdinpaint.pipeline.pipeline import Pipeline
    from sdinpaint.pipeline.results import Result
    from sdinpaint.replaying import replay

__all__ = [
    "Mask",
    "Pipeline",
    "Report",
    "Result",
    "SdInpaintError",
    "SdInpaintWarning",
    "__version__",
    "inspect",
    "load",
]
__all__ += ["convert", "replay", "save_diffusers", "to_inpainting", "widen_input"]

# Found on first use, so that the command line can explain itself without waiting for torch.
_HOMES = {
    "SdInpaintError": "errors",
    "SdInpaintWarning": "errors",
    "Report": "checkpoints.inspecting",
    "inspect": "checkpoints.inspecting",
    "load": "loading",
    "Mask": "masks",
    "convert": "checkpoints.converting",
    "to_inpainting": "checkpoints.merging",
    "widen_input": "checkpoints.merging",
    "save_diffusers": "loading",
    "Pipeline": "pipeline",
    "replay": "replaying",
    "Result": "pipeline.results",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
