"""Attention: softmax(q k^T / sqrt(D)) v per head."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Mix `v` by the similarity of `q` and `k`.

    q (B, N, heads, D), k and v (B, M, heads, D) -> (B, N, heads, D). Any strides: a head is a view into the
    projection's output, never a copy. `causal`: token n sees tokens up to n.
    Source: https://arxiv.org/abs/1706.03762, equation 1.
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal)
    return out.transpose(1, 2)
