"""Sampling: noise schedules, samplers, and the denoiser that joins them to a UNet. It knows torch only."""

from sdinpaint.sampling import samplers, schedules
from sdinpaint.sampling.denoiser import Conditioning, Denoiser
from sdinpaint.sampling.masked import Known, blend_known, blend_soft, restore_known, soft_masks, start_soft
from sdinpaint.sampling.registry import SAMPLERS, Sampler, Spacing, find_sampler, find_spacing, resolve, schedule

__all__ = [
    "SAMPLERS",
    "Conditioning",
    "Denoiser",
    "Known",
    "Sampler",
    "Spacing",
    "blend_known",
    "blend_soft",
    "find_sampler",
    "find_spacing",
    "resolve",
    "restore_known",
    "samplers",
    "schedule",
    "schedules",
    "soft_masks",
    "start_soft",
]
