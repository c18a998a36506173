"""The allocator keeps memory within a block, and gives it back after it."""

from __future__ import annotations

import ctypes
import mmap
import platform
import resource
import threading
from pathlib import Path

import pytest
import torch
from sdinpaint_kernels import heap

BYTES = 2**26


@pytest.fixture(autouse=True)
def glibc(freed_memory, substitute):
    """The allocator with its own settings, where it is glibc's."""
    substitute(heap, _libc=lambda: ctypes.CDLL(None))
    assert platform.libc_ver()[0] == "glibc"


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def faults():
    """Pages that the system provides for a buffer that is made and dropped three times."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(3):
        torch.ones(BYTES // 4)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_a_buffer_is_provided_once_within_a_block():
    faults()
    outside = faults()
    with heap.keeping_memory(), heap.keeping_memory():
        for _ in range(3):
            faults()
        assert faults() < outside / 20
    assert outside > 1000
    assert faults() > outside / 2


def test_memory_is_given_back_at_the_end():
    before = resident_bytes()
    with heap.keeping_memory():
        torch.ones(BYTES // 4)
        assert resident_bytes() - before > BYTES / 2
    assert resident_bytes() - before < BYTES / 2


def test_blocks_in_threads_end_with_the_last():
    started, go = threading.Event(), threading.Event()

    def other():
        with heap.keeping_memory():
            started.set()
            go.wait(10)

    thread = threading.Thread(target=other)
    with heap.keeping_memory():
        thread.start()
        assert started.wait(10)
    assert heap._users == 1
    go.set()
    thread.join()
    assert heap._users == 0
