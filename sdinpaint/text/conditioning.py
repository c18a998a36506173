"""Prompts to what a UNet is told: states of one text encoder, or for SDXL of two, and with them the picture's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdinpaint.families import Family
from sdinpaint.models.unet import timestep_embedding
from sdinpaint.sampling import Conditioning
from sdinpaint.text.tokenizer import Tokenizer

__all__ = ["PictureSize", "TextConditioner"]

SIZES = 6


@dataclass(frozen=True)
class PictureSize:
    """What SDXL is told of the picture, in pixels: its size, of which one it was cut, and where (top, left).

    Source: Podell et al. 2023, section 2.2; their training pictures were enlarged and cut, and the model was told.
    """

    target: tuple[int, int]
    """Height and width."""
    original: tuple[int, int] | None = None
    """None: as `target`."""
    crop: tuple[int, int] = (0, 0)

    def numbers(self) -> list[int]:
        """The six numbers in the order of training."""
        return [*(self.original or self.target), *self.crop, *self.target]


class TextConditioner:
    """The text encoders of a model with their tokenizers, one each: prompts -> Conditioning."""

    def __init__(self, family: Family, encoders: Sequence[nn.Module], tokenizer: Tokenizer) -> None:
        self.family = family
        self.encoders = nn.ModuleList(encoders)
        self.tokenizers = tuple(tokenizer.with_padding(text.pad_id) for text in family.texts)

    def __call__(self, prompts: Sequence[str | None], size: PictureSize) -> Conditioning:
        """B prompts -> context (B, 77, D) and, for SDXL, vector (B, V): the pooled text, then the sines of six sizes.

        None is the empty prompt, and for SDXL zeros in the place of all that a text encoder says.
        Source: diffusers StableDiffusionXLInpaintPipeline; Stability-AI/generative-models GeneralConditioner.
        """
        device = next(self.encoders[0].parameters()).device
        texts = ["" if prompt is None else prompt for prompt in prompts]
        encoded = [
            encoder(tokenizer(texts).to(device), pooled=True)
            for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True)
        ]
        zeros = self.family.zeros_for_none
        said = torch.tensor([not zeros or prompt is not None for prompt in prompts], dtype=torch.bool, device=device)
        context = torch.cat([states for states, _ in encoded], dim=-1).where(said[:, None, None], 0)
        pooled = encoded[-1][1]
        if pooled is None:
            return Conditioning(context)
        return Conditioning(context, self._vector(pooled.where(said[:, None], 0), size))

    def _vector(self, pooled: Tensor, size: PictureSize) -> Tensor:
        """pooled (B, P) -> (B, V) float32."""
        width = ((self.family.unet.vector_dim or 0) - pooled.shape[1]) // SIZES
        sines = timestep_embedding(torch.tensor(size.numbers(), dtype=torch.float32, device=pooled.device), width)
        return torch.cat([pooled.float(), sines.flatten().expand(len(pooled), -1)], dim=-1)
