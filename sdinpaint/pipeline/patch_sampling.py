"""Sampling of patches of one size, as one batch through the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdinpaint.errors import already_warned
from sdinpaint.images.input_image import to_uint8
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.masks import masked_image, to_latent
from sdinpaint.pipeline.control import Control, inpaint_hint
from sdinpaint.pipeline.doubts import result_doubts
from sdinpaint.pipeline.patches import Patch
from sdinpaint.pipeline.settings import Settings
from sdinpaint.sampling import (
    Conditioning,
    Denoiser,
    Known,
    blend_known,
    blend_soft,
    find_sampler,
    find_spacing,
    restore_known,
    schedule,
    schedules,
    soft_masks,
    stack,
    start_soft,
)
from sdinpaint.sampling.noise import Draws
from sdinpaint.sampling.samplers import Denoise, OnStep

__all__ = ["PatchSampling", "Watch"]

Watch = Callable[..., Any]
"""watch(stage, done, total, x0=None), called where a stage begins and for each of its units."""


class PatchSampling:
    """Patches of one padded size on their way through the models; noise is drawn in the order of diffusers' pipelines.

    Args:
        pipe: the models.
        settings: settings of the run, resolved.
        patches: the patches.
        draws: noise, of one generator for each of them.
        masked: whether known pixels are shown and kept.
        watch: told of the stages.
        on_step: the caller's function for every step.
    """

    def __init__(
        self,
        pipe: LatentDiffusion,
        settings: Settings,
        patches: Sequence[Patch],
        draws: Draws,
        *,
        masked: bool,
        watch: Watch,
        on_step: OnStep | None = None,
    ) -> None:
        self.pipe, self.settings, self.patches, self.draws, self.masked = pipe, settings, patches, draws, masked
        self._watch, self._on_step = watch, on_step
        watch("encode", 0, 1)
        self._from_image = settings.strength < 1 or not masked
        self._image = self._stacked([patch.image for patch in patches])
        self._amount = self._stacked([patch.amount for patch in patches])
        hole = (self._amount > 0).to(self._amount.dtype)
        mask = self._to_latent(hole)
        like = mask.expand(-1, pipe.family.vae.latent_channels, -1, -1)

        start = self._stacked([patch.start for patch in patches])
        first = self._from_image or not pipe.takes_mask
        latents = pipe.sample_latents(start, draws) if first else None
        given = [patch.item.noise for patch in patches if patch.item.noise is not None]
        self._noise = self._stacked(given) if given else draws(like)
        # a 4-channel model does not see the masked image; diffusers draws for it nevertheless, where there is a mask
        self._posterior = draws(like) if masked or pipe.takes_mask else like
        # a soft mask is another one in every step
        shown = pipe.takes_mask and not settings.soft
        masked_latents = self._masked_latents(hole) if shown else torch.zeros_like(self._noise)
        if settings.soft and latents is None:
            latents = pipe.sample_latents(start, draws)
        if self._from_image and settings.fill == "noise":
            filled = self._to_latent((self._amount >= 0.5).to(hole.dtype))
            latents = torch.where(filled > 0, draws(like), cast(Tensor, latents))
        self.known = Known(mask, masked_latents, latents)
        self.doubts: list[str | None] = []
        """After the call, a sentence for each patch that is probably no image."""

    def __call__(self) -> NDArray[np.uint8]:
        """Sample and decode: what the models make of the patches, uint8 (B, 8H, 8W, 3)."""
        settings = self.settings
        sigmas = schedule(settings.sampler, settings.spacing, self.pipe.family.schedule, settings.steps)
        if self._from_image:
            sigmas = schedules.for_strength(sigmas, settings.strength)
            x = schedules.start_from(cast(Tensor, self.known.latents), self._noise, sigmas)
        else:
            spacing = find_spacing(settings.sampler, settings.spacing)
            x = schedules.start(self._noise, sigmas, unit_variance=spacing.unit_variance)
        latents = self._sampled(x, sigmas)
        self._watch("decode", 0, 1)
        decoded = self.pipe.decode(latents)
        self.doubts = result_doubts(latents, self.known.mask, decoded, self._amount)
        images = to_uint8(decoded)
        self._watch("decode", 1, 1)
        return images

    def _sampled(self, x: Tensor, sigmas: Tensor) -> Tensor:
        """Run all steps from the start x, and return the finished latents."""
        cond, uncond = self._conditions()
        steps = len(sigmas) - 1

        def advance(step: int, x: Tensor, x0: Tensor) -> Any:
            self._watch("denoise", step + 1, steps, x0)
            return None if self._on_step is None else self._on_step(step, x, x0)

        self._watch("encode", 1, 1)
        self._watch("denoise", 0, steps)
        with self._models_of_steps():
            x, denoise, kept = self._keeping(x, self._denoiser(cond, uncond, sigmas), sigmas)
            sampler, eta = find_sampler(self.settings.sampler), cast(float, self.settings.eta)
            options = sampler.options(self.pipe.family.schedule)
            x = sampler.run(denoise, x, sigmas, eta=eta, noise=self.draws, on_step=advance, **options)
        latents = schedules.finish(x, sigmas)
        return latents if kept is None else restore_known(latents, kept)

    def _conditions(self) -> tuple[Conditioning, Conditioning]:
        """Encode prompts and negative prompts; those that were given as conditioning stay what they are."""
        height, width = self._image.shape[-2:]
        items = [patch.item for patch in self.patches]
        both: list[list[Any]] = [[item.prompt for item in items], [item.negative_prompt for item in items]]
        texts = [[one for one in given if not isinstance(one, Conditioning)] for given in both]
        with already_warned():  # by the run, which knows the images
            encoded = iter(self.pipe.encode_prompts([text for text in texts if text], (height, width)))
        of_texts = [next(encoded) if text else None for text in texts]
        cond, uncond = (self._merged(given, of_text) for given, of_text in zip(both, of_texts, strict=True))
        return cond, uncond

    def _merged(self, given: Sequence[Any], of_texts: Conditioning | None) -> Conditioning:
        if of_texts is not None and len(of_texts) == len(given):
            return of_texts
        rest = iter([] if of_texts is None else [of_texts[index : index + 1] for index in range(len(of_texts))])
        parts = [one.to(self.pipe.device) if isinstance(one, Conditioning) else next(rest) for one in given]
        return stack(parts)

    def _models_of_steps(self) -> AbstractContextManager[None]:
        """Keep ready what all steps need; those of a soft mask encode images, too."""
        control = [self.pipe.controlnet] if self.masked and self.pipe.controlnet else []
        return self.pipe.using(self.pipe.unet, *control, *[self.pipe.vae] * self.settings.soft)

    def _denoiser(self, cond: Conditioning, uncond: Conditioning, sigmas: Tensor) -> Denoiser:
        settings = self.settings
        return self.pipe.denoiser(
            self.known,
            cond,
            uncond,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            guidance_start=settings.guidance_start,
            guidance_end=settings.guidance_end,
            control=self._control(self.pipe.controlnet, sigmas) if self.masked and self.pipe.controlnet else None,
            sigmas=sigmas,
        )

    def _control(self, net: nn.Module, sigmas: Tensor) -> Control:
        """Bind the ControlNet to these images and this run."""
        hints = [inpaint_hint(one.image, one.amount) if one.hint is None else one.hint for one in self.patches]
        scale, start, end = self.settings.control_scale, self.settings.control_start, self.settings.control_end
        graphs = self.pipe.control_graphs
        return Control(net, torch.cat(hints), sigmas, scale=scale, start=start, end=end, graphs=graphs)

    def _keeping(self, x: Tensor, denoiser: Denoiser, sigmas: Tensor) -> tuple[Tensor, Denoise, Known | None]:
        """Return start and denoiser with known latents kept in them, and what to restore at the end."""
        if self.settings.soft:
            return self._softly(x, denoiser, sigmas)
        if self.pipe.takes_mask:
            return x, denoiser, None
        return x, blend_known(denoiser, self.known, self._noise, sigmas), self.known

    def _softly(self, x: Tensor, denoiser: Denoiser, sigmas: Tensor) -> tuple[Tensor, Denoise, Known]:
        """Show a binary mask in every step: models were trained on such ones, and on the latents of what they leave."""
        holes = soft_masks(self._amount, len(sigmas) - 1)
        masks = [self._to_latent(hole) for hole in holes]
        latents = cast(Tensor, self.known.latents)
        shown: Tensor | None = None

        def denoise_at(step: int) -> Denoise:
            nonlocal shown, denoiser
            if self.pipe.takes_mask and (shown is None or not torch.equal(holes[step], shown)):
                shown = holes[step]
                denoiser = denoiser.showing((masks[step], self._masked_latents(shown)))
            return denoiser

        x = start_soft(x, latents, self._noise, masks[0], sigmas)
        return x, blend_soft(denoise_at, masks, latents, sigmas), replace(self.known, mask=masks[-1])

    def _masked_latents(self, hole: Tensor) -> Tensor:
        """Encode the images without their hole (B, 1, 8H, 8W), with the same draw for every hole."""
        return self.pipe.sample_latents(masked_image(self._image, hole), lambda _: self._posterior)

    def _to_latent(self, mask: Tensor) -> Tensor:
        return to_latent(mask, self.settings.cover)

    def _stacked(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).to(self.pipe.device)
