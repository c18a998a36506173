"""Masks: 1 or white = repaint, 0 or black = keep."""

from __future__ import annotations

from sdinpaint.masks.mask import Mask
from sdinpaint.masks.reading import binarize, is_empty, masked_image, read_mask, to_latent
from sdinpaint.masks.report import Cover, MaskReport, report

__all__ = ["Cover", "Mask", "MaskReport", "binarize", "is_empty", "masked_image", "read_mask", "report", "to_latent"]
