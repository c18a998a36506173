"""Doubts that are told as warnings: what a caller may not have meant, and results that are no images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sdinpaint.pipeline.requests import Request, image_name
from sdinpaint.pipeline.settings import Settings
from sdinpaint.text.conditioning import TextConditioner
from sdinpaint.text.embeddings import without_embeddings
from sdinpaint.text.foreign import foreign_syntax

__all__ = ["request_doubts", "result_doubts"]

HIGH_GUIDANCE = 30.0
LATENTS = (0.01, 4.0)
"""Bounds of the root mean square of finished latents; those of images have 0.5 to 2, up to 3 with much guidance."""
BRIGHTEST = 1.2
"""Bound of the root mean square of decoded values; black and white have 1."""
FLATTEST = 1e-3
"""Bound of the standard deviation of decoded values, an eighth of a level of 255; a VAE's plain areas have more."""


def request_doubts(
    request: Request, settings: Settings, condition: TextConditioner
) -> Iterator[tuple[int | None, str]]:
    """Say what the caller may not have meant: of the settings, and of each image by its index.

    Args:
        request: the request.
        settings: its settings, resolved.
        condition: the text encoders of the model.

    Yields:
        Index of an image, None for the whole run, and a sentence.
    """
    if settings.guidance_scale > HIGH_GUIDANCE:
        yield None, f"guidance_scale {settings.guidance_scale:g} is very high: colours will burn out; 5 to 10 is usual"
    if 0 < settings.strength * settings.steps < 1:
        share = f"strength {settings.strength:g} of {settings.steps} steps is less than one step"
        yield None, f"{share}: one is run, as with strength {1 / settings.steps:g}"
    for index, item in enumerate(request.items):
        if item is None:
            continue
        name = image_name(index, len(request))
        if settings.strength == 0:
            yield index, f"{name}strength is 0, so the image comes back unchanged"
        elif not item.hole.any():
            reason = item.mask.report().warnings[0]
            yield index, f"{name}the mask is empty, so the image comes back unchanged: {reason}"
        else:
            prompts = {"prompt": item.prompt, "negative_prompt": item.negative_prompt}
            for argument, prompt in prompts.items():
                if isinstance(prompt, str):
                    plain = without_embeddings(prompt, condition.embeddings.values())
                    for doubt in (*filter(None, [condition.doubt(prompt)]), *foreign_syntax(plain)):
                        yield index, f"{name}{argument} {doubt}"
            if item.image.old is None and not settings.soft:
                for warning in item.mask.report(settings.cover).warnings:
                    yield index, f"{name}mask: {warning}"


def result_doubts(latents: Tensor, mask: Tensor, decoded: Tensor, hole: Tensor) -> list[str | None]:
    """Say which images are burnt or flat where they were repainted, whatever made them so.

    Args:
        latents: finished latents (B, C, H, W).
        mask: above 0 where they were generated (B, 1, H, W).
        decoded: decoded images (B, 3, 8H, 8W), about in [-1, 1].
        hole: above 0 where they are repainted (B, 1, 8H, 8W).

    Returns:
        A sentence for each image, None where there is no doubt.
    """
    latent = _mean(latents.square(), mask).mean(1).sqrt()
    brightness = _mean(decoded.square(), hole).mean(1).sqrt()
    spread = _mean((decoded - _mean(decoded, hole)[..., None, None]).square(), hole).amax(1).sqrt()
    return [_doubt(*values) for values in torch.stack([latent, brightness, spread], 1).tolist()]


def _doubt(latent: float, brightness: float, spread: float) -> str | None:
    if not LATENTS[0] <= latent <= LATENTS[1]:
        found = f"latents have a root mean square of {latent:.3g}, and those of images about 1"
    elif brightness > BRIGHTEST:
        found = f"decoded values have a root mean square of {brightness:.3g}, and white has 1"
    elif spread < FLATTEST:
        found = f"decoded values have a standard deviation of {spread:.3g}"
    else:
        return None
    return f"what was repainted is probably burnt or flat: its {found}"


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean (B, C) of values (B, C, H, W) where a mask (B, 1, H, W) is above 0."""
    inside = (where > 0).to(values)
    return (values * inside).sum((2, 3)) / inside.sum((2, 3))
