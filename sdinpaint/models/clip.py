"""The text half of CLIP: token ids to one state per token, and to one for the whole text.

Source: https://github.com/openai/CLIP/blob/main/clip/model.py and mlfoundations/open_clip; names as in transformers'
CLIPTextModelWithProjection, which the released SD1 files hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sdinpaint_kernels import attention
from torch import Tensor, nn
from torch.nn import functional as F

from sdinpaint.families import TextConfig
from sdinpaint.models import fused


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    """Token plus position."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, D)."""
        return self.token_embedding(ids) + self.position_embedding(
            torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)
        )


class SelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, causal=True).flatten(2))


class MLP(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, each on normalised input and added back."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.num_heads)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def end_positions(ids: Tensor) -> Tensor:
    """ids (B, L) -> where the text ends (B,): at the first of the highest id, whatever the padding is."""
    return ids.argmax(dim=-1)


class TextEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))


class TextModel(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = TextEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)


class CLIPText(nn.Module):
    """A text encoder: the states that condition a UNet, and for XL's second one the pooled text."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(config.width, config.projection_dim, bias=False)

    def forward(self, ids: Tensor, *, pooled: bool = False) -> Any:
        """ids (B, L) int64 -> context (B, L, D), or with `pooled` what `encode` returns."""
        return self.encode(ids) if pooled else self.encode(ids)[0]

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """ids (B, L) int64 -> context (B, L, D) and the pooled text (B, P), None where there is no projection."""
        config, norm = self.config, self.text_model.final_layer_norm
        kept = config.num_layers - config.skip_last
        layers = self.text_model.encoder.layers
        x = self.text_model.embeddings(ids)
        for layer in layers[:kept]:
            x = layer(x)
        context = norm(x) if config.final_norm else x
        if config.projection_dim is None:
            return context, None
        for layer in layers[kept:]:
            x = layer(x)
        at_end = x[torch.arange(len(ids), dtype=torch.int64, device=ids.device), end_positions(ids)]
        return context, fused.product(self.text_projection, norm(at_end))
