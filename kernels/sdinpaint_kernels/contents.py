"""Detects whether a tensor still holds the same numbers, by whatever means it may have been written to.

Torch counts writes through a tensor itself, but not those through `.data`, a numpy view or an inference tensor. So the
numbers are compared by a digest of all of them, which is computed at the speed of memory. Weights that are mapped from
a file need no reading, because the system copies a page of a private mapping when it is first written to.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import pages

__all__ = ["Contents", "contents", "place", "unchanged"]

Words = NDArray[np.uint64]

ROW = 1024
"""The number of 64-bit words that are summed to one; their factors stay in the first-level cache."""
BLOCK = 64 * ROW
"""The number of words that are processed at a time; they stay in the second-level cache."""
SMALL = 1 << 15
"""The size in bytes below which a hash is faster than sums."""
SEVERAL = 8 * BLOCK
"""The number of words from which on several threads share the work."""
GROUP, ROWS_AT_ONCE = 1 << 28, 1 << 13
"""The bytes and rows that are processed at a time on a GPU."""
LEVELS = 4
"""The number of levels of sums of sums, enough for ROW ** LEVELS words."""
UPPER = np.uint64(32)
# Odd factors preserve any change of a single word. The axes are (whole words, upper halves), level, and factor.
FACTORS: Words = np.random.default_rng(0).integers(0, 2**63, (2, LEVELS, ROW), np.uint64) * 2 + 1


class Contents(NamedTuple):
    """The place and the numbers of a dense tensor at one moment, without a copy of the numbers."""

    place: tuple[Any, ...]
    mapped: torch.UntypedStorage | None
    """The storage of a mapping that nothing was written to. Holding it keeps its addresses from being reused."""
    digest: tuple[Any, ...] | None
    """A digest of the numbers, for any other memory."""


def contents(tensors: Sequence[Tensor]) -> list[Contents]:
    """Record what each tensor holds now.

    Args:
        tensors: dense tensors on any device.

    Returns:
        One record per tensor.
    """
    maps = pages.private_maps() if any(x.is_cpu for x in tensors) else []
    mapped = [x.untyped_storage() if pages.lies_in(x, maps) and pages.is_unwritten(x) else None for x in tensors]
    digests = iter(_digests([x for x, storage in zip(tensors, mapped, strict=True) if storage is None]))
    return [
        Contents(place(x), storage, next(digests) if storage is None else None)
        for x, storage in zip(tensors, mapped, strict=True)
    ]


def unchanged(before: Sequence[Contents], tensors: Sequence[Tensor], *, read_devices: bool = True) -> list[bool]:
    """Tell for each tensor whether it is at the same place and holds the same numbers, bit for bit.

    Args:
        before: what `contents` recorded of each tensor.
        tensors: the tensors, in the same order.
        read_devices: also read tensors on a GPU, which waits for the GPU. Without it, they count as unchanged if torch
            counted no write to them.

    Returns:
        True for each tensor that did not change.
    """
    same = [one.place == place(x) for one, x in zip(before, tensors, strict=True)]
    read = [
        kept and one.mapped is None and (x.is_cpu or read_devices)
        for kept, one, x in zip(same, before, tensors, strict=True)
    ]
    digests = iter(_digests([x for x, is_read in zip(tensors, read, strict=True) if is_read]))
    return [
        kept and (next(digests) == one.digest if is_read else one.mapped is None or pages.is_unwritten(x))
        for kept, is_read, one, x in zip(same, read, before, tensors, strict=True)
    ]


def place(x: Tensor) -> tuple[Any, ...]:
    """Tell where and how a tensor lies in memory, and torch's count of writes to it where there is one.

    Args:
        x: the tensor.

    Returns:
        A key that is equal as long as none of these changes.
    """
    count = 0 if x.is_inference() else x._version
    return x.data_ptr(), x.device, x.dtype, x.shape, x.stride(), count


@torch.no_grad()
def _digests(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Return for each tensor a few numbers that depend on every bit of it and on its position.

    Each 64-bit word is multiplied by a factor, and all are summed modulo 2^64. The upper halves of the words are summed
    as well, because changes of the highest bits of two words would cancel. This guards against mistakes, not forgery.
    """
    on_device = iter(_device_digests([x for x in tensors if not x.is_cpu]))
    return [_digest(x) if x.is_cpu else next(on_device) for x in tensors]


def _digest(x: Tensor) -> tuple[Any, ...]:
    x = _dense(x)  # the name keeps a copy alive while its memory is read
    if x.nbytes < SMALL:
        return (hashlib.sha256(ctypes.string_at(x.data_ptr(), x.nbytes)).digest(),)
    values = np.ctypeslib.as_array((ctypes.c_uint8 * x.nbytes).from_address(x.data_ptr()))
    head = min(-x.data_ptr() % 8, len(values))
    end = len(values) - (len(values) - head) % 8
    words, ends = values[head:end].view(np.uint64), (values[:head].tobytes(), values[end:].tobytes())
    rows = _row_sums_by_threads(words) if len(words) >= SEVERAL else _row_sums(words)
    for level in range(1, LEVELS):
        rows = [_sums(row, FACTORS[half, level]) for half, row in enumerate(rows)]
    return (len(values), *ends, *(row.tobytes() for row in rows))


def _dense(x: Tensor) -> Tensor:
    """Return x itself if its numbers are contiguous in some order, and else a contiguous copy."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else x.detach().contiguous()


def _row_sums(words: Words) -> list[Words]:
    """Return the sum of every ROW words, and that of their upper halves."""
    sums: list[list[Words]] = [[words[:0]], [words[:0]]]
    upper = np.empty(min(BLOCK, len(words)), np.uint64)
    for start in range(0, len(words), BLOCK):
        block = words[start : start + BLOCK]
        sums[0].append(_sums(block, FACTORS[0, 0]))
        sums[1].append(_sums(np.right_shift(block, UPPER, out=upper[: len(block)]), FACTORS[1, 0]))
    return [np.concatenate(half) for half in sums]


def _sums(words: Words, factors: Words) -> Words:
    """Return the sum of every ROW words, and of the rest, each word times its factor."""
    cut = len(words) // ROW * ROW
    rows = np.einsum("ij,j->i", words[:cut].reshape(-1, ROW), factors)
    if cut < len(words):
        rows = np.append(rows, np.einsum("i,i->", words[cut:], factors[: len(words) - cut]))
    return rows


def _row_sums_by_threads(words: Words) -> list[Words]:
    """Compute `_row_sums` on threads that end with the call, so that a forked process misses none."""
    threads = min(torch.get_num_threads(), os.cpu_count() or 1)
    step = -(-len(words) // (threads * BLOCK)) * BLOCK
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(_row_sums, (words[start : start + step] for start in range(0, len(words), step))))
    return [np.concatenate(half) for half in zip(*parts, strict=True)]


def _device_digests(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Sum rows of 32-bit words times factors on the tensors' device, in groups, and wait for the device once."""
    flat = [_flat(x) for x in tensors]
    sums, counts = [], [-(-len(x) // (4 * ROW)) for x in flat]
    for group in _groups(flat):
        padded = torch.cat([F.pad(x, (0, -len(x) % (4 * ROW))) for x in group]).view(torch.int32).view(-1, ROW)
        factors = torch.from_numpy(FACTORS[0, 0].view(np.int64)).to(padded.device)
        sums += [(rows * factors).sum(1) for rows in padded.split(ROWS_AT_ONCE)]
    rows = torch.cat(sums).cpu() if sums else torch.empty(0, dtype=torch.int64, device="cpu")
    return [(len(x), part.numpy().tobytes()) for x, part in zip(flat, rows.split(counts), strict=True)]


def _flat(x: Tensor) -> Tensor:
    """Return the bytes of x in memory order, or those of a copy if it has gaps."""
    x = _dense(x.detach())
    return (x if x.is_contiguous() else x.permute(0, 2, 3, 1)).reshape(-1).view(torch.uint8)


def _groups(flat: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield groups of tensors of some megabytes on one device."""
    group: list[Tensor] = []
    for x in flat:
        if group and (group[0].device != x.device or sum(map(len, group)) + len(x) > GROUP):
            yield group
            group = []
        group.append(x)
    if group:
        yield group
