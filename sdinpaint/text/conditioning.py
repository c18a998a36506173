"""Text conditioning: the hidden states of one text encoder, or of two for SDXL, with SDXL's size conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdinpaint.checks import check_whole
from sdinpaint.errors import SettingError, said
from sdinpaint.families import Family
from sdinpaint.models.prepared_unet import timestep_embedding
from sdinpaint.sampling import Conditioning
from sdinpaint.text.tokenizer import Tokenizer

__all__ = ["PictureSize", "TextConditioner"]

SIZES, MAX_SIDE = 6, 2**24
"""How many numbers SDXL is conditioned on, and the largest, which float32 holds exactly."""


@dataclass(frozen=True)
class PictureSize:
    """SDXL's size and crop conditioning (micro-conditioning), in pixels.

    Source: Podell et al. 2023, section 2.2: training images were scaled and cropped, and the model was given both.
    """

    target: tuple[int, int]
    """Height and width of the image to generate."""
    original: tuple[int, int] | None = None
    """Height and width of the image before it was scaled and cropped; None is the same as `target`."""
    crop: tuple[int, int] = (0, 0)
    """Top and left of the crop."""

    def __post_init__(self) -> None:
        for name, low in {"target": 1, "original": 1, "crop": 0}.items():
            sides = getattr(self, name)
            if sides is None and name == "original":
                continue
            if not isinstance(sides, Sequence) or isinstance(sides, str) or len(sides) != 2:
                raise SettingError("SETTING_SIZE", name, said(sides), expected="two numbers of pixels")
            object.__setattr__(self, name, tuple(check_whole("size", side, low, MAX_SIDE, of=name) for side in sides))

    def numbers(self) -> list[int]:
        """Return the six numbers in the order of training."""
        return [*(self.original or self.target), *self.crop, *self.target]


class TextConditioner:
    """The text encoders of a model with one tokenizer each: prompts to `Conditioning`.

    Args:
        family: the family of the model.
        encoders: one text encoder for each of `family.texts`.
        tokenizer: the vocabulary; each encoder gets its own padding.
    """

    def __init__(self, family: Family, encoders: Sequence[nn.Module], tokenizer: Tokenizer) -> None:
        self.family = family
        self.encoders = nn.ModuleList(encoders)
        self.tokenizers = tuple(tokenizer.with_padding(text.pad_id) for text in family.texts)

    def __call__(self, prompts: Sequence[str | None], size: PictureSize) -> Conditioning:
        """Encode prompts.

        Args:
            prompts: B prompts. None is the empty prompt; for SDXL it gives zeros in place of all text embeddings.
            size: SDXL's size conditioning.

        Returns:
            The context (B, 77, D) and, for SDXL, the vector (B, V): the pooled text embedding, then the sinusoidal
            embeddings of six sizes.

        Raises:
            SettingError: a prompt is not valid text.

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
        """Join pooled (B, P) and the embedded sizes: (B, V) float32."""
        width = ((self.family.unet.vector_dim or 0) - pooled.shape[1]) // SIZES
        numbers = torch.tensor(size.numbers(), dtype=torch.float32, device=pooled.device)
        sines = timestep_embedding(numbers, width, self.family.unet.freq_shift)
        return torch.cat([pooled.float(), sines.flatten().expand(len(pooled), -1)], dim=-1)
