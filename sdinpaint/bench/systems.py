"""This library and its peers over one checkpoint, by the same verbs; a peer is imported when it is opened."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from sdinpaint.bench.cases import GUIDANCE, PROMPT, SEED, SIGMA, Case, StepInputs, picture_and_mask
from sdinpaint.errors import SettingError
from sdinpaint.extras import need, quietly
from sdinpaint.loading import load, open_checkpoint
from sdinpaint.models.unet import timestep_embedding
from sdinpaint.sampling import Conditioning, Denoiser, Known, schedules
from sdinpaint.sampling.presets import check_name

__all__ = ["OURS", "PEERS", "System", "check_peers", "open_system"]

OURS = "sdinpaint"


class System(Protocol):
    """A program with a checkpoint loaded."""

    def parameters(self) -> list[Tensor]:
        """The weights of all its models."""

    def step(self) -> Tensor:
        """One guided step of `StepInputs` -> x0 (1, 4, H, W)."""

    def picture(self) -> Image.Image:
        """The whole inpainted picture of `picture_and_mask`, without pasting back, by DDIM."""


class SdInpaint:
    """This library."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.pipe = load(case.checkpoint, device=case.device, dtype=case.dtype, progress=False)

    def parameters(self) -> list[Tensor]:
        """The weights of UNet, VAE and text encoders."""
        return [weight for model in (self.pipe.unet, self.pipe.vae, self.pipe.text) for weight in model.parameters()]

    @cached_property
    def inputs(self) -> StepInputs:
        """Those of the case."""
        return StepInputs.draw(self.pipe.family, self.case)

    @cached_property
    def denoiser(self) -> Denoiser:
        """Made once, as a run does."""
        given = self.inputs
        uncond, cond = (self._conditioning(index) for index in range(2))
        return self.pipe.denoiser(Known(given.mask, given.masked_latents), cond, uncond, guidance_scale=GUIDANCE)

    def step(self) -> Tensor:
        """Through the pipeline's denoiser."""
        return self.denoiser(self.inputs.x, SIGMA)

    def picture(self) -> Image.Image:
        """As diffusers does it: a latent cell is repainted where its first pixel is."""
        image, mask = picture_and_mask(self.case.size)
        options: dict[str, Any] = {"paste_back": False, "cover": "nearest", "progress": False}
        result = self.pipe.inpaint(
            image, mask, PROMPT, steps=self.case.steps, guidance_scale=GUIDANCE, seed=SEED, **options
        )
        return result.image

    def _conditioning(self, index: int) -> Conditioning:
        given, width = self.inputs, self.pipe.family.unet.vector_dim
        context = given.contexts[index : index + 1]
        if given.pooled is None or width is None:
            return Conditioning(context)
        pooled = given.pooled[index : index + 1]
        sines = timestep_embedding(given.sizes, (width - pooled.shape[1]) // len(given.sizes)).view(1, -1)
        return Conditioning(context, torch.cat([pooled, sines], dim=1))


class Diffusers:
    """diffusers' inpainting pipeline; it takes a folder alone."""

    def __init__(self, case: Case, *, channels_last: bool = False) -> None:
        if not Path(case.checkpoint).is_dir():
            hint = f"sdinpaint convert {case.checkpoint} FOLDER, and --checkpoint FOLDER"
            found = "diffusers takes a folder in its own layout here, not a single file"
            raise SettingError("BENCH_CHECKPOINT", "checkpoint", f"{case.checkpoint}: {found}", hint=hint)
        self.case = case
        self.family = open_checkpoint(case.checkpoint).family
        self.pipe = self._load()
        if channels_last:
            self.pipe.unet.to(memory_format=torch.channels_last)
            self.pipe.vae.to(memory_format=torch.channels_last)

    def _load(self) -> Any:
        diffusers = need("diffusers", extra="dev", what="the peer diffusers")
        xl = self.family.text_2 is not None
        kind = diffusers.StableDiffusionXLInpaintPipeline if xl else diffusers.StableDiffusionInpaintPipeline
        beside = {"add_watermarker": False} if xl else {"safety_checker": None}
        options = {"dtype": self.case.torch_dtype, "local_files_only": True, **beside}
        with quietly(diffusers, need("transformers", extra="dev", what="the peer diffusers")):
            pipe = kind.from_pretrained(self.case.checkpoint, **options).to(self.case.device)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
        return pipe

    def parameters(self) -> list[Tensor]:
        """The weights of UNet, VAE and text encoders."""
        models = [self.pipe.unet, self.pipe.vae, self.pipe.text_encoder, getattr(self.pipe, "text_encoder_2", None)]
        return [weight for model in models if model is not None for weight in model.parameters()]

    @cached_property
    def inputs(self) -> StepInputs:
        """Those of the case."""
        return StepInputs.draw(self.family, self.case)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """As its pipelines do it: both halves of the batch through the UNet, then guidance."""
        given, trained = self.inputs, schedules.train_sigmas(self.family.schedule)
        t = torch.tensor(schedules.timestep(trained, SIGMA), device=given.x.device)
        scaled = given.x / (1 + SIGMA**2) ** 0.5
        takes_mask = self.family.unet.in_channels > scaled.shape[1]
        fed = torch.cat([scaled, given.mask, given.masked_latents], dim=1) if takes_mask else scaled
        added = None
        if given.pooled is not None:
            added = {"text_embeds": given.pooled.to(self.case.torch_dtype), "time_ids": given.sizes.expand(2, -1)}
        output = self.pipe.unet(
            torch.cat([fed] * 2).to(self.case.torch_dtype),
            t,
            given.contexts.to(self.case.torch_dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        uncond, cond = output.float().chunk(2)
        guided = uncond + GUIDANCE * (cond - uncond)
        if self.family.schedule.prediction == "v":
            return (scaled - SIGMA * guided) / (1 + SIGMA**2) ** 0.5
        return given.x - SIGMA * guided

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


PEERS: dict[str, Callable[[Case], System]] = {
    "diffusers": Diffusers,
    "diffusers-channels-last": partial(Diffusers, channels_last=True),
}
NEEDED = dict.fromkeys(PEERS, "diffusers")
"""The package of each."""


def check_peers(names: tuple[str, ...]) -> None:
    """Raises: SettingError for a peer that is not known or not installed, before anything is measured."""
    for name in names:
        check_name("BENCH_PEER", "peer", name, PEERS)
        need(NEEDED[name], extra="dev", what=f"the peer {name}")


def open_system(name: str, case: Case) -> System:
    """Load the case's checkpoint with one system."""
    return SdInpaint(case) if name == OURS else PEERS[name](case)
