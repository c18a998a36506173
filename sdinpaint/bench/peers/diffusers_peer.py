"""diffusers as a peer: its inpainting pipeline over the checkpoint's folder, as it comes, channels-last or compiled."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdinpaint.bench.cases import GUIDANCE, PROMPT, SEED, TIMESTEP, Case, StepInputs, picture_and_mask
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.checks import quietly, require_extra
from sdinpaint.errors import SettingError
from sdinpaint.load_options import LoadOptions

__all__ = ["ChannelsLast", "Compiled", "Diffusers", "library"]

IMPORTS = "from diffusers import StableDiffusionInpaintPipeline"


def library() -> Any:
    """diffusers, with its pipeline, which it imports when asked. Raises: SettingError where something is missing."""
    transformers()
    diffusers = require_extra("diffusers", extra="bench", what="the peer diffusers")
    diffusers.StableDiffusionInpaintPipeline  # noqa: B018
    return diffusers


def transformers() -> Any:
    """transformers. Raises: SettingError where it is missing."""
    return require_extra("transformers", extra="bench", what="the peer diffusers")


def silence() -> AbstractContextManager[None]:
    """Both say nothing meanwhile."""
    return quietly(library(), transformers())


class Diffusers:
    """As it comes; it takes a folder alone."""

    def __init__(self, case: Case) -> None:
        if not Path(case.checkpoint).is_dir():
            hint = f"sdinpaint convert {case.checkpoint} FOLDER, and --checkpoint FOLDER"
            found = "diffusers takes a folder in its own layout here, not a single file"
            raise SettingError("BENCH_CHECKPOINT", "checkpoint", f"{case.checkpoint}: {found}", hint=hint)
        self.case = case
        self.family = open_checkpoint(LoadOptions(source=case.checkpoint)).family
        self.pipe = self._load()

    def _load(self) -> Any:
        diffusers = library()
        xl = self.family.text_2 is not None
        kind = diffusers.StableDiffusionXLInpaintPipeline if xl else diffusers.StableDiffusionInpaintPipeline
        beside = {"add_watermarker": False} if xl else {"safety_checker": None}
        options = {"dtype": self.case.torch_dtype, "local_files_only": True, **beside}
        with silence():
            pipe = kind.from_pretrained(self.case.checkpoint, **options).to(self.case.device)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
        return pipe

    def ready(self) -> None:
        """Nothing is put off."""

    def parameters(self) -> list[Tensor]:
        """The weights of UNet, VAE and text encoders."""
        models = [self.pipe.unet, self.pipe.vae, *self.encoders]
        return [weight for model in models for weight in model.parameters()]

    @property
    def encoders(self) -> list[Any]:
        """The text encoder; for SDXL both of them."""
        found = [self.pipe.text_encoder, getattr(self.pipe, "text_encoder_2", None)]
        return [encoder for encoder in found if encoder is not None]

    @cached_property
    def inputs(self) -> StepInputs:
        """Those of the case."""
        return StepInputs.draw(self.family, self.case)

    @property
    def scaled(self) -> Tensor:
        """The noisy latents as the UNet is shown them."""
        return self.inputs.x / math.hypot(1, self.inputs.sigma)

    def fed(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]:
        """What its pipelines give the UNet in a guided step, both halves in one batch."""
        given, dtype = self.inputs, self.case.torch_dtype
        t = torch.tensor(TIMESTEP, device=given.x.device)
        takes_mask = self.family.unet.in_channels > given.x.shape[1]
        fed = torch.cat([self.scaled, given.mask, given.masked_latents], dim=1) if takes_mask else self.scaled
        added = None
        if given.pooled is not None:
            added = {"text_embeds": given.pooled.to(dtype), "time_ids": given.sizes.expand(2, -1)}
        return torch.cat([fed] * 2).to(dtype), t, given.contexts.to(dtype), added

    @torch.inference_mode()
    def step(self) -> Tensor:
        """As its pipelines do it: both halves of the batch through the UNet, then guidance."""
        x, t, contexts, added = self.fed()
        output = self.pipe.unet(x, t, contexts, added_cond_kwargs=added, return_dict=False)[0]
        uncond, cond = output.float().chunk(2)
        guided = uncond + GUIDANCE * (cond - uncond)
        sigma = self.inputs.sigma
        if self.family.schedule.prediction == "v":
            return (self.scaled - sigma * guided) / math.hypot(1, sigma)
        return self.inputs.x - sigma * guided

    @torch.inference_mode()
    def decode(self) -> Tensor:
        """Through its autoencoder."""
        latents = self.inputs.latents / self.family.vae.scaling_factor
        return self.pipe.vae.decode(latents.to(self.case.torch_dtype), return_dict=False)[0].float()

    @torch.inference_mode()
    def encode(self) -> Tensor:
        """The mean of its autoencoder's posterior."""
        posterior = self.pipe.vae.encode(self.inputs.image.to(self.case.torch_dtype)).latent_dist
        return posterior.mode().float() * self.family.vae.scaling_factor

    @torch.inference_mode()
    def encode_text(self) -> Tensor:
        """By its pipeline."""
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "negative_prompt": ""}
        cond, uncond, *_ = self.pipe.encode_prompt(PROMPT, device=self.case.device, **options)
        return torch.cat([uncond, cond]).float()

    def picture(self) -> Image.Image:
        """By its pipeline."""
        image, mask = picture_and_mask(self.case.size)
        made = self.pipe(
            PROMPT,
            image=image,
            mask_image=mask,
            negative_prompt="",
            height=self.case.size,
            width=self.case.size,
            num_inference_steps=self.case.steps,
            guidance_scale=GUIDANCE,
            strength=1.0,
            generator=torch.Generator().manual_seed(SEED),
        )
        return made.images[0]


class ChannelsLast(Diffusers):
    """With UNet and autoencoder in the memory format that convolutions prefer."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        for model in (self.pipe.unet, self.pipe.vae):
            model.to(memory_format=torch.channels_last)


class Compiled(Diffusers):
    """With UNet and decoder through torch.compile, which does its work when each is first run."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        torch.compiler.reset()  # after some models of one class in a process it would give up, and say nothing
        for model in (self.pipe.unet, self.pipe.vae.decoder):
            model.compile()

    def ready(self) -> None:
        """Compile, by running both."""
        self.step()
        self.decode()
