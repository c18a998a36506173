"""The Triton kernel behind `attention`. A block of queries loops over the keys with a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(
    base, rows, limit,
    STRIDE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Load WIDTH columns of `rows` from START: zero past column D and, unless FULL, past row `limit`."""
    columns = START + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * STRIDE + columns[None, :]
    if not FULL:
        tile = tl.load(pointers, mask=(rows[:, None] < limit) & (columns[None, :] < D), other=0.0)
    elif START + WIDTH > D:
        tile = tl.load(pointers, mask=columns[None, :] < D, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _load_pair(
    base, rows, limit,
    STRIDE: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Load a head's columns as HEAD and TAIL columns; without a TAIL the second is the first again, and unused."""
    head = _load(base, rows, limit, STRIDE, 0, HEAD, D, FULL, UPCAST)
    tail = _load(base, rows, limit, STRIDE, HEAD, TAIL, D, FULL, UPCAST) if TAIL else head
    return head, tail


@triton.jit
def _store(
    base, rows, limit, tile, STRIDE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Write (rows, WIDTH) to the columns from START, up to row `limit` and column D."""
    columns = START + tl.arange(0, WIDTH)
    inside = (rows[:, None] < limit) & (columns[None, :] < D)
    tl.store(base + rows[:, None] * STRIDE + columns[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    q0, q1, k0, k1, v0, v1, peak, total, out0, out1, columns, limit,
    SCALE: tl.constexpr, QK_TAIL: tl.constexpr, PV_TAIL: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Update the running softmax with one tile of keys and values; unless FULL, without those from column `limit` on.

    `peak` is the largest score so far, and `total` the sum of exp2 of the scores relative to it. SCALE is
    log2(e) / sqrt(D): exp2 is the hardware's instruction, and subtracting the peak is one multiply-add with it.
    """
    scores = tl.dot(q0, tl.trans(k0))
    if QK_TAIL:
        scores = tl.dot(q1, tl.trans(k1), scores)
    if not FULL:
        scores = tl.where(columns[None, :] < limit, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    shrink = tl.exp2((peak - higher) * SCALE)
    weights = tl.exp2(scores * SCALE - (higher * SCALE)[:, None])
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v0.dtype)
    out0 = tl.dot(weights, v0, out0 * shrink[:, None])
    if PV_TAIL:
        out1 = tl.dot(weights, v1, out1 * shrink[:, None])
    return higher, total, out0, out1


@triton.jit(do_not_specialize=["q_batch", "k_batch", "v_batch", "out_batch", "queries", "keys"])
def attention_kernel(
    q, k, v, out, q_batch, k_batch, v_batch, out_batch, queries, keys,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, OUT_TOKEN: tl.constexpr, OUT_HEAD: tl.constexpr,
    D: tl.constexpr, SCALE: tl.constexpr,
    QK: tl.constexpr, QK_TAIL: tl.constexpr, PV: tl.constexpr, PV_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr, WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute attention of BLOCK_M queries of one head of one batch item to all its keys.

    q is (B, N, heads, D), k and v are (B, M, heads, D), and out is like q. The grid is (blocks of queries, heads, B).
    Batch strides come in units of 8 elements; together with the compile-time strides they tell the compiler that every
    row is aligned to 16 bytes. The keys are read in tiles of BLOCK_N, and at the end one of BLOCK_TAIL, masked. With
    WHOLE, M <= BLOCK_N + BLOCK_TAIL, and everything is loaded before the first product. UPCAST multiplies in float32,
    for the interpreter, whose bfloat16 products are wrong.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64) * 8
    q += batch * q_batch + head * Q_HEAD
    k += batch * k_batch + head * K_HEAD
    v += batch * v_batch + head * V_HEAD
    out += batch * out_batch + head * OUT_HEAD

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q0, q1 = _load_pair(q, rows, queries, Q_TOKEN, QK, QK_TAIL, D, False, UPCAST)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out0 = tl.zeros((BLOCK_M, PV), tl.float32)
    out1 = tl.zeros((BLOCK_M, PV_TAIL if PV_TAIL else PV), tl.float32)

    columns = tl.arange(0, BLOCK_N)
    if WHOLE:
        k0, k1 = _load_pair(k, columns, keys, K_TOKEN, QK, QK_TAIL, D, False, UPCAST)
        v0, v1 = _load_pair(v, columns, keys, V_TOKEN, PV, PV_TAIL, D, False, UPCAST)
        if BLOCK_TAIL:
            last = BLOCK_N + tl.arange(0, BLOCK_TAIL)
            l0, l1 = _load_pair(k, last, keys, K_TOKEN, QK, QK_TAIL, D, False, UPCAST)
            w0, w1 = _load_pair(v, last, keys, V_TOKEN, PV, PV_TAIL, D, False, UPCAST)
        peak, total, out0, out1 = _attend(
            q0, q1, k0, k1, v0, v1, peak, total, out0, out1, columns, keys, SCALE, QK_TAIL, PV_TAIL, False
        )
        if BLOCK_TAIL:
            peak, total, out0, out1 = _attend(
                q0, q1, l0, l1, w0, w1, peak, total, out0, out1, last, keys, SCALE, QK_TAIL, PV_TAIL, False
            )
    else:
        full = keys // BLOCK_N * BLOCK_N
        for start in range(0, full, BLOCK_N):
            k0, k1 = _load_pair(k, start + columns, keys, K_TOKEN, QK, QK_TAIL, D, True, UPCAST)
            v0, v1 = _load_pair(v, start + columns, keys, V_TOKEN, PV, PV_TAIL, D, True, UPCAST)
            peak, total, out0, out1 = _attend(
                q0, q1, k0, k1, v0, v1, peak, total, out0, out1, columns, keys, SCALE, QK_TAIL, PV_TAIL, True
            )
        if BLOCK_TAIL:
            columns = full + tl.arange(0, BLOCK_TAIL)
            k0, k1 = _load_pair(k, columns, keys, K_TOKEN, QK, QK_TAIL, D, False, UPCAST)
            v0, v1 = _load_pair(v, columns, keys, V_TOKEN, PV, PV_TAIL, D, False, UPCAST)
            peak, total, out0, out1 = _attend(
                q0, q1, k0, k1, v0, v1, peak, total, out0, out1, columns, keys, SCALE, QK_TAIL, PV_TAIL, False
            )

    share = (1.0 / total)[:, None]
    _store(out, rows, queries, out0 * share, OUT_TOKEN, 0, PV, D)
    if PV_TAIL:
        _store(out, rows, queries, out1 * share, OUT_TOKEN, PV, PV_TAIL, D)
