"""sdinpaint and diffusers with the included checkpoint behind one interface, for the part `defects` of the suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sdinpaint.bench.peers import diffusers_peer
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.checkpoints.opening import DEMO
from sdinpaint.images.boxes import Box
from sdinpaint.images.crops import crop_box
from sdinpaint.loading import load
from sdinpaint.masks import binarize, read_mask

__all__ = ["INPAINTERS", "Inpainter", "Paint"]

PROMPT = "a red ball"
CONTEXT = 32
"""Pixels around the mask that a crop includes."""

OnStep = Callable[[Tensor], object]
Paint = Callable[..., list[Image.Image]]


def _ignore(latents: Tensor) -> None:
    """Do nothing after a step."""


class DiffusersInpainter:
    """StableDiffusionInpaintPipeline, used as its documentation shows."""

    def __init__(self, steps: int) -> None:
        kind = diffusers_peer.library().StableDiffusionInpaintPipeline
        with diffusers_peer.silence():
            self.pipe = kind.from_pretrained(DEMO, dtype=torch.float32, local_files_only=True, safety_checker=None)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps = steps

    def paint(
        self,
        image: Any,
        mask: Any,
        *,
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        on_step: OnStep = _ignore,
        **options: Any,
    ) -> list[Image.Image]:
        """Inpaint an image for each seed, with a generator each.

        Args:
            image: one or several images, or a tensor in the range of `tensor`.
            mask: one or several masks, white is repainted.
            seeds: one for each result.
            steps: those of the constructor by default.
            on_step: called with the latents after every step.
            options: of the pipeline.

        Returns:
            An image for each seed.
        """

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
        """Inpaint, then paste the known pixels back by the image processor.

        Args:
            image: the image.
            mask: white is repainted.
            options: as for `paint`.

        Returns:
            An image for each seed.
        """
        painted = self.paint(image, mask, **options)
        return [self.pipe.image_processor.apply_overlay(mask, image, one) for one in painted]

    def paint_cropped(self, image: Image.Image, mask: Image.Image, **options: Any) -> list[Image.Image]:
        """Inpaint a crop around the mask, at the model's size.

        Args:
            image: the image.
            mask: white is repainted.
            options: as for `paint`.

        Returns:
            An image for each seed.
        """
        return self.paint(image, mask, padding_mask_crop=CONTEXT, **options)

    def crop_box(self, mask: Image.Image) -> Box:
        """Compute the crop of `paint_cropped`.

        Args:
            mask: white is repainted.

        Returns:
            The box in pixels.
        """
        return Box(*self.pipe.mask_processor.get_crop_region(mask, mask.width, mask.height, pad=CONTEXT))

    def latent_mask(self, mask: Image.Image) -> NDArray[np.bool_]:
        """Compute the latent pixels that are repainted.

        Args:
            mask: white is repainted.

        Returns:
            True where the latents are repainted (H, W).
        """
        height, width = mask.height, mask.width
        hole = self.pipe.mask_processor.preprocess(mask, height=height, width=width)
        latents = torch.zeros(1, 4, height // 8, width // 8)  # of the masked image, which does not matter here
        repainted, _ = self.pipe.prepare_mask_latents(
            hole, latents, 1, height, width, torch.float32, torch.device("cpu"), None, False
        )
        return np.asarray(repainted[0, 0] > 0)

    def tensor(self, image: Image.Image) -> Tensor:
        """Convert an image to a tensor.

        Args:
            image: an RGB image.

        Returns:
            float32 (1, 3, H, W) in [0, 1].
        """
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Replace the UNet within this block by one that returns at once, which does not change the number of steps."""

        def forward(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
            return (x[:, :4],)

        with mock.patch.object(self.pipe.unet, "forward", forward):
            yield


class SdInpaintInpainter:
    """sdinpaint with its defaults."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.pipe = load("demo", device="cpu", dtype="float32", progress=False)

    def paint(
        self,
        image: Any,
        mask: Any,
        *,
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        on_step: OnStep = _ignore,
        **options: Any,
    ) -> list[Image.Image]:
        """Inpaint an image for each seed.

        Args:
            image: one or several images, or a tensor in the range of `tensor`.
            mask: one or several masks, white is repainted.
            seeds: one for each result.
            steps: those of the constructor by default.
            on_step: called with the latents after every step.
            options: of the pipeline.

        Returns:
            An image for each seed.
        """

        def after_step(step: int, x: Tensor, x0: Tensor) -> None:
            on_step(x)

        options |= {"steps": steps or self.steps, "seed": list(seeds), "on_step": after_step}
        return self.pipe.inpaint(image, mask, [PROMPT] * len(seeds), progress=False, **options).images

    paint_pasted = paint
    """Inpaint; known pixels are always pasted back."""

    def paint_cropped(self, image: Image.Image, mask: Image.Image, **options: Any) -> list[Image.Image]:
        """Inpaint a crop around the mask, at the model's size.

        Args:
            image: the image.
            mask: white is repainted.
            options: as for `paint`.

        Returns:
            An image for each seed.
        """
        return self.paint(image, mask, crop=CONTEXT, **options)

    def crop_box(self, mask: Image.Image) -> Box:
        """Compute the crop of `paint_cropped`.

        Args:
            mask: white is repainted.

        Returns:
            The box in pixels.
        """
        hole = binarize(read_mask(mask, (mask.height, mask.width)))
        return crop_box(hole, CONTEXT, max(hole.shape))

    def latent_mask(self, mask: Image.Image) -> NDArray[np.bool_]:
        """Compute the latent pixels that are repainted.

        Args:
            mask: white is repainted.

        Returns:
            True where the latents are repainted (H, W).
        """
        blank, latents = Image.new("RGB", mask.size), torch.zeros(1, 4, mask.height // 8, mask.width // 8)
        with mock.patch.object(self.pipe, "sample_latents", return_value=latents):  # which do not matter here
            return np.asarray(self.pipe.encode_image(blank, mask, latents=False).mask[0, 0] > 0)

    def tensor(self, image: Image.Image) -> Tensor:
        """Convert an image to a tensor.

        Args:
            image: an RGB image.

        Returns:
            float32 (1, 3, H, W) in [-1, 1].
        """
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Replace the UNet within this block by one that returns at once, which does not change the number of steps."""
        with mock.patch.object(self.pipe, "unet", _IdleUNet()):
            yield


Inpainter = DiffusersInpainter | SdInpaintInpainter

INPAINTERS: Mapping[str, Callable[[int], Inpainter]] = {OURS: SdInpaintInpainter, "diffusers": DiffusersInpainter}
"""Functions by system: open the included checkpoint for runs of so many steps."""


class _IdleUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nowhere = nn.Parameter(torch.zeros(1), requires_grad=False)  # a pipeline's device is that of its UNet

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x[:, :4]
