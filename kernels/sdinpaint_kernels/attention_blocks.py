"""Attention on the CPU in bfloat16, by products of blocks of queries: two thirds of the time of torch's attention.

Torch's attention multiplies in float32. These products run at the processor's speed for bfloat16, and round the scores
to it. The number that softmax subtracts from the scores is therefore part of the product, as one more column of q and
k: large scores are near zero when they are rounded. The sum that softmax divides by is one more column of the other
product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels.linear import product

SCORES, LEAST, MOST = 2**20, 64, 256
"""The scores of the queries that a thread processes at a time, so that they stay in its cache; and bounds of those
queries: with fewer, the products would wait for the keys, and with more, nothing is gained."""
KEY_STRIDE = 16
"""The step between the keys that are searched for a number near each query's largest score; it keeps exp finite."""
ALIGNED = 16
"""The number of columns of the second product is padded to a multiple of this."""


def takes(q: Tensor, *_: object) -> bool:
    """Tell whether attention may be computed by blocks.

    Args:
        q: queries (B, N, heads, D).

    Returns:
        True in bfloat16.
    """
    return q.dtype == torch.bfloat16


def by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Compute attention by blocks of queries.

    Args:
        q: queries (B, N, heads, D), bfloat16.
        k: keys (B, M, heads, D).
        v: values (B, M, heads, D).

    Returns:
        The mixed values (B, N, heads, D); None where a sum overflowed.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for sample in range(q.shape[0]):
        for head in range(q.shape[2]):
            _one_head(*(x[sample, :, head] for x in (q, k, v, out)))
    return out if bool(out.isfinite().all()) else None


def _one_head(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Compute one head from q (N, D), k and v (M, D), and write it to out (N, D)."""
    head_dim = q.shape[1]
    q = q * (math.log2(math.e) / math.sqrt(head_dim))
    some = k[::KEY_STRIDE].contiguous()
    keys = F.pad(k, (0, 1), value=1.0)
    values = F.pad(torch.cat([v.T, v.new_ones(1, len(v))]), (0, 0, 0, -(head_dim + 1) % ALIGNED))
    queries = max(LEAST, min(SCORES // len(k), MOST)) * torch.get_num_threads()
    for part, into in zip(q.split(queries), out.split(queries), strict=True):
        near_largest = product(part, some).amax(dim=1, keepdim=True)
        weights = product(torch.cat([part, -near_largest], dim=1), keys).exp2_()
        mixed = product(weights, values)
        torch.div(mixed[:, :head_dim], mixed[:, head_dim : head_dim + 1], out=into)
