"""Known latents are kept while a model samples, by one mask or by one for every step."""

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
    """Inpainting conditioning: the mask, and latents of the image.

    Args:
        mask: mask on the latent grid (B, 1, H, W), 1 = repaint.
        masked_latents: latents of the image without its hole (B, 4, H, W).
        latents: latents of the whole image (B, 4, H, W), needed where strength < 1 or by a 4-channel model.
    """

    mask: Tensor
    masked_latents: Tensor
    latents: Tensor | None = None


def blend_known(denoise: Denoise, known: Known, noise: Tensor, sigmas: Tensor) -> Denoise:
    """Let a 4-channel model inpaint: where the mask is 0, it sees the image, always under the same noise.

    A sampler's own x is not touched, so end with `restore_known`. For a binary mask both together equal what diffusers
    does: blend x after every step, with clean latents at the last.

    Args:
        denoise: denoise(x, sigma) -> x0.
        known: mask and latents of the whole image.
        noise: unit noise (B, 4, H, W), that of the run's start.
        sigmas: noise levels of the run, falling (n + 1,).

    Returns:
        A function like `denoise`.

    Raises:
        SettingError: `known` has no latents of the whole image.
    """
    first = float(sigmas[0])
    latents = _whole_latents(known)

    def blended(x: Tensor, sigma: float) -> Tensor:
        if sigma < first:
            x = _keep(latents + sigma * noise, x, known.mask)
        return _keep(latents, denoise(x, sigma), known.mask)

    return blended


def soft_masks(amounts: Tensor, steps: int) -> list[Tensor]:
    """Turn the strength of each cell into a binary mask for every step.

    A cell of strength s changes in the last floor(s * steps) steps, as a whole image does with s as its strength.

    Args:
        amounts: strength of each cell (B, 1, H, W) in [0, 1].
        steps: number of steps of the run.

    Returns:
        One mask (B, 1, H, W) for each step, 1 where a cell changes.

    Source: Levin and Fried 2023, Differential Diffusion, section 3.
    """
    runs = (amounts * steps + ROUNDING).floor()
    return [(runs >= steps - step).to(amounts.dtype) for step in range(steps)]


def start_soft(x: Tensor, latents: Tensor, noise: Tensor, mask: Tensor, sigmas: Tensor) -> Tensor:
    """Return the start of a run, with the noised image where the first step's mask is 0.

    Args:
        x: start of the run (B, 4, H, W).
        latents: latents of the image (B, 4, H, W).
        noise: unit noise (B, 4, H, W).
        mask: mask of the first step (B, 1, H, W).
        sigmas: noise levels of the run, falling (n + 1,).

    Returns:
        The start (B, 4, H, W).
    """
    return _keep(schedules.start_from(latents, noise, sigmas), x, mask)


def blend_soft(
    denoise_at: Callable[[int], Denoise], masks: Sequence[Tensor], latents: Tensor, sigmas: Tensor
) -> Denoise:
    """Denoise where each step's mask is 1; elsewhere the image itself is the prediction.

    From `start_soft` on, a cell is so the image under the noise of its sigma until its first step, whatever the
    sampler. End with `restore_known` by the last mask.

    Args:
        denoise_at: denoise_at(step) -> denoise(x, sigma).
        masks: one mask (B, 1, H, W) for each step.
        latents: latents of the image (B, 4, H, W).
        sigmas: noise levels of the run, falling (n + 1,).

    Returns:
        A function denoise(x, sigma) -> x0.
    """

    def blended(x: Tensor, sigma: float) -> Tensor:
        step = schedules.step_at(sigmas, sigma)
        return _keep(latents, denoise_at(step)(x, sigma), masks[step])

    return blended


def restore_known(latents: Tensor, known: Known) -> Tensor:
    """Put the image's own latents back where the mask is 0.

    Args:
        latents: finished latents (B, 4, H, W).
        known: mask and latents of the whole image.

    Returns:
        The latents (B, 4, H, W).

    Raises:
        SettingError: `known` has no latents of the whole image.
    """
    return _keep(_whole_latents(known), latents, known.mask)


def _keep(kept: Tensor, repainted: Tensor, mask: Tensor) -> Tensor:
    return torch.lerp(kept.to(repainted.dtype), repainted, mask.to(repainted.dtype))


def _whole_latents(known: Known) -> Tensor:
    if known.latents is None:
        raise SettingError(
            "SETTING_KNOWN_LATENTS",
            "known.latents",
            "None",
            expected="the latents of the whole image",
            hint="a 4-channel model keeps the known area by its latents: encode the image with them",
        )
    return known.latents
