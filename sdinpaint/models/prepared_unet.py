"""A UNet with precomputed conditioning: what depends on the text or the time alone is computed once for many steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdinpaint.families import UNetConfig
from sdinpaint.models import fused
from sdinpaint.models.layers import is_plain, needs_gradients, repeated
from sdinpaint.models.weights import Model, Places, Snapshot, verified

Context = Tensor | Sequence[tuple[Tensor, float]]
"""The input of cross-attention: text embeddings (B, L, D), or several such sources, each with its weight."""

Precomputed = dict[object, Any]
"""The precomputed conditioning by block: the projected time embedding, or for each source its keys and values, stacked
(2, B, L, C), and its weight."""


def sources_of(context: Context) -> list[tuple[Tensor, float]]:
    """List the sources that cross-attention attends to.

    Args:
        context: text embeddings (B, L, D), or sources.

    Returns:
        The sources, each with its weight; 1 for text alone.
    """
    return [(context, 1.0)] if isinstance(context, Tensor) else list(context)


def timestep_embedding(t: Tensor, dim: int, freq_shift: float = 0) -> Tensor:
    """Compute the sinusoidal embedding of timesteps.

    Args:
        t: timesteps (B,), may be fractional.
        dim: width of the embedding.
        freq_shift: taken from the number of frequencies, so that the last one is lower the larger it is.

    Returns:
        Cosines, then sines, of geometrically spaced frequencies, float32 (B, dim).
    """
    half = dim // 2
    slope = -math.log(10000.0) / (half - freq_shift)
    frequencies = torch.exp(slope * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Conditioned(Model):
    """The layers of a UNet that its conditioning goes through, and what `PreparedUNet` needs beside calling it."""

    config: UNetConfig
    time_embed: nn.Module
    label_emb: nn.Module
    """Embeds `vector`; it exists only if `config.vector_dim` is not None."""

    def embed(self, t: Tensor, vector: Tensor | None = None) -> Tensor:
        """Compute the time embedding.

        Args:
            t: timesteps (B,), may be fractional; (1,) serves every row of `vector`.
            vector: pooled text with size and crop conditioning (B, V), for SDXL.

        Returns:
            The time embedding (B, E).
        """
        sines = timestep_embedding(t, self.config.model_channels, self.config.freq_shift)
        sines = sines.to(next(self.parameters()).dtype)
        emb = fused.mlp(self.time_embed, sines)
        return emb if vector is None else repeated(emb, len(vector)) + fused.mlp(self.label_emb, vector)


@dataclass(frozen=True)
class PreparedUNet:
    """A UNet with precomputed conditioning, which serves all steps of a run.

    It is valid as long as `is_current()`: no layer was hooked or replaced, and the weights are the same.
    """

    unet: Conditioned
    blocks: Sequence[fused.ResBlock]
    texts: Sequence[fused.Attention]
    conditioning_cache: list[Tensor]
    """Keys and values (2, B, L, C) of each source, for each of `texts`."""
    weights: Sequence[float]
    """The weight of each source."""
    vector: Tensor | None
    places: Places
    used: Snapshot
    """The state of the weights that something was precomputed from."""

    @staticmethod
    def precomputed_from(
        unet: Conditioned, blocks: Sequence[fused.ResBlock], texts: Sequence[fused.Attention]
    ) -> list[Tensor]:
        """List the weights that keys, values and time embeddings are computed from.

        Args:
            unet: the UNet.
            blocks: its residual blocks.
            texts: its cross-attentions.

        Returns:
            The weights, in a fixed order.
        """
        embedding = [unet.time_embed, *([unet.label_emb] if unet.config.vector_dim is not None else [])]
        layers = [
            *embedding,
            *(one for text in texts for one in (text.to_k, text.to_v)),
            *(b.emb_layers for b in blocks),
        ]
        weights = [weight for layer in layers for weight in layer.parameters()]
        return weights + [fused.bias_of(block.in_layers[-1]) for block in blocks]

    @property
    def key(self) -> str:
        """The addresses at which a captured CUDA graph reads weights, and the weights of sources, as a string."""
        return f"{self.places.key} {self.weights}"

    def is_current(self) -> bool:
        """Tell whether preparing again would give the same; on a GPU only writes that torch counts are noticed."""
        return (
            is_plain(self.unet)
            and all(block.is_fusible() for block in self.blocks)
            and not needs_gradients(self.unet)
            and self.places.hold(self.unet)
            and self.used.holds(self.precomputed_from(self.unet, self.blocks, self.texts), read_devices=False)
        )

    def embed(self, t: Tensor) -> Tensor:
        """Project the time embeddings of all steps for all residual blocks.

        Args:
            t: timesteps (S,).

        Returns:
            The vectors that the blocks add at each timestep, concatenated, (S, B, sum of C); B is 1 without `vector`.
        """
        label = 0 if self.vector is None else fused.mlp(self.unet.label_emb, self.vector)
        emb = self.unet.embed(t)[:, None] + label
        return torch.cat([fused.addend(block, emb) for block in self.blocks], dim=-1)

    def __call__(
        self, x: Tensor, emb: Tensor, conditioning_cache: Sequence[Tensor], control: Sequence[Tensor] | None
    ) -> Tensor:
        """Predict the noise (or v) from precomputed conditioning.

        Args:
            x: noisy latents (B, in_channels, H, W); the batch may be half of that of the conditioning.
            emb: one timestep's row of `embed`.
            conditioning_cache: keys and values, as in the attribute of this name.
            control: residuals of a ControlNet, or None.

        Returns:
            The raw network output (B, 4, H, W).
        """
        addends = emb.split([block.out_layers[-1].out_channels for block in self.blocks], dim=-1)
        projected: Precomputed = dict(zip(self.blocks, addends, strict=True))
        count = len(self.weights)
        starts = range(0, len(conditioning_cache), count)
        by_text = [conditioning_cache[start : start + count] for start in starts]
        sources = [list(zip(one, self.weights, strict=True)) for one in by_text]
        with verified(self.unet.parameters()):
            return self.unet(x, projected, dict(zip(self.texts, sources, strict=True)), None, control)
