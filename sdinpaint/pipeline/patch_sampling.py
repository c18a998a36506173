"""Views of one size, as one batch through the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdinpaint.images.picture import to_uint8
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.masks import Cover, masked_image, to_latent
from sdinpaint.pipeline.control import Control, inpaint_hint
from sdinpaint.pipeline.patches import View
from sdinpaint.pipeline.settings import Settings
from sdinpaint.progress import progress_bar
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
    start_soft,
)
from sdinpaint.sampling.noise import Draws
from sdinpaint.sampling.samplers import Denoise

__all__ = ["Batch", "OnStep"]

OnStep = Callable[[int, Tensor, Tensor], object]


class Batch:
    """Views of one padded size, as the models are shown them; noise is drawn in the order of diffusers' pipelines.

    `masked`: whether the pictures' known pixels are shown and kept.
    """

    def __init__(
        self, pipe: LatentDiffusion, settings: Settings, views: Sequence[View], draws: Draws, *, masked: bool
    ) -> None:
        self.pipe, self.settings, self.views, self.draws, self.masked = pipe, settings, views, draws, masked
        self._from_picture = settings.strength < 1 or not masked
        self._image = self._stacked([view.image for view in views])
        self._amount = self._stacked([view.amount for view in views])
        hole = (self._amount > 0).to(self._amount.dtype)
        mask = self._to_latent(hole)
        like = mask.expand(-1, pipe.family.vae.latent_channels, -1, -1)

        start = self._stacked([view.start for view in views])
        first = self._from_picture or not pipe.takes_mask
        latents = pipe.sample_latents(start, draws) if first else None
        given = [view.job.noise for view in views if view.job.noise is not None]
        self._noise = self._stacked(given) if given else draws(like)
        # a 4-channel model is not shown the masked picture; diffusers draws for it nevertheless, where there is a mask
        self._posterior = draws(like) if masked or pipe.takes_mask else like
        # of a soft mask every step has its own
        shown = pipe.takes_mask and not settings.soft
        masked_latents = self._masked_latents(hole) if shown else torch.zeros_like(self._noise)
        if settings.soft and latents is None:
            latents = pipe.sample_latents(start, draws)
        if self._from_picture and settings.fill == "noise":
            filled = self._to_latent((self._amount >= 0.5).to(hole.dtype))
            latents = torch.where(filled > 0, draws(like), cast(Tensor, latents))
        self.known = Known(mask, masked_latents, latents)

    def repaint(self, progress: bool, on_step: OnStep | None) -> NDArray[np.uint8]:
        """What the models make of the views: uint8 (B, 8H, 8W, 3)."""
        settings, schedule_config = self.settings, self.pipe.family.schedule
        sigmas = schedule(settings.sampler, settings.spacing, schedule_config, settings.steps)
        if self._from_picture:
            sigmas = schedules.for_strength(sigmas, settings.strength)
            x = schedules.start_from(cast(Tensor, self.known.latents), self._noise, sigmas)
        else:
            spacing = find_spacing(settings.sampler, settings.spacing)
            x = schedules.start(self._noise, sigmas, unit_variance=spacing.unit_variance)
        return to_uint8(self.pipe.decode(self._sampled(x, sigmas, progress, on_step)))

    def _sampled(self, x: Tensor, sigmas: Tensor, progress: bool, on_step: OnStep | None) -> Tensor:
        """A run's start x -> its finished latents."""
        jobs = [view.job for view in self.views]
        height, width = self._image.shape[-2:]
        texts: list[list[str | None]] = [[job.prompt for job in jobs], [job.negative_prompt for job in jobs]]
        cond, uncond = self.pipe.encode_prompts(texts, (height, width))
        title = "inpaint" if self.masked else "vary"
        with self._models_of_steps(), progress_bar(len(sigmas) - 1, title, show=progress) as bar:

            def advance(step: int, x: Tensor, x0: Tensor) -> None:
                bar.update()
                if on_step is not None:
                    on_step(step, x, x0)

            x, denoise, kept = self._keeping(x, self._denoiser(cond, uncond, sigmas), sigmas)
            sampler, eta = find_sampler(self.settings.sampler), cast(float, self.settings.eta)
            x = sampler.run(denoise, x, sigmas, eta=eta, noise=self.draws, on_step=advance)
        latents = schedules.finish(x, sigmas)
        return latents if kept is None else restore_known(latents, kept)

    def _models_of_steps(self) -> AbstractContextManager[None]:
        """What stays ready through all steps; those of a soft mask encode pictures, too."""
        control = [self.pipe.controlnet] if self.masked and self.pipe.controlnet else []
        return self.pipe.using(self.pipe.unet, *control, *[self.pipe.vae] * self.settings.soft)

    def _denoiser(self, cond: Conditioning, uncond: Conditioning, sigmas: Tensor) -> Denoiser:
        control = self._control(self.pipe.controlnet, sigmas) if self.masked and self.pipe.controlnet else None
        scale = self.settings.guidance_scale
        return self.pipe.denoiser(self.known, cond, uncond, guidance_scale=scale, control=control, sigmas=sigmas)

    def _control(self, net: nn.Module, sigmas: Tensor) -> Control:
        """The ControlNet bound to these pictures and this run."""
        hints = [inpaint_hint(view.image, view.amount) if view.hint is None else view.hint for view in self.views]
        scale, start, end = self.settings.control_scale, self.settings.control_start, self.settings.control_end
        recorded = self.pipe.control_graphs
        return Control(net, torch.cat(hints), sigmas, scale=scale, start=start, end=end, graphs=recorded)

    def _keeping(self, x: Tensor, denoiser: Denoiser, sigmas: Tensor) -> tuple[Tensor, Denoise, Known | None]:
        """A run's start and denoiser with what is known kept in them, and what to restore at its end."""
        if self.settings.soft:
            return self._softly(x, denoiser, sigmas)
        if self.pipe.takes_mask:
            return x, denoiser, None
        return x, blend_known(denoiser, self.known, self._noise, sigmas), self.known

    def _softly(self, x: Tensor, denoiser: Denoiser, sigmas: Tensor) -> tuple[Tensor, Denoise, Known]:
        """In every step a binary mask: models were trained on such ones, and on the latents of what it leaves."""
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
        """Latents of the pictures without their hole (B, 1, 8H, 8W), with the same draw for every hole."""
        return self.pipe.sample_latents(masked_image(self._image, hole), lambda _: self._posterior)

    def _to_latent(self, mask: Tensor) -> Tensor:
        return to_latent(mask, cast(Cover, self.settings.cover))

    def _stacked(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).to(self.pipe.device)
