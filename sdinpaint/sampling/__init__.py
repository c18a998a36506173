"""Sampling: noise schedules, samplers, and the denoiser that joins them to a UNet. It knows torch only."""

from sdinpaint.sampling import samplers, schedules
from sdinpaint.sampling.denoiser import Conditioning, Denoiser, Known, blend_known, restore_known
from sdinpaint.sampling.presets import SAMPLERS, Sampler, Spacing, find_sampler, find_spacing, schedule

__all__ = [
    "SAMPLERS",
    "Conditioning",
    "Denoiser",
    "Known",
    "Sampler",
    "Spacing",
    "blend_known",
    "find_sampler",
    "find_spacing",
    "restore_known",
    "samplers",
    "schedule",
    "schedules",
]
