"""Text conditioning: the hidden states of one text encoder, or of two for SDXL, with SDXL's size conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdinpaint.checks import check_prompt, check_whole
from sdinpaint.errors import SettingError, said, warn
from sdinpaint.families import Family
from sdinpaint.models.prepared_unet import timestep_embedding
from sdinpaint.sampling import Conditioning
from sdinpaint.text.embeddings import Embedding, pieces_of
from sdinpaint.text.tokenizer import ROOM, Tokenizer, cut_off

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


class Spoken(NamedTuple):
    """A place of a prompt."""

    id: int
    offset: int
    """The character at which it begins."""
    vector: Tensor | None
    """The vector (D,) of an embedding."""
    first: int
    """How far it is, counted backwards, to the first place of its embedding: 0, -1, ..."""


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
        self.embeddings: dict[str, Embedding] = {}
        """Token in lower case -> embedding."""

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
        encoded = [self._encoded(index, texts, device) for index in range(len(self.encoders))]
        zeros = self.family.zeros_for_none
        said = torch.tensor([not zeros or prompt is not None for prompt in prompts], dtype=torch.bool, device=device)
        context = torch.cat([states for states, _ in encoded], dim=-1).where(said[:, None, None], 0)
        pooled = encoded[-1][1]
        if pooled is None:
            return Conditioning(context)
        return Conditioning(context, self._vector(pooled.where(said[:, None], 0), size))

    def doubt(self, prompt: str) -> str | None:
        """Say what of a prompt the model does not see.

        Args:
            prompt: the prompt.

        Returns:
            The end of a sentence that begins with the name of the prompt; None where the prompt fits.

        Raises:
            SettingError: the prompt is not valid text.
        """
        return _cut(prompt, self._places(prompt, 0))

    def _encoded(self, index: int, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
        encoder, tokenizer = self.encoders[index], self.tokenizers[index]
        if not self.embeddings:
            return encoder(tokenizer(texts).to(device), pooled=True)
        rows = []
        for text in texts:
            places = self._places(text, index)
            rows.append(_fitting(places))
            if doubt := _cut(text, places):
                warn(f"prompt {doubt}")
        framed = [tokenizer.framed([place.id for place in row]) for row in rows]
        ids = torch.tensor(framed, dtype=torch.int64, device="cpu")
        vectors = [place.vector for row in rows for place in row if place.vector is not None]
        if not vectors:
            return encoder(ids.to(device), pooled=True)
        learned = torch.zeros(ids.shape, dtype=torch.bool, device="cpu")
        for item, row in enumerate(rows):
            learned[item, 1 : 1 + len(row)] = torch.tensor([place.vector is not None for place in row], device="cpu")
        return encoder(ids.to(device), pooled=True, inserted=(learned.to(device), torch.stack(vectors).to(device)))

    def _places(self, prompt: str, index: int) -> list[Spoken]:
        """Return the places of a prompt for one encoder: tokens of the vocabulary, and vectors of embeddings."""
        check_prompt("prompt", prompt)
        tokenizer, found = self.tokenizers[index], []
        for start, piece in pieces_of(prompt, self.embeddings.values()):
            if isinstance(piece, Embedding):
                vectors = piece.by_encoder[index]
                found += [Spoken(tokenizer.start_id, start, vector, -at) for at, vector in enumerate(vectors)]
            else:
                found += [Spoken(place.id, start + place.offset, None, 0) for place in tokenizer.places(piece)]
        return found

    def _vector(self, pooled: Tensor, size: PictureSize) -> Tensor:
        """Join pooled (B, P) and the embedded sizes: (B, V) float32."""
        width = ((self.family.unet.vector_dim or 0) - pooled.shape[1]) // SIZES
        numbers = torch.tensor(size.numbers(), dtype=torch.float32, device=pooled.device)
        sines = timestep_embedding(numbers, width, self.family.unet.freq_shift)
        return torch.cat([pooled.float(), sines.flatten().expand(len(pooled), -1)], dim=-1)


def _cut(prompt: str, places: Sequence[Spoken]) -> str | None:
    """Say what of a prompt does not fit into a context."""
    return cut_off(prompt, [place.offset for place in places], len(_fitting(places)))


def _fitting(places: Sequence[Spoken]) -> Sequence[Spoken]:
    """Return the places that fit into a context; an embedding fits as a whole, or not at all."""
    if len(places) <= ROOM:
        return places
    return places[: ROOM + places[ROOM].first]
