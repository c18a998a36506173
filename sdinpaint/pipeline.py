"""From picture, mask and prompt to the repainted picture; and, one level down, every step of it by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sdinpaint.autoencoding import Autoencoding
from sdinpaint.control import Control, inpaint_hint
from sdinpaint.errors import SdInpaintWarning
from sdinpaint.families import Family
from sdinpaint.images import paste, read_picture, to_uint8
from sdinpaint.jobs import Job, of_one_size, read_jobs, unbatched
from sdinpaint.masks import masked_image, to_latent
from sdinpaint.models import VAE, CLIPText, ControlNet, UNet
from sdinpaint.sampling import (
    Conditioning,
    Denoiser,
    Known,
    blend_known,
    find_sampler,
    find_spacing,
    restore_known,
    schedule,
    schedules,
)
from sdinpaint.sampling.denoiser import ControlFunction
from sdinpaint.sampling.graphs import Graphs
from sdinpaint.settings import CONTROL_ONLY, MASK_ONLY, Settings, as_list, require_no_control
from sdinpaint.text.conditioning import PictureSize, TextConditioner
from sdinpaint.text.tokenizer import Tokenizer

OnStep = Callable[[int, Tensor, Tensor], object]
Cover = Literal["nearest", "max"]


@dataclass(frozen=True)
class Result:
    """The new pictures in the order of the inputs, the seed of each, and the settings that replay them.

    `pipe.inpaint(image, mask, **result.settings)`, or `pipe.vary(image, **result.settings)`, gives the same pictures
    again; a `control_image` is given again too.
    """

    images: list[Image.Image]
    seeds: list[int]
    settings: dict[str, Any]

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]


class Draws:
    """Unit noise for a batch from one generator per item, so that an item's noise does not depend on the others."""

    def __init__(self, seeds: Iterable[int], device: torch.device) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.device = device

    def __call__(self, like: Tensor) -> Tensor:
        """Float32 noise of the shape of `like` (B, ...); drawn on the CPU, so the same on every device."""
        drawn = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self.device)


class Pipeline:
    """The components of one checkpoint, and inpainting with them."""

    def __init__(
        self,
        family: Family,
        unet: UNet,
        vae: VAE,
        text: CLIPText | Sequence[CLIPText],
        tokenizer: Tokenizer,
        *,
        controlnet: ControlNet | None = None,
        source: str = "",
    ) -> None:
        self.family = family
        self.unet = unet.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.controlnet = None if controlnet is None else controlnet.eval().requires_grad_(False)
        self._autoencoding = Autoencoding(self.vae)
        encoders = [text] if isinstance(text, CLIPText) else text
        self.condition = TextConditioner(
            family, [encoder.eval().requires_grad_(False) for encoder in encoders], tokenizer
        )
        self.source = source
        self.graphs = Graphs()

    @property
    def text(self) -> nn.Module:
        """The text encoder; for SDXL both of them, in a list."""
        encoders = self.condition.encoders
        return encoders[0] if len(encoders) == 1 else nn.ModuleList(encoders)

    @property
    def tokenizer(self) -> Tokenizer:
        """Prompts -> int64 ids (B, 77), padded as the (first) text encoder was trained."""
        return self.condition.tokenizers[0]

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return next(self.unet.parameters()).dtype

    @property
    def train_sigmas(self) -> Tensor:
        """The trained noise levels, rising: CPU float64 (1000,)."""
        return schedules.train_sigmas(self.family.schedule)

    @property
    def takes_mask(self) -> bool:
        """Whether the UNet sees the mask and the masked picture (9 channels) or only noisy latents (4)."""
        return self.family.unet.in_channels == self.family.unet.out_channels + 1 + self.family.vae.latent_channels

    def __repr__(self) -> str:
        return f"Pipeline({self.family.name!r}, source={self.source!r}, device={self.device}, dtype={self.dtype})"

    @torch.inference_mode()
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
        cover: str = "nearest",
        control_scale: float = 1.0,
        control_start: float = 0.0,
        control_end: float = 1.0,
        control_image: Any = None,
        progress: bool = True,
        on_step: OnStep | None = None,
    ) -> Result:
        """Repaint `image` where `mask` is white, as `prompt` says; the rest stays bit for bit.

        image: path, PIL, uint8 array (H, W, 3) or float tensor in [-1, 1]; mask: the same kinds, 1 or white = repaint.
        Lists of one length give one picture per item, each as its single run would give it; one stands for all.
        negative_prompt: None is "", and for SDXL no text at all.
        strength: share of the steps that run, from the picture's own noised latents where below 1. seed: drawn and
        reported where None. noise: unit-variance start (B, 4, H, W) of the padded size, instead of a drawn one.
        cover: a latent cell is repainted where its first pixel is ("nearest", as trained) or any ("max").
        control_scale: weight of the ControlNet, which is asked in the steps between control_start and control_end, as
        shares of those that run. control_image: what it is shown, of the picture's size, where it is of another kind
        than inpainting; by default the picture without what is repainted.
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
            paste_back=paste_back,
            control_scale=control_scale,
            control_start=control_start,
            control_end=control_end,
        )
        if self.controlnet is None:
            require_no_control(settings, control_image)
        jobs = self._jobs(image, mask, prompt, negative_prompt, seed, noise, control_image)
        return self._run(jobs, settings, progress, on_step, masked=True)

    @torch.inference_mode()
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
        progress: bool = True,
        on_step: OnStep | None = None,
    ) -> Result:
        """Paint the whole of `image` anew, as `prompt` says: image to image, without a mask.

        strength: share of the steps that run, from the picture's own noised latents; the higher, the less is left of
        it. An inpainting model is shown a mask that covers everything. All else is as in `inpaint`, and a ControlNet
        is not asked.
        """
        settings = Settings(
            steps=steps, guidance_scale=guidance_scale, sampler=sampler, spacing=spacing, eta=eta, strength=strength
        )
        pictures = [read_picture(one) for one in unbatched(image)]
        everywhere = [np.ones(picture.size, dtype=bool) for picture in pictures]
        jobs = self._jobs(pictures, everywhere, prompt, negative_prompt, seed, noise)
        return self._run(jobs, settings, progress, on_step, masked=False)

    def encode_prompts(
        self, prompts: Iterable[str | Sequence[str | None] | None], size: PictureSize | tuple[int, int] | None = None
    ) -> list[Conditioning]:
        """One Conditioning per entry: context (B, 77, D), of batch 1 for a string and of its length for a list.

        size: (height, width) in pixels of the picture to come, or all that SDXL is told of it; None: the model's own.
        None as a prompt is "", and for SDXL no prompt at all.
        """
        if size is None:
            size = (self.family.size, self.family.size)
        told = size if isinstance(size, PictureSize) else PictureSize(size)
        return [self.condition(as_list(entry), told) for entry in prompts]

    @torch.inference_mode()
    def encode_image(
        self, image: Any, mask: Any, *, draws: Draws | None = None, latents: bool = True, cover: Cover = "nearest"
    ) -> Known:
        """What the picture says: Known(mask (1, 1, H, W), masked_latents and, if asked for, latents (1, 4, H, W)).

        Latents are the posterior's mean, or with `draws` samples: first of `latents`, then of `masked_latents`.
        Pictures are padded to multiples of 8 pixels.
        """
        job = self._jobs(image, mask)[0]
        pixels, hole = job.image.to(self.device), job.hole.to(self.device)
        whole = self._encode(pixels, draws) if latents else None
        return Known(to_latent(hole, cover), self._encode(masked_image(pixels, hole), draws), whole)

    def denoiser(
        self,
        known: Known,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        *,
        guidance_scale: float = 7.5,
        control: ControlFunction | None = None,
        sigmas: Tensor | None = None,
    ) -> Denoiser:
        """denoise(x, sigma) -> x0 for this picture and these prompts.

        `control`: a `Control`, for a ControlNet. `sigmas`: of the run, which spares a GPU some launches in every step.
        """
        # on a CPU nothing is gained, and one at a time gives the same bits with `sigmas` as without
        ahead = sigmas if self.device.type == "cuda" else None
        return Denoiser(
            self.unet,
            self.train_sigmas,
            self.family.schedule.prediction,
            cond,
            uncond,
            guidance_scale=guidance_scale,
            extra=(known.mask, known.masked_latents) if self.takes_mask else None,
            control=control,
            dtype=self.dtype,
            sigmas=ahead,
            graphs=self.graphs,
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, H, W) -> image float32 (B, 3, 8H, 8W), about [-1, 1].

        An autoencoder that overflows its dtype is run again in float32, with a warning. Raises: NumericError.
        """
        return self._through_vae().decode(latents)

    def _encode(self, image: Tensor, draws: Draws | None = None) -> Tensor:
        """image (B, 3, 8H, 8W) -> latents float32: the posterior's mean, or a sample of it."""
        mean, std = self._through_vae().encode(image)
        return mean if draws is None else mean + std * draws(mean)

    def _through_vae(self) -> Autoencoding:
        """The autoencoder, with what is known of its overflows; `vae` may have been replaced by another one."""
        if self._autoencoding.vae is not self.vae:
            self._autoencoding = Autoencoding(self.vae)
        return self._autoencoding

    def _jobs(self, image: Any, mask: Any, *rest: Any) -> list[Job]:
        channels, keep_none = self.vae.config.latent_channels, self.family.zeros_for_none
        return read_jobs(image, mask, *rest, channels=channels, keep_none=keep_none)

    def _run(
        self, jobs: list[Job], settings: Settings, progress: bool, on_step: OnStep | None, *, masked: bool
    ) -> Result:
        """All jobs, those of one size as one batch."""
        done: dict[int, Image.Image] = {}
        for index, job in enumerate(jobs):
            if settings.strength == 0 or not job.mask.any():
                reason = "the mask is empty" if settings.strength else "strength is 0"
                message = f"picture {index + 1} of {len(jobs)}: {reason}, so it comes back unchanged"
                warnings.warn(message, SdInpaintWarning, stacklevel=4)  # inference_mode wraps who called this
                done[index] = paste(job.picture, job.picture.rgb, np.zeros_like(job.mask))
        for batch in of_one_size({index: job for index, job in enumerate(jobs) if index not in done}):
            painted = self._repaint(list(batch.values()), settings, progress, on_step, masked)
            done.update(zip(batch, painted, strict=True))
        inputs: dict[str, list[Any]] = {
            "prompt": [job.prompt for job in jobs],
            "negative_prompt": [job.negative_prompt for job in jobs],
            "seed": [job.seed for job in jobs],
        }
        unused = (CONTROL_ONLY if self.controlnet is None else ()) if masked else MASK_ONLY
        used = {name: value for name, value in asdict(settings).items() if name not in unused}
        replayable = {name: values if len(jobs) > 1 else values[0] for name, values in inputs.items()}
        images = [done[index] for index in range(len(jobs))]
        return Result(images, [job.seed for job in jobs], {**replayable, **used})

    def _repaint(
        self, jobs: list[Job], settings: Settings, progress: bool, on_step: OnStep | None, masked: bool
    ) -> Iterator[Image.Image]:
        """Repaint jobs of one padded size as one batch."""
        height, width = jobs[0].image.shape[-2:]
        texts: list[list[str | None]] = [[job.prompt for job in jobs], [job.negative_prompt for job in jobs]]
        cond, uncond = self.encode_prompts(texts, (height, width))
        draws = Draws((job.seed for job in jobs), self.device)
        known, noise = self._known(jobs, settings, draws, masked)
        sigmas = schedule(settings.sampler, settings.spacing, self.family.schedule, settings.steps)
        if settings.strength < 1 or not masked:
            sigmas = schedules.for_strength(sigmas, settings.strength)
            x = schedules.start_from(cast(Tensor, known.latents), noise, sigmas)
        else:
            spacing = find_spacing(settings.sampler, settings.spacing)
            x = schedules.start(noise, sigmas, unit_variance=spacing.unit_variance)
        control = self._control(self.controlnet, jobs, settings, sigmas) if masked and self.controlnet else None
        denoise: Any = self.denoiser(
            known, cond, uncond, guidance_scale=settings.guidance_scale, control=control, sigmas=sigmas
        )
        if not self.takes_mask:
            denoise = blend_known(denoise, known, noise, sigmas)
        title, silent = "inpaint" if masked else "vary", None if progress else True
        # disable=None: silent where the output is no terminal
        with tqdm(total=len(sigmas) - 1, desc=title, disable=silent) as bar:

            def advance(step: int, x: Tensor, x0: Tensor) -> None:
                bar.update()
                if on_step is not None:
                    on_step(step, x, x0)

            sampler = find_sampler(settings.sampler)
            x = sampler.run(denoise, x, sigmas, eta=cast(float, settings.eta), noise=draws, on_step=advance)
        latents = schedules.finish(x, sigmas)
        if not self.takes_mask:
            latents = restore_known(latents, known)
        for job, generated in zip(jobs, to_uint8(self.decode(latents)), strict=True):
            height, width = job.picture.size
            where = job.mask if settings.paste_back else np.ones_like(job.mask)
            yield paste(job.picture, generated[:height, :width], where)

    def _control(self, net: ControlNet, jobs: list[Job], settings: Settings, sigmas: Tensor) -> Control:
        """The ControlNet bound to these pictures and this run."""
        hints = [inpaint_hint(job.image, job.hole) if job.hint is None else job.hint for job in jobs]
        scale, start, end = settings.control_scale, settings.control_start, settings.control_end
        return Control(net, torch.cat(hints), sigmas, scale=scale, start=start, end=end)

    def _known(self, jobs: list[Job], settings: Settings, draws: Draws, masked: bool) -> tuple[Known, Tensor]:
        """What the pictures say, and the starting noise; drawn in the order of diffusers' pipelines."""
        image = torch.cat([job.image for job in jobs]).to(self.device)
        hole = torch.cat([job.hole for job in jobs]).to(self.device)
        mask = to_latent(hole, cast(Cover, settings.cover))
        whole = settings.strength < 1 or not masked or not self.takes_mask
        latents = self._encode(image, draws) if whole else None
        given = [job.noise for job in jobs if job.noise is not None]
        like = mask.expand(-1, self.vae.config.latent_channels, -1, -1)
        noise = torch.cat(given).to(self.device) if given else draws(like)
        if masked or self.takes_mask:
            return Known(mask, self._encode(masked_image(image, hole), draws), latents), noise
        return Known(mask, torch.zeros_like(noise), latents), noise  # a 4-channel model is not shown them
