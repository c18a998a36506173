"""Image, mask and prompt to the inpainted image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sdinpaint.errors import warn
from sdinpaint.images.canvas import OVERLAP, canvas_for
from sdinpaint.images.picture import paste, read_picture
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.masks import Cover, masked_image, to_latent
from sdinpaint.pipeline.patch_sampling import OnStep
from sdinpaint.pipeline.patches import look, whole
from sdinpaint.pipeline.repaint import Run
from sdinpaint.pipeline.requests import Job, read_jobs, unbatched
from sdinpaint.pipeline.results import Painting, Recipe, Result
from sdinpaint.pipeline.settings import CONTROL_ONLY, MASK_ONLY, Settings, require_no_control
from sdinpaint.provenance.fingerprints import weights_of
from sdinpaint.provenance.manifest import ALSO, NOT_STORED, Manifest, check_again, environment
from sdinpaint.sampling import Known
from sdinpaint.sampling.noise import Draws


class Pipeline(LatentDiffusion):
    """Inpainting, image to image and outpainting with the networks of one checkpoint."""

    @torch.no_grad()
    def inpaint(
        self,
        image: Any,
        mask: Any,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = "",
        steps: int = 30,
        guidance_scale: float = 7.5,
        sampler: str = "ddim",
        strength: float = 1.0,
        seed: int | Sequence[int] | None = None,
        noise: Tensor | None = None,
        paste_back: bool = True,
        *,
        spacing: str | None = None,
        eta: float | None = None,
        fill: str = "original",
        soft: bool = False,
        crop: int | str | None = None,
        regions: str = "together",
        blend: str = "none",
        match_color: bool = False,
        cover: str = "max",
        batch_size: int | None = None,
        control_scale: float = 1.0,
        control_start: float = 0.0,
        control_end: float = 1.0,
        control_image: Any = None,
        manifest: Manifest | Sequence[Manifest] | None = None,
        progress: bool = True,
        on_step: OnStep | None = None,
    ) -> Result:
        """Repaint `image` where `mask` is white, as `prompt` says; the rest stays bit for bit.

        image: path, PIL, uint8 array (H, W, 3) or float tensor in [-1, 1]; mask: the same kinds, 1 or white = repaint.
        Lists of one length give one picture per item, each its single run but for rounding; one stands for all.
        negative_prompt: None is "", and for SDXL no text at all.
        strength: share of the steps that run, from the picture's own noised latents where below 1. seed: drawn and
        reported where None. noise: unit-variance start (B, 4, H, W) of the padded size, instead of a drawn one.

        fill: what stands in the hole where strength < 1: "original", "noise", "blur", "edge", "telea" or "neutral".
        soft: how white the mask is says in which share of the steps a pixel changes; else 0.5 and more is repainted.
        crop: None shows the model the whole picture; a number of pixels, or "auto", that much around the mask, at the
        size that the model works at. regions: "each" repaints separate parts of the mask one after the other.
        blend: how the hole joins the rest: "none", "feather" or "poisson". match_color: correct the colours in the hole
        by those around it. cover: a latent cell is repainted where any pixel of it is ("max") or its first ("nearest").

        control_scale: weight of the ControlNet, which is asked in the steps between control_start and control_end, as
        shares of those that run. control_image: what it is shown, of the picture's size, where it is of another kind
        than inpainting; by default the picture without what is repainted.
        batch_size: how many pictures at a time; each differs from its single run by rounding alone.
        manifest: of the run that is to be repeated; other weights or inputs are refused.
        on_step(step, x, x0): called after every step. paste_back=False returns the model's whole picture.
        Raises: ImageError, MaskError, SettingError naming the argument; NumericError where a model overflows.
        """
        settings = Settings(
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            spacing=spacing,
            eta=eta,
            strength=strength,
            cover=cover,
            fill=fill,
            soft=soft,
            crop=crop,
            regions=regions,
            blend=blend,
            match_color=match_color,
            paste_back=paste_back,
            batch_size=batch_size,
            control_scale=control_scale,
            control_start=control_start,
            control_end=control_end,
        )
        if self.controlnet is None:
            require_no_control(settings, control_image)
        jobs = self._jobs(image, mask, prompt, negative_prompt, seed, noise, control_image, least=settings.least)
        inputs = {"image": image, "mask": mask, "noise": noise, "control_image": control_image}
        return self._run("inpaint", jobs, settings, inputs, manifest, progress, on_step)

    @torch.no_grad()
    def vary(
        self,
        image: Any,
        prompt: str | Sequence[str],
        strength: float = 0.6,
        *,
        negative_prompt: str | Sequence[str | None] | None = "",
        steps: int = 30,
        guidance_scale: float = 7.5,
        sampler: str = "ddim",
        seed: int | Sequence[int] | None = None,
        noise: Tensor | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        batch_size: int | None = None,
        manifest: Manifest | Sequence[Manifest] | None = None,
        progress: bool = True,
        on_step: OnStep | None = None,
    ) -> Result:
        """Paint the whole of `image` anew, as `prompt` says: image to image, without a mask.

        strength: share of the steps that run, from the picture's own noised latents; the higher, the less is left of
        it. An inpainting model is shown a mask that covers everything. All else is as in `inpaint`, and a ControlNet
        is not asked.
        """
        settings = Settings(
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            spacing=spacing,
            eta=eta,
            strength=strength,
            batch_size=batch_size,
        )
        pictures = [read_picture(one) for one in unbatched(image)]
        everywhere = [np.ones(picture.size, dtype=bool) for picture in pictures]
        jobs = self._jobs(pictures, everywhere, prompt, negative_prompt, seed, noise)
        return self._run("vary", jobs, settings, {"image": image, "noise": noise}, manifest, progress, on_step)

    @torch.no_grad()
    def outpaint(
        self,
        image: Any,
        prompt: str | Sequence[str],
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        *,
        size: tuple[int, int] | None = None,
        anchor: str = "center",
        overlap: int = OVERLAP,
        fill: str = "edge",
        manifest: Manifest | Sequence[Manifest] | None = None,
        **options: Any,
    ) -> Result:
        """Extend `image` by so many pixels at its sides, or to the `size` (height, width), as `prompt` says.

        anchor: where the picture is on a canvas of that size, e.g. "left" or "bottom-right". overlap: pixels of the
        picture along the new ones that are repainted too, so that they join; all others stay bit for bit. fill: what
        stands on the new pixels where strength < 1: "edge", "reflect" or "neutral". options: as of `inpaint`.
        Raises: SettingError, ImageError naming the argument.
        """
        given = [read_picture(one) for one in unbatched(image)]
        asked: dict[str, Any] = {"left": left, "right": right, "top": top, "bottom": bottom, "size": size}
        asked |= {"anchor": anchor, "overlap": overlap, "fill": fill}
        canvases = [canvas_for(picture, **asked) for picture in given]
        check_again(manifest, self, [{"image": picture} for picture in given])
        made_with = environment(self)
        result = self.inpaint([picture for picture, _ in canvases], [mask for _, mask in canvases], prompt, **options)
        inputs = {"image": image, **{name: options[name] for name in NOT_STORED if name in options}}
        also = [name for name in ALSO if inputs.get(name) is not None]
        kept = partial(Painting.manifest, made_with=made_with, kind="outpaint", also=also)
        stored = {name: value for name, value in asked.items() if value is not None}
        recipe = Recipe(self.outpaint, inputs, {**result.recipe.settings, **stored}, kept)
        return Result(result.paintings, recipe)

    def encode_image(
        self, image: Any, mask: Any, *, draws: Draws | None = None, latents: bool = True, cover: Cover = "max"
    ) -> Known:
        """What the picture says: Known(mask (1, 1, H, W), masked_latents and, if asked for, latents (1, 4, H, W)).

        Latents are the posterior's mean, or with `draws` samples: first of `latents`, then of `masked_latents`.
        Pictures are padded to multiples of 8 pixels.
        """
        job = self._jobs(image, mask)[0]
        view = look(job, job.picture.opaque(), job.hole, whole(job.picture.size))
        pixels, hole = view.image.to(self.device), view.amount.to(self.device)
        all_of_it = self.sample_latents(pixels, draws) if latents else None
        return Known(to_latent(hole, cover), self.sample_latents(masked_image(pixels, hole), draws), all_of_it)

    def _jobs(self, image: Any, mask: Any, *rest: Any, least: float = 0.5) -> list[Job]:
        channels, keep_none = self.family.vae.latent_channels, self.family.zeros_for_none
        return read_jobs(image, mask, *rest, channels=channels, keep_none=keep_none, least=least)

    def _run(
        self,
        kind: str,
        jobs: list[Job],
        settings: Settings,
        inputs: dict[str, Any],
        manifest: Manifest | Sequence[Manifest] | None,
        progress: bool,
        on_step: OnStep | None,
    ) -> Result:
        """All jobs, and what is needed to make them again."""
        masked = kind != "vary"
        check_again(manifest, self, [{"image": job.picture, "mask": job.mask} for job in jobs])
        made_with = environment(self)  # now: weights may change after the run, and the picture is of these
        run = Run(self, settings, masked, progress, on_step)
        run.check(jobs)
        for index, job in enumerate(jobs):
            for message in _doubts(job, settings):
                said = f"picture {index + 1} of {len(jobs)}: {message}"
                warn(said)
        canvases = run(jobs)
        if on_step is not None and weights_of(self) != made_with["weights"]:
            warn("weights were changed during the run; the manifest names those that it began with")
        paintings = [
            Painting(
                paste(job.picture, canvas.rgb, canvas.replaced(whole=not settings.paste_back)),
                job,
                cast(Cover, settings.cover),
                tuple(canvas.boxes),
            )
            for job, canvas in zip(jobs, canvases, strict=True)
        ]
        unused = (CONTROL_ONLY if self.controlnet is None else ()) if masked else MASK_ONLY
        used = {name: value for name, value in asdict(settings).items() if name not in unused and value is not None}
        each: dict[str, list[Any]] = {
            "prompt": [job.prompt for job in jobs],
            "negative_prompt": [job.negative_prompt for job in jobs],
            "seed": [job.seed for job in jobs],
        }
        replayable = {name: values if len(jobs) > 1 else values[0] for name, values in each.items()}
        make = partial(getattr(self, kind), progress=progress)
        also = [name for name in ALSO if inputs.get(name) is not None]
        kept = partial(Painting.manifest, made_with=made_with, kind=kind, also=also)
        return Result(paintings, Recipe(make, inputs, {**replayable, **used}, kept))


def _doubts(job: Job, settings: Settings) -> Iterator[str]:
    """What the caller may not have meant."""
    if settings.strength == 0:
        yield "strength is 0, so it comes back unchanged"
    elif not job.hole.any():
        yield f"the mask is empty, so it comes back unchanged: {job.mask.report().warnings[0]}"
    elif job.picture.old is None and not settings.soft:
        yield from (f"mask: {warning}" for warning in job.mask.report(cast(Cover, settings.cover)).warnings)
