"""Masks: 1 or white = repaint, 0 or black = keep."""

from __future__ import annotations

from sdinpaint.masks.reading import binarize, is_empty, masked_image, read_mask, to_latent

__all__ = ["binarize", "is_empty", "masked_image", "read_mask", "to_latent"]
