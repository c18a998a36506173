"""Sampling: noise schedules, samplers, and the denoiser that joins them to a UNet. It knows torch only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdinpaint.on_demand import exports
from sdinpaint.sampling import samplers, schedules
from sdinpaint.sampling.registry import SAMPLERS, Sampler, Spacing, find_sampler, find_spacing, resolve, schedule

if TYPE_CHECKING:
    from sdinpaint.sampling.conditioning import Conditioning, stack
    from sdinpaint.sampling.denoiser import Denoiser
    from sdinpaint.sampling.guidance import Guidance, guide, rescale_guidance
    from sdinpaint.sampling.masked import Known, blend_known, blend_soft, restore_known, soft_masks, start_soft

__all__ = [
    "SAMPLERS",
    "Conditioning",
    "Denoiser",
    "Guidance",
    "Known",
    "Sampler",
    "Spacing",
    "blend_known",
    "blend_soft",
    "find_sampler",
    "find_spacing",
    "guide",
    "rescale_guidance",
    "resolve",
    "restore_known",
    "samplers",
    "schedule",
    "schedules",
    "soft_masks",
    "stack",
    "start_soft",
]

# Found on first use: the list of samplers need not wait for torch.
_HOMES = {
    **dict.fromkeys(("Conditioning", "stack"), "conditioning"),
    "Denoiser": "denoiser",
    **dict.fromkeys(("Guidance", "guide", "rescale_guidance"), "guidance"),
    **dict.fromkeys(("Known", "blend_known", "blend_soft", "restore_known", "soft_masks", "start_soft"), "masked"),
}

__getattr__, __dir__ = exports(__name__, _HOMES, __all__)
