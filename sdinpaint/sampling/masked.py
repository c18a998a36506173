"""Keeping what is known of a picture while a model samples: by a mask, or by one for every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdinpaint.errors import SettingError
from sdinpaint.sampling import schedules
from sdinpaint.sampling.samplers import Denoise

ROUNDING = 1e-4
"""More than float32 loses of a share of at most 1000 steps."""


@dataclass(frozen=True)
class Known:
    """What the picture says: `mask` (B, 1, H, W), 1 = repaint; `masked_latents` and `latents` (B, 4, H, W).

    `latents` are those of the whole picture, encoded where strength < 1 or a 4-channel model needs them.
    """

    mask: Tensor
    masked_latents: Tensor
    latents: Tensor | None = None


def blend_known(denoise: Denoise, known: Known, noise: Tensor, sigmas: Tensor) -> Denoise:
    """Let a 4-channel model inpaint: where the mask is 0, it sees the picture under always the same `noise`.

    At sigmas[0] x is as the run's start made it. A sampler's own x is not touched, so end with `restore_known`.
    For a binary mask both together equal what diffusers does: blend x after every step, with clean latents at the last.
    """
    first = float(sigmas[0])
    latents = _whole_latents(known)

    def blended(x: Tensor, sigma: float) -> Tensor:
        if sigma < first:
            x = _keep(latents + sigma * noise, x, known.mask)
        return _keep(latents, denoise(x, sigma), known.mask)

    return blended


def soft_masks(amounts: Tensor, steps: int) -> list[Tensor]:
    """How much of each cell is to change, (B, 1, H, W) in [0, 1] -> for every step the cells that change in it.

    A cell of amount a changes in the last floor(a * steps) steps, as a whole picture does with a as its strength.
    Source: Levin and Fried 2023, Differential Diffusion, section 3.
    """
    runs = (amounts * steps + ROUNDING).floor()
    return [(runs >= steps - step).to(amounts.dtype) for step in range(steps)]


def start_soft(x: Tensor, latents: Tensor, noise: Tensor, mask: Tensor, sigmas: Tensor) -> Tensor:
    """A run's start x, with the picture under its noise where the first step's `mask` is 0."""
    return _keep(schedules.start_from(latents, noise, sigmas), x, mask)


def blend_soft(
    denoise_at: Callable[[int], Denoise], masks: Sequence[Tensor], latents: Tensor, sigmas: Tensor
) -> Denoise:
    """Denoise with `denoise_at(step)` where that step's mask is 1; elsewhere x0 is the picture, as if it were perfect.

    From `start_soft`, a cell is so the picture under the noise of its sigma until its first step, whatever the sampler.
    End with `restore_known` by the last mask.
    """

    def blended(x: Tensor, sigma: float) -> Tensor:
        step = schedules.step_at(sigmas, sigma)
        return _keep(latents, denoise_at(step)(x, sigma), masks[step])

    return blended


def restore_known(latents: Tensor, known: Known) -> Tensor:
    """Finished latents (B, 4, H, W), with the picture's own where the mask is 0."""
    return _keep(_whole_latents(known), latents, known.mask)


def _keep(kept: Tensor, repainted: Tensor, mask: Tensor) -> Tensor:
    return torch.lerp(kept.to(repainted.dtype), repainted, mask.to(repainted.dtype))


def _whole_latents(known: Known) -> Tensor:
    if known.latents is None:
        raise SettingError(
            "SETTING_KNOWN_LATENTS",
            "known.latents",
            "None",
            expected="the latents of the whole picture",
            hint="a 4-channel model keeps the known area by its latents: encode the picture with them",
        )
    return known.latents
