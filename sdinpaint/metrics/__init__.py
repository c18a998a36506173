"""Scores of images: similarity to a reference, and how well repainted pixels match their surroundings."""

from __future__ import annotations

from sdinpaint.metrics.colour import delta_e, to_lab
from sdinpaint.metrics.likeness import psnr, ssim
from sdinpaint.metrics.perceptual import fid, lpips
from sdinpaint.metrics.repainting import Scores, changed, known_error, ring_delta_e, scores, seam

__all__ = [
    "Scores",
    "changed",
    "delta_e",
    "fid",
    "known_error",
    "lpips",
    "psnr",
    "ring_delta_e",
    "scores",
    "seam",
    "ssim",
    "to_lab",
]
