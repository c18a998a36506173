"""From picture, mask and prompt to the repainted picture; and, one level down, every step of it by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdinpaint.errors import NumericError, SdInpaintWarning, SettingError
from sdinpaint.families import Family
from sdinpaint.images import Picture, pad_to_multiple, paste, read_picture, to_tensor, to_uint8
from sdinpaint.masks import binarize, masked_image, read_mask, to_latent
from sdinpaint.models import VAE, CLIPText, UNet
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
from sdinpaint.settings import Settings, as_list, check_prompt, check_seed, common_length
from sdinpaint.text.tokenizer import Tokenizer

OnStep = Callable[[int, Tensor, Tensor], object]
Cover = Literal["nearest", "max"]


@dataclass(frozen=True)
class Result:
    """The repainted pictures in the order of the inputs, the seed of each, and the settings that replay them.

    `pipe.inpaint(image, mask, **result.settings)` gives the same pictures again.
    """

    images: list[Image.Image]
    seeds: list[int]
    settings: dict[str, Any]

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]


@dataclass(frozen=True)
class Job:
    """One picture to repaint: what was given, and its pixels and hole padded to what the models take."""

    picture: Picture
    mask: NDArray[np.bool_]
    image: Tensor
    hole: Tensor
    prompt: str
    negative_prompt: str
    seed: int
    noise: Tensor | None


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
        self, family: Family, unet: UNet, vae: VAE, text: CLIPText, tokenizer: Tokenizer, *, source: str = ""
    ) -> None:
        self.family = family
        self.unet = unet.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.text = text.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.source = source

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
        negative_prompt: str | Sequence[str] = "",
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
        progress: bool = True,
        on_step: OnStep | None = None,
    ) -> Result:
        """Repaint `image` where `mask` is white, as `prompt` says; the rest stays bit for bit.

        image: path, PIL, uint8 array (H, W, 3) or float tensor in [-1, 1]; mask: the same kinds, 1 or white = repaint.
        Lists of one length give one picture per item, each as its single run would give it; one stands for all.
        strength: share of the steps that run, from the picture's own noised latents where below 1. seed: drawn and
        reported where None. noise: unit-variance start (B, 4, H, W) of the padded size, instead of a drawn one.
        cover: a latent cell is repainted where its first pixel is ("nearest", as trained) or any ("max").
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
        )
        jobs = self._jobs(image, mask, prompt, negative_prompt, seed, noise)
        done: dict[int, Image.Image] = {}
        for index, job in enumerate(jobs):
            if settings.strength == 0 or not job.mask.any():
                reason = "the mask is empty" if settings.strength else "strength is 0"
                message = f"picture {index + 1} of {len(jobs)}: {reason}, so it comes back unchanged"
                warnings.warn(message, SdInpaintWarning, stacklevel=3)  # inference_mode wraps this function
                done[index] = paste(job.picture, job.picture.rgb, np.zeros_like(job.mask))
        for batch in _of_one_size({index: job for index, job in enumerate(jobs) if index not in done}):
            painted = self._repaint(list(batch.values()), settings, progress, on_step)
            done.update(zip(batch, painted, strict=True))
        inputs: dict[str, list[Any]] = {
            "prompt": [job.prompt for job in jobs],
            "negative_prompt": [job.negative_prompt for job in jobs],
            "seed": [job.seed for job in jobs],
        }
        replayable = {name: values if len(jobs) > 1 else values[0] for name, values in inputs.items()}
        images = [done[index] for index in range(len(jobs))]
        return Result(images, [job.seed for job in jobs], {**replayable, **asdict(settings)})

    def encode_prompts(self, prompts: Iterable[str | Sequence[str]]) -> list[Conditioning]:
        """One Conditioning per entry: context (B, 77, D), of batch 1 for a string and of its length for a list."""
        return [Conditioning(self.text(self.tokenizer(as_list(entry)).to(self.device))) for entry in prompts]

    @torch.inference_mode()
    def encode_image(
        self, image: Any, mask: Any, *, draws: Draws | None = None, latents: bool = True, cover: Cover = "nearest"
    ) -> Known:
        """What the picture says: Known(mask (1, 1, H, W), masked_latents and, if asked for, latents (1, 4, H, W)).

        Latents are the posterior's mean, or with `draws` samples: first of `latents`, then of `masked_latents`.
        Pictures are padded to multiples of 8 pixels.
        """
        job = self._jobs(image, mask, "", "", 0, None)[0]
        pixels, hole = job.image.to(self.device), job.hole.to(self.device)
        whole = self._encode(pixels, draws) if latents else None
        return Known(to_latent(hole, cover), self._encode(masked_image(pixels, hole), draws), whole)

    def denoiser(
        self, known: Known, cond: Conditioning, uncond: Conditioning | None = None, *, guidance_scale: float = 7.5
    ) -> Denoiser:
        """denoise(x, sigma) -> x0 for this picture and these prompts."""
        return Denoiser(
            self.unet,
            self.train_sigmas,
            self.family.schedule.prediction,
            cond,
            uncond,
            guidance_scale=guidance_scale,
            extra=(known.mask, known.masked_latents) if self.takes_mask else None,
            dtype=self.dtype,
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, H, W) -> image float32 (B, 3, 8H, 8W), about [-1, 1].

        An autoencoder that overflows its dtype is run again in float32, with a warning. Raises: NumericError.
        """
        return self._through_vae("decode", lambda vae, one: (vae.decode(one),), latents)[0]

    def _encode(self, image: Tensor, draws: Draws | None = None) -> Tensor:
        """image (B, 3, 8H, 8W) -> latents float32: the posterior's mean, or a sample of it."""
        mean, std = self._through_vae("encode", lambda vae, one: vae.posterior(one), image)
        return mean if draws is None else mean + std * draws(mean)

    def _through_vae(self, what: str, run: Callable[[VAE, Tensor], tuple[Tensor, ...]], given: Tensor) -> list[Tensor]:
        """Run the autoencoder over a batch; again in float32 where it overflows its dtype. Raises: NumericError."""
        kind = next(self.vae.parameters()).dtype
        outputs = _one_by_one(run, self.vae, given)
        if not _finite(outputs) and kind != torch.float32 and _finite([given]):
            message = f"the autoencoder overflowed in {kind}; the picture is {what}d in float32 instead"
            warnings.warn(message, SdInpaintWarning, stacklevel=3)
            # a copy: another thread may be using the autoencoder
            outputs = _one_by_one(run, copy.deepcopy(self.vae).float(), given)
        if not _finite(outputs):
            bad = sum(int((~output.isfinite()).sum()) for output in outputs)
            found = f"{bad} of {sum(output.numel() for output in outputs)} {what}d values are NaN or infinite"
            code, hint = f"NUMERIC_{what.upper()}", "load with dtype='float32', or with another autoencoder: vae=..."
            raise NumericError(code, "vae", found, expected="finite values", hint=hint)
        return outputs

    def _jobs(self, image: Any, mask: Any, prompt: Any, negative_prompt: Any, seed: Any, noise: Any) -> list[Job]:
        """Read everything, and check everything, before anything is computed."""
        given = {
            "images": _unbatched(image),
            "masks": _unbatched(mask),
            "prompts": [check_prompt("prompt", text) for text in as_list(prompt)],
            "negative prompts": [check_prompt("negative_prompt", text) for text in as_list(negative_prompt)],
            "seeds": as_list(seed),
        }
        count = common_length(**given)
        pictures = [read_picture(one) for one in given["images"]]
        columns = [values * (count // len(values)) for values in [pictures, *list(given.values())[1:]]]
        noises = _noises(noise, count, self.vae.config.latent_channels)
        return [_job(*row) for row in zip(*columns, noises, strict=True)]

    def _repaint(
        self, jobs: list[Job], settings: Settings, progress: bool, on_step: OnStep | None
    ) -> Iterator[Image.Image]:
        """Repaint jobs of one padded size as one batch."""
        cond, uncond = self.encode_prompts([[job.prompt for job in jobs], [job.negative_prompt for job in jobs]])
        draws = Draws((job.seed for job in jobs), self.device)
        known, noise = self._known(jobs, settings, draws)
        denoise: Any = self.denoiser(known, cond, uncond, guidance_scale=settings.guidance_scale)
        sigmas = schedule(settings.sampler, settings.spacing, self.family.schedule, settings.steps)
        if settings.strength < 1:
            sigmas = schedules.for_strength(sigmas, settings.strength)
            x = schedules.start_from(cast(Tensor, known.latents), noise, sigmas)
        else:
            spacing = find_spacing(settings.sampler, settings.spacing)
            x = schedules.start(noise, sigmas, unit_variance=spacing.unit_variance)
        if not self.takes_mask:
            denoise = blend_known(denoise, known, noise, sigmas)
        # disable=None: silent where the output is no terminal
        with tqdm(total=len(sigmas) - 1, desc="inpaint", disable=None if progress else True) as bar:

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

    def _known(self, jobs: list[Job], settings: Settings, draws: Draws) -> tuple[Known, Tensor]:
        """What the pictures say, and the starting noise; drawn in the order of diffusers' pipeline."""
        image = torch.cat([job.image for job in jobs]).to(self.device)
        hole = torch.cat([job.hole for job in jobs]).to(self.device)
        mask = to_latent(hole, cast(Cover, settings.cover))
        latents = self._encode(image, draws) if settings.strength < 1 or not self.takes_mask else None
        given = [job.noise for job in jobs if job.noise is not None]
        like = mask.expand(-1, self.vae.config.latent_channels, -1, -1)
        noise = torch.cat(given).to(self.device) if given else draws(like)
        masked = self._encode(masked_image(image, hole), draws)
        return Known(mask, masked, latents), noise


def _job(picture: Picture, mask: Any, prompt: str, negative_prompt: str, seed: int | None, noise: Tensor | None) -> Job:
    soft = read_mask(mask, picture.size)
    where = binarize(soft)
    image, _ = pad_to_multiple(to_tensor(picture.opaque()))
    # reflected as the picture is: what is under the mask must not show in the padding
    hole, _ = pad_to_multiple(torch.from_numpy(where.astype(np.float32))[None, None])
    latent_size = (image.shape[-2] // 8, image.shape[-1] // 8)
    if noise is not None and noise.shape[-2:] != latent_size:
        found, expected = f"{tuple(noise.shape[-2:])} latent rows and columns", f"{latent_size} for this picture"
        raise SettingError("SETTING_NOISE", "noise", found, expected=expected)
    return Job(picture, where, image, hole, prompt, negative_prompt, check_seed(seed), noise)


def _unbatched(value: Any) -> list[Any]:
    """A list; a batch (B, C, H, W) in one tensor is B of them."""
    return list(value) if isinstance(value, Tensor) and value.ndim == 4 else as_list(value)


def _noises(noise: Tensor | None, count: int, channels: int) -> list[Tensor | None]:
    """The given starting noise, one (1, channels, H, W) per item."""
    if noise is None:
        return [None] * count
    expected = f"a tensor ({count}, {channels}, rows / 8, columns / 8) of finite values with unit variance"
    if not isinstance(noise, Tensor):
        raise SettingError("SETTING_NOISE", "noise", f"a {type(noise).__name__}", expected=expected)
    if noise.ndim != 4 or noise.shape[:2] != (count, channels):
        raise SettingError("SETTING_NOISE", "noise", f"shape {tuple(noise.shape)}", expected=expected)
    if not _finite([noise]):
        found = f"{int((~noise.isfinite()).sum())} of {noise.numel()} values are NaN or infinite"
        raise SettingError("SETTING_NOISE", "noise", found, expected=expected)
    return list(noise.float().split(1))


def _one_by_one(run: Callable[[VAE, Tensor], tuple[Tensor, ...]], vae: VAE, given: Tensor) -> list[Tensor]:
    """What `run` makes of a batch, float32; item after item, so that memory stays flat."""
    weight = next(vae.parameters())
    parts = [run(vae, one.to(weight)) for one in given.split(1)]
    return [torch.cat(columns).float() for columns in zip(*parts, strict=True)]


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _of_one_size(jobs: dict[int, Job]) -> list[dict[int, Job]]:
    """The jobs by padded size: what can run as one batch."""
    groups: dict[torch.Size, dict[int, Job]] = {}
    for index, job in jobs.items():
        groups.setdefault(job.image.shape, {})[index] = job
    return list(groups.values())
