"""Pages of memory-mapped files: whether they were written to, and releasing their memory until they are read again."""

from __future__ import annotations

import bisect
import ctypes
import functools
import mmap
import operator
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

PAGEMAP = Path("/proc/self/pagemap")
"""The file of Linux with eight bytes for each page of this process.

Source: Linux, Documentation/admin-guide/mm/pagemap.rst
"""
PAGEMAP_SCAN = 0xC0606610
"""The request of `ioctl` that searches pages; its argument takes 96 bytes."""
MAPS = Path("/proc/self/maps")
_PRIVATE_MAP = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ...p \S+ \S+ [1-9]", re.MULTILINE)
"""A line is "from-to rwxp offset device inode path"; only what belongs to a file has an inode."""
PRESENT, SWAPPED, OF_FILE = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61))


def release(x: Tensor) -> bool:
    """Release the pages that hold only this tensor; they are loaded from their file again when they are read.

    This works on Linux only, and only if all pages belong to a file. A page of a private mapping that was written to
    does not.

    Args:
        x: a contiguous tensor on the CPU; others are left alone.

    Returns:
        True if the pages were released.
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
    """Return the start and end addresses of all private file mappings of this process in order; none if unknown."""
    try:
        text = MAPS.read_bytes()
    except OSError:
        return []
    return [(int(first, 16), int(last, 16)) for first, last in _PRIVATE_MAP.findall(text)]


def lies_in(x: Tensor, maps: Sequence[tuple[int, int]]) -> bool:
    """Tell whether a tensor is entirely inside one of these mappings.

    Args:
        x: a tensor.
        maps: start and end addresses, from `private_maps`.

    Returns:
        True if it is.
    """
    start, end = x.data_ptr(), _end(x)
    if not x.is_cpu or start == end:
        return False
    at = bisect.bisect_right(maps, start, key=operator.itemgetter(0))
    return at > 0 and end <= maps[at - 1][1]


def is_unwritten(x: Tensor) -> bool:
    """Tell whether no page under a tensor was written to since it was mapped.

    A page that the tensor shares with its neighbour in memory counts as written to if the neighbour was.

    Args:
        x: a tensor in a private mapping of a file.

    Returns:
        True if none was; False where the system does not tell.
    """
    return _none_written(x.data_ptr() // mmap.PAGESIZE, -(-_end(x) // mmap.PAGESIZE))


def _end(x: Tensor) -> int:
    """Return the address behind the last number of a tensor, which may have gaps between its numbers."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (x.numel() and last + 1) * x.itemsize


def _none_written(first: int, last: int) -> bool:
    """Tell whether each of these pages still belongs to a file or was not read yet; a written page does neither."""
    try:
        with PAGEMAP.open("rb", buffering=0) as file:
            try:
                return _written_ranges(file.fileno(), first, last) == 0
            except OSError:  # a system before Linux 6.7
                file.seek(8 * first)
                entries = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    except OSError:  # a system that does not tell
        return False
    written = (entries & SWAPPED > 0) | ((entries & PRESENT > 0) & (entries & OF_FILE == 0))
    return len(entries) == last - first and not np.any(written)


def _written_ranges(pagemap: int, first: int, last: int) -> int:
    """Return 1 if one of these pages is in memory or swapped, and of no file; a tenth of the time of reading them all.

    Source: Linux, Documentation/admin-guide/mm/pagemap.rst, PAGEMAP_SCAN.
    """
    import fcntl  # noqa: PLC0415 - Windows, which has no page map either, lacks it

    found = (ctypes.c_uint64 * 3)()
    of_file, in_memory, swapped = 1 << 2, 1 << 3, 1 << 4
    where = first * mmap.PAGESIZE, last * mmap.PAGESIZE, 0, ctypes.addressof(found), 1, 1
    query = struct.pack("12Q", 96, 0, *where, of_file, of_file, in_memory | swapped, in_memory)
    return int(fcntl.ioctl(pagemap, PAGEMAP_SCAN, bytearray(query)))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
