"""One measured configuration (checkpoint, size, dtype), and the inputs that every system is given for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdinpaint.checkpoints.building import find_dtype
from sdinpaint.families import Family
from sdinpaint.sampling.schedules import train_sigmas

__all__ = ["GUIDANCE", "PROMPT", "SEED", "STEP", "TIMESTEP", "Case", "StepInputs", "picture_and_mask"]

PROMPT = "a red fox"
GUIDANCE = 7.5
SEED = 7
STEP = "guided step"
"""The name of that measurement."""
TIMESTEP = 512.0
"""The timestep of the measured step: exact in every dtype, since OpenVINO rounds it to the one it computes in."""


HELD_BACK = ("peers", "checkpoint", "rounds", "images")
"""Fields of a case that say nothing of a single row, or that its `what` says."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, and the size, dtype and device at which it is run."""

    family: str
    """The family's name in the tables."""
    checkpoint: str
    dtype: str
    stored: str | None
    """The dtype of a random checkpoint's files; None for one that was there."""
    device: str
    size: int
    """Height and width in pixels."""
    steps: int
    """Sampling steps of a whole image."""
    rounds: int
    quick: bool
    peers: tuple[str, ...] = ()
    images: int = 1
    """Images at once in the guided step."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that the models compute in."""
        return find_dtype(self.dtype)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that every row of this case has."""
        return {name: value for name, value in asdict(self).items() if name not in HELD_BACK}


@dataclass(frozen=True)
class StepInputs:
    """Inputs of one guided step, and of the networks before and after it; float32, the same for every system."""

    x: Tensor
    """Noisy latents (N, 4, H, W) of all images at `sigma`."""
    sigma: float
    """The noise level that belongs to TIMESTEP in training."""
    mask: Tensor
    """(N, 1, H, W), with a square hole."""
    masked_latents: Tensor
    """(N, 4, H, W)."""
    contexts: Tensor
    """Text embeddings (2, 77, D): of the negative and of the positive prompt."""
    pooled: Tensor | None
    """Pooled text embeddings (2, P) for SDXL, None for others."""
    sizes: Tensor
    """SDXL's size and crop conditioning (6,)."""
    latents: Tensor
    """Latents (1, 4, H, W) to decode."""
    image: Tensor
    """An image (1, 3, 8H, 8W) in [-1, 1] to encode."""

    @classmethod
    def draw(cls, family: Family, case: Case) -> StepInputs:
        """Draw unit-variance inputs on the CPU, so that they are the same for every device.

        Args:
            family: the constants that give the shapes.
            case: size and device.

        Returns:
            The inputs, on the case's device.
        """
        generator = torch.Generator().manual_seed(SEED)
        side, sigma = case.size // 8, float(train_sigmas(family.schedule)[int(TIMESTEP)])

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(case.device)

        shape = (1, family.vae.latent_channels, side, side)
        noisy = (case.images, *shape[1:])
        mask = torch.zeros(case.images, 1, side, side, device=case.device)
        mask[..., side // 4 : side // 2, side // 4 : side // 2] = 1
        pooled = family.texts[-1].projection_dim
        return cls(
            x=normal(*noisy) * (1 + sigma**2) ** 0.5,
            sigma=sigma,
            mask=mask,
            masked_latents=normal(*noisy),
            contexts=normal(2, family.text.context_length, family.unet.context_dim),
            pooled=None if family.unet.vector_dim is None or pooled is None else normal(2, pooled),
            sizes=torch.tensor([case.size, case.size, 0, 0, case.size, case.size], device=case.device),
            latents=normal(*shape),
            image=normal(1, family.vae.in_channels, case.size, case.size).clamp(-1, 1),
        )


def picture_and_mask(size: int) -> tuple[Image.Image, Image.Image]:
    """Make a smooth image with some grain, and a mask with a square hole of a quarter of its area.

    Args:
        size: height and width in pixels.

    Returns:
        The image (RGB) and the mask (L, white is repainted).
    """
    rows, columns = np.mgrid[:size, :size] / size
    waves = [0.5 + 0.4 * np.sin(7 * rows + 5 * columns * shift + shift) for shift in range(3)]
    grain = np.random.default_rng(SEED).normal(0, 0.05, (size, size, 3))
    hole = np.zeros((size, size), np.uint8)
    hole[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 255
    pixels = (255 * (np.stack(waves, -1) + grain).clip(0, 1)).astype(np.uint8)
    return Image.fromarray(pixels), Image.fromarray(hole)
