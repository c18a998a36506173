"""Latent diffusion for inpainting: change the part of an image under a mask, keep the rest."""

from __future__ import annotations

from sdinpaint.on_demand import TYPE_CHECKING, exports
from sdinpaint.version import __version__

if TYPE_CHECKING:
    from sdinpaint.checkpoints.converting import convert
    from sdinpaint.checkpoints.inspecting import Report, inspect
    from sdinpaint.checkpoints.merging import to_inpainting, widen_input
    from sdinpaint.errors import SdInpaintError, SdInpaintWarning
    from sdinpaint.extracting import extract_lora
    from sdinpaint.load_options import LoadOptions
    from sdinpaint.loading import load, save_diffusers
    from sdinpaint.masks import Mask
    from sdinpaint.pipeline.pipeline import Pipeline
    from sdinpaint.pipeline.requests import Request
    from sdinpaint.pipeline.results import Result
    from sdinpaint.replaying import replay

__all__ = [
    "LoadOptions",
    "Mask",
    "Pipeline",
    "Report",
    "Request",
    "Result",
    "SdInpaintError",
    "SdInpaintWarning",
    "__version__",
    "inspect",
    "load",
]
__all__ += ["convert", "extract_lora", "replay", "save_diffusers", "to_inpainting", "widen_input"]

# Found on first use, so that the command line can explain itself without waiting for torch.
_HOMES = {
    "SdInpaintError": "errors",
    "SdInpaintWarning": "errors",
    "Report": "checkpoints.inspecting",
    "inspect": "checkpoints.inspecting",
    "load": "loading",
    "LoadOptions": "load_options",
    "Mask": "masks",
    "convert": "checkpoints.converting",
    "to_inpainting": "checkpoints.merging",
    "widen_input": "checkpoints.merging",
    "save_diffusers": "loading",
    "Pipeline": "pipeline",
    "replay": "replaying",
    "extract_lora": "extracting",
    "Request": "pipeline.requests",
    "Result": "pipeline.results",
}


__getattr__, __dir__ = exports(__name__, _HOMES, __all__)
