"""Pages of a mapped file are given back, and only those."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from sdinpaint_kernels import conv3, pages

SIZE = 2**25
"""Bytes."""
SLACK = 2**17
"""Two of what the system brings when a byte is read."""


def resident(x):
    """Bytes of the whole pages of a tensor that are in memory."""
    first, last = -(-x.data_ptr() // mmap.PAGESIZE), (x.data_ptr() + x.nbytes) // mmap.PAGESIZE
    with pages.PAGEMAP.open("rb", buffering=0) as file:
        file.seek(8 * first)
        told = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    return int(np.count_nonzero(told & pages.PRESENT)) * mmap.PAGESIZE


@pytest.fixture(autouse=True, params=["searched by the system", "read"])
def way(request, substitute):
    """The two ways to learn of written pages; the first is new in Linux 6.7."""
    if request.param == "read":
        substitute(pages, PAGEMAP_SCAN=0)


@pytest.fixture
def mapped(tmp_path):
    """Ones in a private map of a file, all of them read."""
    path = tmp_path / "ones"
    path.write_bytes(torch.ones(SIZE // 4).numpy().tobytes())
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    x = torch.frombuffer(memory, dtype=torch.float32)
    assert x.sum() == SIZE // 4
    return x


def test_pages_of_a_file_leave_and_come_back(mapped):
    assert resident(mapped) > SIZE - SLACK
    assert pages.release(mapped)
    assert resident(mapped) == 0
    assert mapped.sum() == SIZE // 4
    assert resident(mapped) > SIZE - SLACK


@pytest.mark.parametrize("write", [lambda x: x[1000:1001].fill_(7), lambda x: x.numpy().__setitem__(5, 7)])
def test_what_was_written_to_stays(mapped, write):
    write(mapped)
    assert not pages.release(mapped)
    assert mapped.sum() == SIZE // 4 + 6


def test_a_part_takes_nothing_of_its_neighbours(mapped):
    mapped[0] = 7
    part = mapped[100 : SIZE // 8]
    assert pages.release(part)
    assert resident(part) == 0
    assert resident(mapped) > SIZE // 2 - SLACK
    assert mapped.sum() == SIZE // 4 + 6


def test_a_write_behind_a_gap_is_noticed(mapped):
    part = mapped.view(-1, 1024)[:, :8]
    assert pages.lies_in(part, pages.private_maps())
    assert pages.is_unwritten(part)
    part[-1] = 7
    assert not pages.is_unwritten(part)


def test_memory_of_no_file_stays():
    x = torch.ones(SIZE // 4)
    assert not pages.release(x)
    assert resident(x) > SIZE - SLACK
    assert x.sum() == SIZE // 4


@pytest.mark.parametrize(
    "make", [lambda x: x[:3], lambda x: x.view(-1, 1024).T, lambda x: x.to("meta"), lambda x: x[:0]]
)
def test_what_cannot_leave_stays(mapped, make):
    assert not pages.release(make(mapped))


def test_elsewhere_nothing_happens(mapped, monkeypatch):
    monkeypatch.setattr(pages.sys, "platform", "darwin")
    assert not pages.release(mapped)


def test_convolutions_keep_their_weights_once(mapped):
    weight = mapped[: 512 * 1024 * 9].view(512, 1024, 3, 3)
    made = [conv3(torch.ones(1, 1024, 16, 16), weight) for _ in range(2)][-1]
    assert resident(weight) < weight.nbytes / 4  # what is looked at for changes
    assert made[0, 0, 1, 1] == 9 * 1024
