"""Attention: softmax(q k^T / sqrt(D)) v per head.

The Triton kernel computes what torch's fused attention does, with two differences that suit a diffusion UNet. Head
dimensions of 40, 80 and 160 are not padded to a power of two but split in two (32 + 16, 64 + 16, 128 + 32). Short
contexts are split as well (77 tokens: 64 + 16), and then loaded at once instead of in a loop.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend
from sdinpaint_kernels.attention_blocks import by_blocks, takes
from sdinpaint_kernels.forms import PLAIN, Form, compute

DTYPES = (torch.float16, torch.bfloat16)
ALIGNED = 8  # elements in the 16 bytes of the largest load
MAX_HEAD_DIM = 160
MAX_GRID = 2**16
WIDE_HEAD_DIM = 256
"""The largest head dimension at which torch's fused attention is fast; above it, products of whole rows are faster."""
ROWS_BYTES = 2**28
"""The maximum size of the scores of the rows that are processed at a time, in bytes."""


class Config(NamedTuple):
    """The sizes of the kernel, BLOCK_M queries per program and BLOCK_N keys per tile, and two compiler settings."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    pad_pv: bool = False
    """Pad the head dimension to a power of two in the second product, instead of splitting it."""


class Row(NamedTuple):
    """The `config` for head dimensions up to `head_dim` and at least `queries` tokens."""

    head_dim: int
    queries: int
    config: Config


# Beside each row: numbers of queries and their time in microseconds on an H100 in float16, for two samples with the
# heads of SD 1.5, SD 2 or SDXL; in brackets the best time of any configuration. All fit in 99 KB of shared memory.
CONFIGS = (
    Row(48, 0, Config(128, 64, 4, 3, pad_pv=True)),  # 4096: 167, 9216: 873 (830)
    Row(64, 2048, Config(64, 64, 4, 3)),  # 4096: 110 with 5 heads, 202 with 10
    Row(64, 0, Config(64, 128, 4, 2)),  # 1024: 17.6 with 10 heads, 30.2 with 20; 256: 5.5
    Row(96, 0, Config(64, 64, 4, 3)),  # 2304: 93.7, 1024: 19.1 (18.8)
    Row(160, 256, Config(64, 64, 4, 2)),  # 576: 17.3, 256: 7.3 (6.7)
    Row(160, 0, Config(64, 32, 4, 3)),  # 144: 7.3 (5.9)
)
"""The configurations for contexts too long to be loaded at once. The first row that fits is used."""

WHOLE_CONFIGS = (
    Row(48, 1024, Config(256, 0, 8, 1, pad_pv=True)),  # 4096: 8.4, 9216: 17.0 (16.2)
    Row(96, 0, Config(64, 0, 4, 1)),  # 64: 4096: 6.2 with 5 heads, 10.0 with 10; 1024: 6.1 with 20; 80: 1024: 4.8
    Row(160, 512, Config(128, 0, 8, 1)),  # 576: 6.1
    Row(160, 0, Config(64, 0, 4, 1)),  # 256: 4.6, 144: 4.5, 64: 4.5 (4.0)
)
"""The configurations for contexts of up to WHOLE_CONTEXT tokens, in one tile. The first row that fits is used."""
WHOLE_CONTEXT = 96


class FasterInTorch(NamedTuple):
    """A self-attention that takes torch `torch_us` and the kernel `kernel_us` microseconds, with two samples."""

    head_dim: int
    queries: int
    heads: int
    torch_us: float
    kernel_us: float


FASTER_IN_TORCH = (
    FasterInTorch(40, 4096, 16, 156, 167),
    FasterInTorch(64, 4096, 20, 180, 202),
    FasterInTorch(80, 1024, 16, 17.9, 19.1),
)
"""The cases in which torch, with cuDNN, is faster on an H100; it runs for these and for more tokens or heads."""
MEASURED_CAPABILITY, MEASURED_CUDNN = (9, 0), 91900
"""The compute capability (Hopper) and oldest cuDNN for which FASTER_IN_TORCH holds. Elsewhere the kernel runs."""


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, kernels: str | None = None) -> Tensor:
    """Compute scaled dot-product attention.

    Strides are arbitrary, so that a head may be a view into the output of a projection.

    Args:
        q: queries (B, N, heads, D).
        k: keys (B, M, heads, D).
        v: values (B, M, heads, D).
        causal: let token n attend only to tokens up to n.
        kernels: "torch", "triton" or "auto", see `backend`; None for the setting of the process.

    Returns:
        The mixed values (B, N, heads, D).

    Raises:
        ValueError: shapes, dtypes or devices do not match.

    Source: https://arxiv.org/abs/1706.03762, equation 1; one pass: https://arxiv.org/abs/2205.14135, algorithm 1.
    """
    _check(q, k, v)
    if q.numel() == 0:
        return q.new_empty(q.shape)
    obstacle = _obstacle(q, k, v, causal)
    if obstacle is None and (kernels or backend.SETTING) == "auto":
        obstacle = _why_torch(q, k)
    if backend.is_observed() or backend.is_functional():
        return _by_products(q, k, v, causal)
    choice = backend.choose("attention", q, k, v, requested=kernels, obstacle=obstacle)
    if choice.name == "triton":
        return _operation(q, k, v)
    if q.is_cuda and q.shape[2] == 1 and q.shape[3] > WIDE_HEAD_DIM and not causal and not _differentiable(q, k, v):
        return _by_rows(q, k, v)
    if kernels == "torch" or causal or not backend.on_cpu(q, k, v):
        return _reference(q, k, v, causal)
    return compute("attention", FORMS, sizes(q, k), q, k, v)


def sizes(q: Tensor, k: Tensor, *_: object) -> tuple[int, int, int]:
    """Tell calls on the CPU apart.

    Args:
        q: queries (B, N, heads, D).
        k: keys (B, M, heads, D).

    Returns:
        The numbers of queries, keys, and channels of a head.
    """
    return q.shape[1], k.shape[1], q.shape[3]


def _by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = by_blocks(q, k, v)
    return _reference(q, k, v) if out is None else out


def _reference(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal)
    return out.transpose(1, 2)


FORMS = {"blocks": Form(_by_blocks, takes), PLAIN: Form(_reference)}
"""The forms of `attention` on the CPU."""


def _by_products(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute the equation as written: torch's FLOP counter and forward mode do not support fused attention on CPUs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[3])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2)


def _differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices, with results in float32 if they are in half precision."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype in DTYPES else torch.bmm(a, b)


def _by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute one head by plain products of some rows of `q` at a time, with the scores in float32 or better."""
    rows = max(1, ROWS_BYTES // (q.shape[0] * k.shape[1] * max(4, q.element_size())))
    keys, values = k.squeeze(2).transpose(1, 2), v.squeeze(2)
    scale = 1 / math.sqrt(q.shape[3])
    parts = []
    for part in q.squeeze(2).split(rows, dim=1):
        scores = _wide_product(part, keys).mul_(scale)
        parts.append(torch.softmax(scores, dim=-1).to(v.dtype) @ values)
    return torch.cat(parts, dim=1).unsqueeze(2)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises: ValueError where the three do not fit together."""
    fit = (
        q.dim() == k.dim() == v.dim() == 4
        and k.shape == v.shape
        and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
    )
    if not fit:
        found = "; ".join(
            f"{name} has shape {tuple(x.shape)} and strides {x.stride()}, {x.dtype} on {x.device}"
            for name, x in (("q", q), ("k", k), ("v", v))
        )
        raise ValueError(
            "attention expects q (B, N, heads, D) and k, v (B, M, heads, D) of one dtype on one device; " + found
        )


def _obstacle(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str | None:
    """Return the reason why the kernel cannot take this call."""
    batch, _, heads, head_dim = q.shape
    if causal:
        return "it is causal"
    if q.dtype not in DTYPES and not (backend.INTERPRETED and q.dtype == torch.float32):
        return f"the dtype is {q.dtype}"
    if head_dim % ALIGNED or head_dim > MAX_HEAD_DIM:
        return f"a head dimension of {head_dim} is no multiple of {ALIGNED} up to {MAX_HEAD_DIM}"
    if k.shape[1] == 0:
        return "there are no keys"
    if batch >= MAX_GRID or heads >= MAX_GRID:
        return f"{batch} samples of {heads} heads exceed the grid"
    return next(filter(None, map(_layout_obstacle, (q, k, v))), None)


def _layout_obstacle(x: Tensor) -> str | None:
    """Return the reason why the kernel cannot read x, in loads of 16 bytes with 32-bit offsets within a sample."""
    strides = x.stride()
    if strides[3] != 1 or any(stride % ALIGNED for stride in strides[:3]):
        return f"rows of strides {strides} do not start on 16 bytes"
    if x.shape[1] * strides[1] + x.shape[2] * strides[2] >= 2**31:
        return f"the offsets of shape {tuple(x.shape)}, strides {strides} exceed 32 bits"
    return None


def _why_torch(q: Tensor, k: Tensor) -> str | None:
    """Return the reason why torch should be faster at a call that the kernel can take."""
    if torch.compiler.is_compiling() or not q.is_cuda or not _is_measured(q.device):
        return None
    batch, queries, heads, head_dim = q.shape
    for row in FASTER_IN_TORCH:
        if head_dim == row.head_dim and min(queries, k.shape[1]) >= row.queries and batch * heads >= row.heads:
            return (
                f"torch is faster at {row.queries} tokens and {row.heads} heads of {row.head_dim}: "
                f"{row.torch_us} us, the kernel {row.kernel_us} us"
            )
    return None


@functools.cache
def _is_measured(device: torch.device) -> bool:
    """Tell whether FASTER_IN_TORCH holds for this GPU and the installed torch."""
    capability, cudnn = torch.cuda.get_device_capability(device), torch.backends.cudnn.version() or 0
    return capability == MEASURED_CAPABILITY and cudnn >= MEASURED_CUDNN and torch.backends.cuda.cudnn_sdp_enabled()


def _config(head_dim: int, queries: int, keys: int) -> Config:
    """Return the row of the tables for these sizes."""
    table = WHOLE_CONFIGS if keys <= WHOLE_CONTEXT else CONFIGS
    return next(row.config for row in table if head_dim <= row.head_dim and queries >= row.queries)


def _power_of_two(width: int) -> int:
    """Return the smallest power of two that covers `width` and fills a tensor core."""
    return max(16, 1 << (width - 1).bit_length())


def _split(width: int) -> tuple[int, int]:
    """Return two powers of two, the second perhaps 0, that cover `width` with the least padding."""
    whole = _power_of_two(width)
    head = whole // 2
    if width <= head:
        return whole, 0
    tail = _power_of_two(width - head)
    return (head, tail) if tail < head else (whole, 0)


@functools.lru_cache(maxsize=1024)
def _constants(head_dim: int, queries: int, keys: int, config: Config | None = None) -> dict[str, Any]:
    """Return the compile-time constants of the kernel, except strides."""
    config = config or _config(head_dim, queries, keys)
    whole = config.block_n == 0
    qk = _split(head_dim)
    pv = (_power_of_two(head_dim), 0) if config.pad_pv else qk
    block_n, block_tail = _split(keys) if whole else (config.block_n, 0)
    if not whole and keys % block_n:
        block_tail = _power_of_two(keys % block_n)
    return {
        "D": head_dim,
        "SCALE": math.log2(math.e) / math.sqrt(head_dim),
        "QK": qk[0],
        "QK_TAIL": qk[1],
        "PV": pv[0],
        "PV_TAIL": pv[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": block_n,
        "BLOCK_TAIL": block_tail,
        "WHOLE": whole,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def launch(q: Tensor, k: Tensor, v: Tensor, config: Config | None = None) -> Tensor:
    """Run the kernel.

    Args:
        q: queries (B, N, heads, D).
        k: keys (B, M, heads, D).
        v: values (B, M, heads, D).
        config: None for the measured one.

    Returns:
        The mixed values (B, N, heads, D), contiguous.
    """
    if any(x.data_ptr() % 16 for x in (q, k, v)):
        return _contiguous_reference(q, k, v)
    from sdinpaint_kernels.attention_kernel import attention_kernel  # noqa: PLC0415 - triton only where it runs

    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    out = _empty(q, k, v)
    constants = _constants(head_dim, queries, keys, config)
    attention_kernel[(-(-queries // constants["BLOCK_M"]), heads, batch)](
        q, k, v, out,
        *(x.stride(0) // ALIGNED for x in (q, k, v, out)),
        queries, keys,
        *(x.stride(axis) for x in (q, k, v, out) for axis in (1, 2)),
        **constants,
        UPCAST=backend.INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


def _contiguous_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _reference(q, k, v).contiguous()


def _empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


_operation = backend.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor", launch, _contiguous_reference, _empty)
