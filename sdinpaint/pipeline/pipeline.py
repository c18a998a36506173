"""Image, mask and prompt to the inpainted image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor

from sdinpaint.checks import check_call, check_choice, check_switch
from sdinpaint.errors import SettingError, explaining_memory, keeping_warnings, warn
from sdinpaint.images.blending import Blend
from sdinpaint.images.canvas import OVERLAP, Anchor, ExtendingFill
from sdinpaint.images.fills import Fill
from sdinpaint.images.input_image import paste
from sdinpaint.keywords import knowing_keywords
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.masks import Cover, masked_image, to_latent
from sdinpaint.pipeline.doubts import request_doubts
from sdinpaint.pipeline.events import Listener, event_bars
from sdinpaint.pipeline.patches import cut_patch, whole
from sdinpaint.pipeline.repaint import Canvas, Repaint
from sdinpaint.pipeline.requests import Item, Kind, OnError, Request
from sdinpaint.pipeline.results import WATCHING, Repainted, Result
from sdinpaint.pipeline.settings import Regions, Settings, require_no_control
from sdinpaint.provenance.fingerprints import weights_of
from sdinpaint.provenance.manifest import Manifest, check_again, environment
from sdinpaint.sampling import Conditioning, Known
from sdinpaint.sampling.noise import Draws
from sdinpaint.sampling.samplers import OnStep

Prompts = str | Conditioning | Sequence[str | Conditioning]
NegativePrompts = str | Conditioning | None | Sequence[str | Conditioning | None]


class Pipeline(LatentDiffusion):
    """Inpainting, image to image and outpainting with the networks of one checkpoint."""

    @knowing_keywords()
    def inpaint(
        self,
        image: Any,
        mask: Any,
        prompt: Prompts,
        negative_prompt: NegativePrompts = "",
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
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        fill: Fill = "original",
        soft: bool = False,
        crop: int | str | None = None,
        regions: Regions = "together",
        blend: Blend = "none",
        match_color: bool = False,
        cover: Cover = "max",
        batch_size: int | None = None,
        control_scale: float = 1.0,
        control_start: float = 0.0,
        control_end: float = 1.0,
        control_image: Any = None,
        manifest: Manifest | Sequence[Manifest] | None = None,
        on_error: OnError = "raise",
        progress: bool = True,
        on_step: OnStep | None = None,
        on_event: Listener | None = None,
    ) -> Result:
        """Repaint `image` where `mask` is white, as `prompt` says; the rest stays bit for bit.

        Lists of one length make a batch, and one value stands for all: each image is what its single run would be but
        for rounding.

        Args:
            image: path, bytes of an image file, open file, PIL image, array (H, W, 3) of uint8, uint16 or floats in
                [0, 1], or float tensor in [-1, 1].
            mask: the same kinds; white, or 1, is repainted.
            prompt: text, or a `Conditioning` that `encode_prompts` gave.
            negative_prompt: text, or a `Conditioning`; None is "", and for SDXL no text at all.
            steps: number of sampling steps.
            guidance_scale: weight of the prompt; 1 is no guidance and takes half of the time.
            sampler: name in `sdinpaint.sampling.SAMPLERS`, or one that another program has for it.
            strength: share of the steps that run, from the noised latents of the image where below 1.
            seed: seed of the noise; drawn by default, and reported.
            noise: initial noise of unit variance (B, 4, H, W) of the padded size, in place of drawn noise.
            paste_back: False returns the model's whole image, with known pixels as the VAE decodes them.
            spacing: how the steps are spaced; the sampler's own by default.
            eta: stochasticity of the steps, 0 is deterministic; the sampler's own by default.
            guidance_rescale: from 0 to 1, how far a guided prediction is given the contrast of an unguided one.
            guidance_start: share of the steps before guidance begins.
            guidance_end: share of the steps after which guidance ends.
            fill: what the hole is filled with where strength < 1: "original", "noise", "blur", "edge", "telea" or
                "neutral".
            soft: gray levels of the mask are the strength of each pixel (differential diffusion); otherwise 0.5 and
                more is repainted.
            crop: None shows the model the whole image; a number of pixels, or "auto", shows that much around the mask,
                at the size that the model works at.
            regions: "together", or "each" to repaint separate parts of the mask one after the other.
            blend: how the hole joins the rest: "none", "feather" or "poisson".
            match_color: correct the colours in the hole by those around it.
            cover: mask downsampling: a latent cell is repainted where any of its pixels is ("max"), or its first
                ("nearest").
            batch_size: number of images at a time; all of one size by default.
            control_scale: weight of the ControlNet.
            control_start: share of the steps before the ControlNet is active.
            control_end: share of the steps after which it is not.
            control_image: conditioning image of the ControlNet, of the image's size; by default the image without its
                hole, as a ControlNet for inpainting takes it.
            manifest: manifest of the run that is to be repeated; other weights or images are refused.
            on_error: "skip" leaves out the images of a batch that cannot be used (`result.errors`); "raise" ends there.
            progress: show bars in a terminal or a notebook.
            on_step: called as on_step(step, x, x0) after every step, with latents (B, 4, H, W); a tensor that it
                returns takes the place of x. It may raise `sdinpaint.errors.Cancelled`.
            on_event: called with every `Event` of the run; it may raise `Cancelled`, too.

        Returns:
            The images, with the settings that make them again.

        Raises:
            ImageError: an image cannot be read or used.
            MaskError: a mask cannot be read or does not fit its image.
            SettingError: a value is of the wrong type or out of its bounds; it names the argument.
            NumericError: a model overflows.
            CheckpointError: a file that weights are mapped from has changed.
            OutOfMemoryError: memory does not suffice.
        """
        return self._asked("inpaint", locals())

    @knowing_keywords()
    def vary(
        self,
        image: Any,
        prompt: Prompts,
        strength: float = 0.6,
        *,
        negative_prompt: NegativePrompts = "",
        steps: int = 30,
        guidance_scale: float = 7.5,
        sampler: str = "ddim",
        seed: int | Sequence[int] | None = None,
        noise: Tensor | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        batch_size: int | None = None,
        manifest: Manifest | Sequence[Manifest] | None = None,
        on_error: OnError = "raise",
        progress: bool = True,
        on_step: OnStep | None = None,
        on_event: Listener | None = None,
    ) -> Result:
        """Regenerate the whole of `image`, as `prompt` says: image to image (img2img), without a mask.

        An inpainting model sees a mask that covers everything, and a ControlNet is not active.

        Args:
            image: as in `inpaint`.
            prompt: as in `inpaint`.
            strength: share of the steps that run, from the noised latents of the image: the higher, the less is left
                of it.
            negative_prompt: as in `inpaint`.
            steps: as in `inpaint`.
            guidance_scale: as in `inpaint`.
            sampler: as in `inpaint`.
            seed: as in `inpaint`.
            noise: as in `inpaint`.
            spacing: as in `inpaint`.
            eta: as in `inpaint`.
            guidance_rescale: as in `inpaint`.
            guidance_start: as in `inpaint`.
            guidance_end: as in `inpaint`.
            batch_size: as in `inpaint`.
            manifest: as in `inpaint`.
            on_error: as in `inpaint`.
            progress: as in `inpaint`.
            on_step: as in `inpaint`.
            on_event: as in `inpaint`.

        Returns:
            The images, with the settings that make them again.

        Raises:
            SdInpaintError: as `inpaint` does.
        """
        return self._asked("vary", locals())

    def outpaint(
        self,
        image: Any,
        prompt: Prompts,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        *,
        size: tuple[int, int] | None = None,
        anchor: Anchor = "center",
        overlap: int = OVERLAP,
        fill: ExtendingFill = "edge",
        **options: Any,
    ) -> Result:
        """Extend `image` at its sides, or to a size, as `prompt` says; its other pixels stay bit for bit.

        Args:
            image: as in `inpaint`.
            prompt: as in `inpaint`.
            left: pixels to add at the left side.
            right: pixels to add at the right side.
            top: pixels to add at the top.
            bottom: pixels to add at the bottom.
            size: height and width of the extended image, instead of pixels for each side.
            anchor: where the image lies in `size`, e.g. "left" or "bottom-right".
            overlap: pixels of the image along the new ones that are repainted too, so that they join.
            fill: what the new pixels are filled with where strength < 1: "edge", "reflect" or "neutral".
            options: further arguments of `inpaint`.

        Returns:
            The extended images, with the settings that make them again.

        Raises:
            SdInpaintError: as `inpaint` does.
        """
        given = locals()
        return self._asked("outpaint", given | given.pop("options"))

    @knowing_keywords()
    @explaining_memory()
    @torch.no_grad()
    def run(
        self,
        request: Request,
        *,
        progress: bool = True,
        on_step: OnStep | None = None,
        on_event: Listener | None = None,
    ) -> Result:
        """Run a request: `inpaint`, `vary` and `outpaint` make one of their arguments, and run it.

        Args:
            request: what is asked for.
            progress: show bars in a terminal or a notebook.
            on_step: called as on_step(step, x, x0) after every step, with latents (B, 4, H, W); a tensor that it
                returns takes the place of x. It may raise `sdinpaint.errors.Cancelled`.
            on_event: called with every `Event` of the run; it may raise `Cancelled`, too.

        Returns:
            The images, with the settings that make them again.

        Raises:
            SdInpaintError: the request does not fit the model, a model overflows, a file that weights are mapped from
                has changed, or memory does not suffice.
        """
        if not isinstance(request, Request):
            raise SettingError("SETTING_REQUEST", "request", f"a {type(request).__name__}", expected="a Request")
        check_call("on_step", on_step)
        check_call("on_event", on_event)
        progress = check_switch("progress", progress)
        request = request.fitted(self.family)
        settings = request.settings.resolved()
        if self.controlnet is None:
            require_no_control(
                settings, any(item is not None and item.control_image is not None for item in request.items)
            )
        check_again(request.manifest, self, [None if item is None else item.inputs for item in request.items])
        made_with = environment(self)  # now: weights may change after the run, and the images are made of these
        with keeping_warnings() as warnings, event_bars(request.kind, show=progress) as bars:
            repaint = Repaint(self, request, settings, [bars, *filter(None, [on_event])], on_step)
            for index, message in request_doubts(request, settings, self.condition):
                warn(message, index)
            canvases = repaint()
            if (on_step or on_event) is not None and weights_of(self) != made_with["weights"]:
                warn("weights were changed during the run; the manifest names those that it began with")
        made = [_made(canvases.get(index), settings) for index in range(len(request))]

        def again(request: Request, **watching: Any) -> Result:
            return self.run(request, **{"progress": progress, **watching})

        return Result(request, made, made_with, again, [*request.warnings, *warnings])

    def encode_image(
        self, image: Any, mask: Any, *, draws: Draws | None = None, latents: bool = True, cover: Cover = "max"
    ) -> Known:
        """Encode the inpainting conditioning of an image, which is padded to multiples of 8 pixels.

        Args:
            image: as in `inpaint`.
            mask: as in `inpaint`.
            draws: noise for samples of the posterior, first for `latents`, then for the masked latents; None takes its
                mean.
            latents: whether the latents of the whole image are needed.
            cover: mask downsampling, "max" or "nearest".

        Returns:
            Known(mask (1, 1, H, W), masked_latents (1, 4, H, W), latents (1, 4, H, W) or None).

        Raises:
            ImageError: the image cannot be read or used.
            MaskError: the mask cannot be read or does not fit the image.
        """
        check_choice("cover", cover, get_args(Cover))
        latents, draws = check_switch("latents", latents), check_call("draws", draws)
        item = cast(Item, Request(image, mask).items[0])
        patch = cut_patch(item, item.image.opaque(), item.hole, whole(item.image.size))
        pixels, hole = patch.image.to(self.device), patch.amount.to(self.device)
        all_of_it = self.sample_latents(pixels, draws) if latents else None
        return Known(to_latent(hole, cover), self.sample_latents(masked_image(pixels, hole), draws), all_of_it)

    @explaining_memory()
    def _asked(self, kind: Kind, arguments: dict[str, Any]) -> Result:
        """Run the request that a method's arguments make, all of them by name."""
        watching = {name: arguments.pop(name) for name in WATCHING if name in arguments}
        given = {name: value for name, value in arguments.items() if name != "self"}
        return self.run(Request(kind=kind, **given), **watching)


def _made(canvas: Canvas | None, settings: Settings) -> Repainted | None:
    """Paste what was repainted into the image."""
    if canvas is None:
        return None
    replaced = canvas.replaced(whole=not settings.paste_back)
    image = paste(canvas.item.image, canvas.rgb, replaced)
    return Repainted(image, canvas.item, settings.cover, tuple(canvas.boxes), replaced)
