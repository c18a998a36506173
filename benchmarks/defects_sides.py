"""diffusers and sdinpaint over the included demo checkpoint, by the same verbs: both get the very same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import sdinpaint
from sdinpaint.checkpoints.opening import DEMO
from sdinpaint.images.boxes import Box
from sdinpaint.images.crops import crop_box
from sdinpaint.masks import binarize, read_mask

__all__ = ["Diffusers", "Paint", "SdInpaint", "Side"]

PROMPT = "a red ball"
CONTEXT = 32
"""Pixels around the mask that a crop takes along."""

OnStep = Callable[[Tensor], object]
Paint = Callable[..., list[Image.Image]]


def ignore(latents: Tensor) -> None:
    """What is done after a step where nothing else is asked for."""


class Diffusers:
    """StableDiffusionInpaintPipeline, used as its documentation shows."""

    name = "diffusers"

    def __init__(self, steps: int) -> None:
        import diffusers
        import transformers

        for library in (diffusers, transformers):
            library.logging.set_verbosity_error()
            library.logging.disable_progress_bar()
        kind: Any = diffusers.StableDiffusionInpaintPipeline
        self.pipe = kind.from_pretrained(DEMO, dtype=torch.float32, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps = steps

    def paint(
        self,
        image: Any,
        mask: Any,
        *,
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        on_step: OnStep = ignore,
        **options: Any,
    ) -> list[Image.Image]:
        """One picture per seed, of a generator each; on_step(latents) after every step."""

        def after_step(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            on_step(tensors["latents"])
            return tensors

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options |= {
            "num_inference_steps": steps or self.steps,
            "generator": generators,
            "callback_on_step_end": after_step,
        }
        return list(self.pipe([PROMPT] * len(seeds), image, mask, **options).images)

    def paint_pasted(self, image: Image.Image, mask: Image.Image, **options: Any) -> list[Image.Image]:
        """`paint`, then the processor's overlay of the picture."""
        painted = self.paint(image, mask, **options)
        return [self.pipe.image_processor.apply_overlay(mask, image, one) for one in painted]

    def paint_cropped(self, image: Image.Image, mask: Image.Image, **options: Any) -> list[Image.Image]:
        """The masked region alone, at the model's size; the overlay is part of it."""
        return self.paint(image, mask, padding_mask_crop=CONTEXT, **options)

    def crop_box(self, mask: Image.Image) -> Box:
        """What `paint_cropped` cuts out."""
        return Box(*self.pipe.mask_processor.get_crop_region(mask, mask.width, mask.height, pad=CONTEXT))

    def latent_mask(self, mask: Image.Image) -> NDArray[np.bool_]:
        """What the model is told to repaint: (H, W)."""
        height, width = mask.height, mask.width
        hole = self.pipe.mask_processor.preprocess(mask, height=height, width=width)
        latents = torch.zeros(1, 4, height // 8, width // 8)  # of the masked picture, which has no say in this
        told, _ = self.pipe.prepare_mask_latents(
            hole, latents, 1, height, width, torch.float32, torch.device("cpu"), None, False
        )
        return np.asarray(told[0, 0] > 0)

    def tensor(self, image: Image.Image) -> Tensor:
        """A picture as float32 (1, 3, H, W) in [0, 1]."""
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255

    @contextmanager
    def idle(self) -> Iterator[None]:
        """A UNet that returns at once, which leaves the number of steps as it is."""

        def forward(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
            return (x[:, :4],)

        with mock.patch.object(self.pipe.unet, "forward", forward):
            yield


class SdInpaint:
    """sdinpaint.load("demo")."""

    name = "sdinpaint"

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.pipe = sdinpaint.load("demo", device="cpu", progress=False)

    def paint(
        self,
        image: Any,
        mask: Any,
        *,
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        on_step: OnStep = ignore,
        **options: Any,
    ) -> list[Image.Image]:
        """One picture per seed; on_step(latents) after every step."""

        def after_step(step: int, x: Tensor, x0: Tensor) -> None:
            on_step(x)

        options |= {"steps": steps or self.steps, "seed": list(seeds), "on_step": after_step}
        return self.pipe.inpaint(image, mask, [PROMPT] * len(seeds), progress=False, **options).images

    def paint_pasted(self, image: Image.Image, mask: Image.Image, **options: Any) -> list[Image.Image]:
        """`paint`, which always puts its work back into the picture."""
        return self.paint(image, mask, **options)

    def paint_cropped(self, image: Image.Image, mask: Image.Image, **options: Any) -> list[Image.Image]:
        """The masked region alone, at the model's size."""
        return self.paint(image, mask, crop=CONTEXT, **options)

    def crop_box(self, mask: Image.Image) -> Box:
        """What `paint_cropped` cuts out."""
        hole = binarize(read_mask(mask, (mask.height, mask.width)))
        return crop_box(hole, CONTEXT, max(hole.shape))

    def latent_mask(self, mask: Image.Image) -> NDArray[np.bool_]:
        """What the model is told to repaint: (H, W)."""
        blank = Image.new("RGB", mask.size)
        return np.asarray(self.pipe.encode_image(blank, mask, latents=False).mask[0, 0] > 0)

    def tensor(self, image: Image.Image) -> Tensor:
        """A picture as float32 (1, 3, H, W) in [-1, 1]."""
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1

    @contextmanager
    def idle(self) -> Iterator[None]:
        """A UNet that returns at once, which leaves the number of steps as it is."""
        with mock.patch.object(self.pipe, "unet", _IdleUNet()):
            yield


Side = Diffusers | SdInpaint


class _IdleUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nowhere = nn.Parameter(torch.zeros(1), requires_grad=False)  # a pipeline is where its UNet's weights are

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x[:, :4]
