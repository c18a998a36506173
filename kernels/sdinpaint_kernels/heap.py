"""Memory that C's allocator keeps for the next buffers instead of giving it back to the system each time.

glibc maps every buffer of more than 32 MB anew, and the system fills new memory with zeros page by page: a twelfth of
the time of a VAE, whose feature maps have hundreds of megabytes. The settings belong to the whole process, so they hold
only while a VAE runs, and all that was kept is given back after it.

Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["give_back", "keeping_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
USUAL = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}
"""The settings that glibc itself arrives at after the first buffer of 32 MB."""

_lock = threading.Lock()
_users = 0


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Let the allocator keep what is freed within the block, and give it back to the system at the end.

    Blocks may be nested and run in several threads. Where the C library is another one, nothing changes.
    """
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def give_back() -> None:
    """Give memory that was freed, but is between memory in use, back to the system."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def _count(change: int) -> None:
    global _users
    libc = _libc()
    with _lock:
        before, _users = _users, _users + change
        if libc is None or (before > 0) == (_users > 0):
            return
        for name, value in (KEEP if _users else USUAL).items():
            libc.mallopt(name, value)
        if not _users:
            give_back()


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
