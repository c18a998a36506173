"""Inpainting on a loaded model: requests, their settings, the run, and its results."""

from sdinpaint.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
