"""The text encoder of CLIP: token ids to one hidden state per token, and to a pooled embedding of the text.

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
from sdinpaint.models.layers import is_plain, plain
from sdinpaint.models.weights import verified


def quick_gelu(x: Tensor) -> Tensor:
    """Compute the sigmoid approximation of GELU that OpenAI's CLIP was trained with.

    Args:
        x: any shape.

    Returns:
        x * sigmoid(1.702 x), the shape of x.
    """
    return x * (1.702 * x).sigmoid_()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


Inserted = tuple[Tensor, Tensor]
"""The places (B, L), bool, at which vectors (number of places, D) stand in for the token's row."""


@plain
class Embeddings(nn.Module):
    """The sum of token and position embeddings."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)

    def forward(self, ids: Tensor, inserted: Inserted | None = None) -> Tensor:
        """Embed token ids (B, L), with other vectors in some places; return (B, L, D)."""
        tokens = self.token_embedding(ids)
        if inserted is not None:
            places, vectors = inserted
            tokens = tokens.clone()  # the layer may have been replaced by one that returns its table
            tokens[places] = vectors.to(tokens)
        return tokens + self.position_embedding(torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device))


@plain
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
        """Let each token of x (B, L, D) attend to itself and the tokens before it; return (B, L, D)."""
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (fused.product(layer, x).unflatten(-1, (self.heads, -1)) for layer in layers)
        return fused.product(self.out_proj, attention(q, k, v, causal=True).flatten(2))


@plain
class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to each token of x (B, L, D); return (B, L, D)."""
        return fused.product(self.fc2, self.activation(fused.product(self.fc1, x)))


@plain
class Layer(nn.Module):
    """A pre-norm transformer layer: attention and MLP, each with a residual connection."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.num_heads)
        self.layer_norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (B, L, D); return (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def end_positions(ids: Tensor) -> Tensor:
    """Find the end-of-text token, which has the highest id, so that padding does not matter.

    Args:
        ids: token ids (B, L).

    Returns:
        The position of the first end-of-text token of each text, (B,).
    """
    return ids.argmax(dim=-1)


@plain
class TextEncoder(nn.Module):
    """The stack of transformer layers."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))


@plain
class TextModel(nn.Module):
    """Embeddings, transformer layers and the final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = TextEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, config.norm_eps)


@plain
class CLIPText(nn.Module):
    """A text encoder. It returns the text embeddings for a UNet, and for SDXL's second one the pooled text as well."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(config.width, config.projection_dim, bias=False)

    def forward(self, ids: Tensor, *, pooled: bool = False, inserted: Inserted | None = None) -> Any:
        """Encode token ids to text embeddings.

        Args:
            ids: token ids (B, L), int64.
            pooled: return the pooled text as well.
            inserted: vectors in place of some tokens' rows: places (B, L), bool, and one vector for each (N, D).

        Returns:
            Text embeddings (B, L, D); with `pooled` the pair that `encode` returns.
        """
        encoded = self.encode(ids, inserted)
        return encoded if pooled else encoded[0]

    def encode(self, ids: Tensor, inserted: Inserted | None = None) -> tuple[Tensor, Tensor | None]:
        """Encode token ids to text embeddings and pooled text.

        Args:
            ids: token ids (B, L), int64.
            inserted: vectors in place of some tokens' rows, as in `forward`.

        Returns:
            Text embeddings (B, L, D), and the pooled text (B, P), which is None where the encoder has no projection.
        """
        # where layers are plain, no other code runs between them, which could write to weights unseen
        with verified(self.parameters() if is_plain(self) else ()):
            return self._encode(ids, inserted)

    def _encode(self, ids: Tensor, inserted: Inserted | None) -> tuple[Tensor, Tensor | None]:
        config, norm = self.config, self.text_model.final_layer_norm
        kept = config.num_layers - config.skip_last
        layers = self.text_model.encoder.layers
        x = self.text_model.embeddings(ids, inserted)
        for layer in layers[:kept]:
            x = layer(x)
        context = norm(x) if config.final_norm else x
        if config.projection_dim is None:
            return context, None
        for layer in layers[kept:]:
            x = layer(x)
        at_end = x[torch.arange(len(ids), dtype=torch.int64, device=ids.device), end_positions(ids)]
        return context, fused.product(self.text_projection, norm(at_end))
