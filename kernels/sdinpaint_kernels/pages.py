"""Memory that can be had again: pages of a mapped file that nothing was written to."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from pathlib import Path

import numpy as np
from torch import Tensor

PAGEMAP = Path("/proc/self/pagemap")
"""Eight bytes for each page of this process. Source: Linux, Documentation/admin-guide/mm/pagemap.rst"""
PRESENT, SWAPPED, OF_FILE = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61))


def give_back(x: Tensor) -> bool:
    """Let the system have the pages that hold nothing but `x`; they come back, as they are, when they are read.

    Only on Linux, and only if all of them are of a file: what was written to a private map, by whomever, no longer is.
    """
    page = mmap.PAGESIZE
    first, last = -(-x.data_ptr() // page), (x.data_ptr() + x.nbytes) // page
    if sys.platform != "linux" or not (x.is_cpu and x.is_contiguous()) or last <= first:
        return False
    with PAGEMAP.open("rb", buffering=0) as file:
        file.seek(8 * first)
        told = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    if np.any((told & SWAPPED) > 0) or np.any((told & PRESENT > 0) & (told & OF_FILE == 0)):
        return False
    begin, size = ctypes.c_void_p(first * page), ctypes.c_size_t((last - first) * page)
    return bool(_libc().madvise(begin, size, mmap.MADV_DONTNEED) == 0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
