"""Attention on the CPU in bfloat16, by products of some queries at a time: two thirds of the time of torch's attention.

Torch's runs its products in float32; these run at the processor's speed for bfloat16, and round the scores to it. What
softmax subtracts from them is therefore part of the product, by one more column of q and k: large scores are near zero
when they are rounded. The sum that softmax divides by is one more column of the other product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend
from sdinpaint_kernels.linear import linear

QUERIES = 256
"""Each thread has so many in hand at a time, so that their scores stay in its cache."""
LEAST_TOKENS = 2048
"""With fewer queries or keys torch's attention takes no longer."""
KEYS_LOOKED_AT = 16
"""One of so many, to find a number near the largest score of each query: any would do with which exp is finite."""
ALIGNED = 16
"""Columns of the second product are made a multiple of it."""


def is_supported(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether this call gains from it, and may."""
    few = min(q.shape[1], k.shape[1]) < LEAST_TOKENS
    return q.dtype == torch.bfloat16 and not (causal or few) and backend.on_cpu(q, k, v)


def by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """q (B, N, heads, D), k and v (B, M, heads, D) -> (B, N, heads, D); None where a sum overflowed."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for sample in range(q.shape[0]):
        for head in range(q.shape[2]):
            _one_head(*(x[sample, :, head] for x in (q, k, v, out)))
    return out if bool(out.isfinite().all()) else None


def _one_head(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """q (N, D), k and v (M, D) -> out (N, D)."""
    head_dim = q.shape[1]
    q = q * (math.log2(math.e) / math.sqrt(head_dim))
    some = k[::KEYS_LOOKED_AT].contiguous()
    keys = F.pad(k, (0, 1), value=1.0)
    values = F.pad(torch.cat([v.T, v.new_ones(1, len(v))]), (0, 0, 0, -(head_dim + 1) % ALIGNED))
    queries = QUERIES * torch.get_num_threads()
    for part, into in zip(q.split(queries), out.split(queries), strict=True):
        near_largest = linear(part, some).amax(dim=1, keepdim=True)
        weights = linear(torch.cat([part, -near_largest], dim=1), keys).exp2_()
        mixed = linear(weights, values)
        torch.div(mixed[:, :head_dim], mixed[:, head_dim : head_dim + 1], out=into)
