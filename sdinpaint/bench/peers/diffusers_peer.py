"""diffusers as a baseline: its inpainting pipeline with defaults, channels-last, compiled, or with a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable
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
from sdinpaint.sampling.graphs import Graphs, Tensors

__all__ = ["Captured", "ChannelsLast", "Compiled", "Diffusers", "library", "silence"]

IMPORTS = "from diffusers import StableDiffusionInpaintPipeline"


def library() -> Any:
    """Import diffusers with its pipeline.

    Returns:
        The package.

    Raises:
        SettingError: diffusers or transformers is missing.
    """
    transformers()
    diffusers = require_extra("diffusers", extra="bench", what="the baseline diffusers")
    diffusers.StableDiffusionInpaintPipeline  # noqa: B018
    return diffusers


def transformers() -> Any:
    """Import transformers. Raises: SettingError where it is missing."""
    return require_extra("transformers", extra="bench", what="the baseline diffusers")


def silence() -> AbstractContextManager[None]:
    """Silence the log of diffusers and transformers within a block."""
    return quietly(library(), transformers())


class Diffusers:
    """diffusers with its defaults, over a folder in its own layout.

    Raises:
        SettingError: the checkpoint is a single file.
    """

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
        """Do nothing: nothing is put off."""

    def parameters(self) -> list[Tensor]:
        """Return the weights of UNet, VAE and text encoders."""
        models = [self.pipe.unet, self.pipe.vae, *self.encoders]
        return [weight for model in models for weight in model.parameters()]

    @property
    def encoders(self) -> list[Any]:
        """The text encoder; both of them for SDXL."""
        found = [self.pipe.text_encoder, getattr(self.pipe, "text_encoder_2", None)]
        return [encoder for encoder in found if encoder is not None]

    @cached_property
    def inputs(self) -> StepInputs:
        """The inputs of the case."""
        return StepInputs.draw(self.family, self.case)

    @property
    def scaled(self) -> Tensor:
        """The noisy latents scaled as the UNet's input."""
        return self.inputs.x / math.hypot(1, self.inputs.sigma)

    def fed(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]:
        """Return the UNet's inputs in a guided step, two of each image: x, t, context, further conditioning."""
        given, dtype = self.inputs, self.case.torch_dtype
        t = torch.tensor(TIMESTEP, device=given.x.device)
        takes_mask = self.family.unet.in_channels > given.x.shape[1]
        fed = torch.cat([self.scaled, given.mask, given.masked_latents], dim=1) if takes_mask else self.scaled
        added = None
        if given.pooled is not None:
            pooled = given.pooled.repeat_interleave(self.case.images, dim=0)
            added = {"text_embeds": pooled.to(dtype), "time_ids": given.sizes.expand(len(pooled), -1)}
        contexts = given.contexts.repeat_interleave(self.case.images, dim=0)
        return torch.cat([fed] * 2).to(dtype), t, contexts.to(dtype), added

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Run one guided step as its pipelines do, both halves in one batch, and return x0 (N, 4, H, W)."""
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
        """Decode the latents to an image, float32 (1, 3, 8H, 8W)."""
        latents = self.inputs.latents / self.family.vae.scaling_factor
        return self.pipe.vae.decode(latents.to(self.case.torch_dtype), return_dict=False)[0].float()

    @torch.inference_mode()
    def encode(self) -> Tensor:
        """Encode the image to the mean of its latents, float32 (1, 4, H, W)."""
        posterior = self.pipe.vae.encode(self.inputs.image.to(self.case.torch_dtype)).latent_dist
        return posterior.mode().float() * self.family.vae.scaling_factor

    @torch.inference_mode()
    def encode_text(self) -> Tensor:
        """Encode both prompts to text embeddings (2, 77, D)."""
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "negative_prompt": ""}
        cond, uncond, *_ = self.pipe.encode_prompt(PROMPT, device=self.case.device, **options)
        return torch.cat([uncond, cond]).float()

    def picture(self) -> Image.Image:
        """Inpaint the image of the case by its pipeline."""
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

    def add_lora(self, path: Path) -> None:
        """Load a LoRA, and fuse it into the weights."""
        self.pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        self.pipe.fuse_lora()

    def remove_lora(self) -> None:
        """Subtract the LoRA, and remove its layers."""
        self.pipe.unfuse_lora()
        self.pipe.unload_lora_weights()


class ChannelsLast(Diffusers):
    """diffusers with UNet and VAE in channels-last memory format."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        for model in (self.pipe.unet, self.pipe.vae):
            model.to(memory_format=torch.channels_last)


class Compiled(Diffusers):
    """diffusers with UNet and VAE decoder through torch.compile."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        torch.compiler.reset()  # after several models of one class torch.compile silently gives up
        for model in (self.pipe.unet, self.pipe.vae.decoder):
            model.compile()

    def ready(self) -> None:
        """Compile, by running both once."""
        self.step()
        self.decode()


class Captured(Diffusers):
    """diffusers with the UNet in a CUDA graph.

    Raises:
        SettingError: the device has no CUDA graphs.
    """

    def __init__(self, case: Case) -> None:
        if not case.device.startswith("cuda"):
            raise SettingError("BENCH_PEER", "the baseline diffusers-captured", f"on {case.device}", expected="on cuda")
        super().__init__(case)
        self.pipe.unet.forward = captured(self.pipe.unet.forward, Graphs(True))

    def ready(self) -> None:
        """Capture the graph, by running a step."""
        self.step()


def captured(forward: Callable[..., Any], graphs: Graphs) -> Callable[..., tuple[Tensor]]:
    """Wrap the forward of diffusers' UNet so that it is replayed from a CUDA graph.

    Args:
        forward: the UNet's own.
        graphs: keeps the graph; tensors on a CPU are run as they are.

    Returns:
        A function that its pipelines can call in place of `forward`.
    """

    def run(x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **options: Any) -> tuple[Tensor]:
        added = options.get("added_cond_kwargs") or {}

        def function(varying: Tensors, constant: Tensors) -> Tensor:
            x, t, context, *values = varying
            conditioning = dict(zip(added, values, strict=True)) or None
            output: Tensor = forward(x, t, context, added_cond_kwargs=conditioning, return_dict=False)[0]
            return output

        return (graphs("unet", function, [x, t, encoder_hidden_states, *added.values()], ()),)

    return run
