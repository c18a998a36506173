"""Latent diffusion for inpainting: change the part of a picture under a mask, keep the rest."""

from sdinpaint.errors import SdInpaintError, SdInpaintWarning
from sdinpaint.inspecting import Report, inspect
from sdinpaint.loading import load, save_diffusers
from sdinpaint.pipeline import Pipeline, Result

__version__ = "0.1.0"

__all__ = ["Pipeline", "Report", "Result", "SdInpaintError", "SdInpaintWarning", "inspect", "load", "save_diffusers"]
