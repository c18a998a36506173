"""Pages of a mapped file: whether anything was written to them, and how their memory is released until it is read."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

PAGEMAP = Path("/proc/self/pagemap")
"""Eight bytes for each page of this process. Source: Linux, Documentation/admin-guide/mm/pagemap.rst"""
MAPS = Path("/proc/self/maps")
PRESENT, SWAPPED, OF_FILE = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61))


def release(x: Tensor) -> bool:
    """Release the pages that hold nothing but `x`; they come back from their file when they are read.

    Only on Linux, and only if all of them are of a file: what was written to a private map, by whomever, no longer is.
    Returns whether that was done.
    """
    page = mmap.PAGESIZE
    first, last = -(-x.data_ptr() // page), (x.data_ptr() + x.nbytes) // page
    if sys.platform != "linux" or not (x.is_cpu and x.is_contiguous()) or last <= first:
        return False
    if not _none_written(first, last):
        return False
    begin, size = ctypes.c_void_p(first * page), ctypes.c_size_t((last - first) * page)
    return bool(_libc().madvise(begin, size, mmap.MADV_DONTNEED) == 0)


def private_maps() -> list[tuple[int, int]]:
    """List the addresses, from and to, of files that are mapped so that changes stay in this process; else none."""
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    # "from-to rwxp offset device inode path"
    rows = [line.split(maxsplit=5) for line in lines]
    return [
        (int(first, 16), int(last, 16))
        for addresses, permissions, _, _, inode, *_ in rows
        if permissions.endswith("p") and inode != "0"
        for first, _, last in [addresses.partition("-")]
    ]


def lies_in(x: Tensor, maps: Sequence[tuple[int, int]]) -> bool:
    """Tell whether all of x lies in one of these maps."""
    start, end = x.data_ptr(), x.data_ptr() + x.nbytes
    return x.is_cpu and start < end and any(first <= start and end <= last for first, last in maps)


def is_unwritten(x: Tensor) -> bool:
    """Tell whether no page under x, which lies in a private map of a file, was written to since it was mapped.

    A page that x shares with what lies beside it counts as written to when its neighbour was.
    """
    return _none_written(x.data_ptr() // mmap.PAGESIZE, -(-(x.data_ptr() + x.nbytes) // mmap.PAGESIZE))


def _none_written(first: int, last: int) -> bool:
    """Tell whether each of these pages is of a file or was not read yet: what was written to no longer is."""
    try:
        with PAGEMAP.open("rb", buffering=0) as file:
            file.seek(8 * first)
            told = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    except OSError:  # a system that does not tell
        return False
    written = (told & SWAPPED > 0) | ((told & PRESENT > 0) & (told & OF_FILE == 0))
    return len(told) == last - first and not np.any(written)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
