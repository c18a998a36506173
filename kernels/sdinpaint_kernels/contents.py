"""Tells whether a tensor still holds the numbers that it held before, whichever way it was written to.

Torch counts what is written through a tensor itself, but not through `.data`, a numpy view or an inference tensor. So
the numbers are compared, by a digest of all of them that is taken at the speed of memory. Weights that are mapped from
a file need no reading: the system moves a page of a private map to other memory when it is first written to.
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

__all__ = ["Contents", "contents", "unchanged"]

Words = NDArray[np.uint64]

ROW = 1024
"""Words of 64 bits that are summed up to one; their factors stay in the fastest cache."""
BLOCK = 64 * ROW
"""Words in hand at a time, which stay in the second cache."""
SMALL = 1 << 15
"""Bytes below which a hash of them takes less time than sums do."""
SEVERAL = 8 * BLOCK
"""Words from which on several threads share them."""
GROUP, ROWS_AT_ONCE = 1 << 28, 1 << 13
"""Bytes and rows in hand at a time on a GPU."""
LEVELS = 4
"""Levels of sums of sums: enough for ROW ** LEVELS words."""
UPPER = np.uint64(32)
# Odd factors lose no change of a single word. Two rows, for whole words and for their upper halves, and one a level.
FACTORS: Words = np.random.default_rng(0).integers(0, 2**63, (2, LEVELS, ROW), np.uint64) * 2 + 1


class Contents(NamedTuple):
    """The place and the numbers of a dense tensor at one moment, without a copy of the numbers."""

    place: tuple[Any, ...]
    mapped: torch.UntypedStorage | None
    """The storage of a map that nothing was written to. While it is held, no other memory comes to its addresses."""
    digest: tuple[Any, ...] | None
    """A digest of the numbers in any other memory."""


def contents(tensors: Sequence[Tensor]) -> list[Contents]:
    """Take down what each tensor holds now."""
    maps = pages.private_maps() if any(x.is_cpu for x in tensors) else []
    mapped = [x.untyped_storage() if pages.lies_in(x, maps) and pages.is_unwritten(x) else None for x in tensors]
    digests = iter(_digests([x for x, storage in zip(tensors, mapped, strict=True) if storage is None]))
    return [
        Contents(_place(x), storage, next(digests) if storage is None else None)
        for x, storage in zip(tensors, mapped, strict=True)
    ]


def unchanged(before: Sequence[Contents], tensors: Sequence[Tensor], *, read_devices: bool = True) -> list[bool]:
    """Tell of each tensor whether it lies where it lay and holds the same numbers, bit for bit.

    Reading numbers on a GPU means to wait for it. Without `read_devices`, those that torch saw nobody write to count as
    the same there.
    """
    same = [one.place == _place(x) for one, x in zip(before, tensors, strict=True)]
    read = [
        kept and one.mapped is None and (x.is_cpu or read_devices)
        for kept, one, x in zip(same, before, tensors, strict=True)
    ]
    digests = iter(_digests([x for x, is_read in zip(tensors, read, strict=True) if is_read]))
    return [
        kept and (next(digests) == one.digest if is_read else one.mapped is None or pages.is_unwritten(x))
        for kept, is_read, one, x in zip(same, read, before, tensors, strict=True)
    ]


def _place(x: Tensor) -> tuple[Any, ...]:
    """Return where and how a tensor lies in memory, and how often torch saw it written to where it counts that."""
    count = 0 if x.is_inference() else x._version
    return x.data_ptr(), x.device, x.dtype, x.shape, x.stride(), count


@torch.no_grad()
def _digests(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Return for each tensor a few numbers that depend on every bit of it and on its position.

    Each word of 64 bits is multiplied by a factor and all are summed up modulo 2^64; so are the upper halves of the
    words, because the highest bits of two words would cancel. It guards against mistakes, not against forgery.
    """
    on_device = iter(_device_digests([x for x in tensors if not x.is_cpu]))
    return [_digest(x) if x.is_cpu else next(on_device) for x in tensors]


def _digest(x: Tensor) -> tuple[Any, ...]:
    x = _dense(x)  # in a name of its own, for as long as its memory is read
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
    """Return x itself if its numbers lie in one piece, in whichever order, and else a copy of which that is true."""
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
    """Return `_row_sums`, shared out between threads that end with it, so that a forked process misses none."""
    threads = min(torch.get_num_threads(), os.cpu_count() or 1)
    step = -(-len(words) // (threads * BLOCK)) * BLOCK
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(_row_sums, (words[start : start + step] for start in range(0, len(words), step))))
    return [np.concatenate(half) for half in zip(*parts, strict=True)]


def _device_digests(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Sum up rows of 32 bits times factors where the tensors lie, some of them at a time, and wait for it once."""
    flat = [_flat(x) for x in tensors]
    sums, counts = [], [-(-len(x) // (4 * ROW)) for x in flat]
    for group in _groups(flat):
        padded = torch.cat([F.pad(x, (0, -len(x) % (4 * ROW))) for x in group]).view(torch.int32).view(-1, ROW)
        factors = torch.from_numpy(FACTORS[0, 0].view(np.int64)).to(padded.device)
        sums += [(rows * factors).sum(1) for rows in padded.split(ROWS_AT_ONCE)]
    rows = torch.cat(sums).cpu() if sums else torch.empty(0, dtype=torch.int64, device="cpu")
    return [(len(x), part.numpy().tobytes()) for x, part in zip(flat, rows.split(counts), strict=True)]


def _flat(x: Tensor) -> Tensor:
    """Return the bytes of x in the order of its memory, of a copy if it has gaps."""
    x = _dense(x.detach())
    return (x if x.is_contiguous() else x.permute(0, 2, 3, 1)).reshape(-1).view(torch.uint8)


def _groups(flat: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield some megabytes of tensors on one device at a time."""
    group: list[Tensor] = []
    for x in flat:
        if group and (group[0].device != x.device or sum(map(len, group)) + len(x) > GROUP):
            yield group
            group = []
        group.append(x)
    if group:
        yield group
