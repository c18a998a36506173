"""Hold converted weights in a temporary file that is mapped, as weights are that their file holds in the right dtype.

Memory of a private mapping can be given back and comes back from the file, and the system tells whether it was written
to. The file has no name: the system deletes it when the last tensor in it dies, or the process, however it ends.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from sdinpaint_weights.weights import contiguous_stride

__all__ = ["Convert", "in_memory", "spool"]

Convert = Callable[[str, Tensor, torch.dtype], Tensor]
"""Makes a contiguous copy of the tensor of that name in that dtype."""
Shape = tuple[int, ...]

MOUNTS = Path("/proc/self/mountinfo")
"""A line is "id parent major:minor root folder options ... - filesystem source options".

Source: Linux, Documentation/filesystems/proc.rst, section 3.5
"""
IN_MEMORY = {"tmpfs", "ramfs"}
SMALL = 1 << 15
"""Bytes of a tensor below which it stays in memory."""
PIECE = 1 << 19
"""Elements that are converted at a time, while those before are written."""
MARGIN = 1 << 30
"""Bytes that are left free on the disk."""


def in_memory(_name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor into new memory.

    Args:
        _name: its name, which does not matter here.
        tensor: any tensor.
        dtype: the dtype of the copy.

    Returns:
        A contiguous copy.
    """
    return tensor.to(dtype).contiguous()


@contextmanager
def spool(shapes: Mapping[str, Shape], dtype: torch.dtype) -> Iterator[Convert]:
    """Provide a conversion of tensors into a temporary file, for as long as the `with` block lasts.

    Where the system is not Linux, or the folder for temporary files has no room, cannot be written to or is in memory
    itself, tensors are converted into memory.

    Args:
        shapes: name -> shape of the tensors that are to be converted.
        dtype: the dtype that they are converted to.

    Yields:
        The function that converts one of the tensors; small ones stay in memory.
    """
    blocks = list(_blocks(shapes, dtype))
    if not blocks or sys.platform != "linux":
        yield in_memory
        return
    with ExitStack() as opened:
        convert: Convert = in_memory
        try:
            file = opened.enter_context(tempfile.TemporaryFile(buffering=0))
            memory = _reserve(file, blocks[-1].end)
            convert = _Spool(file, memory, opened.enter_context(ThreadPoolExecutor(1)), blocks, dtype)
        except OSError:
            opened.close()
        yield convert


class _Block(NamedTuple):
    """The place of a tensor in the file, which begins at the start of a page."""

    name: str
    shape: Shape
    start: int
    end: int


class _Place(NamedTuple):
    offset: int
    view: Tensor


class _Spool:
    """A conversion into a mapped file; after an error of the disk everything is in memory."""

    def __init__(
        self, file: IO[bytes], memory: mmap.mmap, writer: Executor, blocks: Iterable[_Block], dtype: torch.dtype
    ) -> None:
        self._file, self._writer = file, writer
        self._buffers = torch.empty(2, PIECE, dtype=dtype, device="cpu")
        self._places: dict[str, _Place] = {}
        self._done: list[Tensor] = []
        for name, shape, start, _ in blocks:
            part = torch.empty(0, dtype=dtype, device="cpu")
            whole = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).untyped_storage()
            part.set_(whole, 0, shape, contiguous_stride(shape))  # a view would hold its base
            self._places[name] = _Place(start, part)

    def __call__(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        place = self._places.get(name)
        if place is None:
            return in_memory(name, tensor, dtype)
        if not self._write(tensor, place.offset):
            self._retreat()
            return in_memory(name, tensor, dtype)
        self._done.append(place.view)
        return place.view

    def _write(self, tensor: Tensor, offset: int) -> bool:
        """Convert and write a tensor piece by piece, in two buffers by turns; tell whether the disk took it."""
        writing: list[Future[bool]] = []
        try:
            for number, piece in enumerate(tensor.reshape(-1).split(PIECE)):
                if number > 1 and not writing[-2].result():
                    break
                data = self._buffers[number % 2, : len(piece)].copy_(piece).view(torch.uint8).numpy().data
                writing.append(self._writer.submit(_write_all, self._file.fileno(), data, offset))
                offset += len(data)
        finally:
            wait(writing)  # after an interrupt, too, since they read the buffers
        return all(one.result() for one in writing)

    def _retreat(self) -> None:
        """Move what was converted to memory, so that the disk gets its room back."""
        self._places.clear()
        for tensor in self._done:
            tensor.data = tensor.clone()
        self._done.clear()


def _write_all(file: int, data: memoryview, offset: int) -> bool:
    try:
        while data:
            count = os.pwrite(file, data, offset)
            data, offset = data[count:], offset + count
    except OSError:
        return False
    return True


def _blocks(shapes: Mapping[str, Shape], dtype: torch.dtype) -> Iterator[_Block]:
    """Lay out the tensors that are large enough, each at the next page."""
    end = 0
    for name, shape in shapes.items():
        size = dtype.itemsize * math.prod(shape)
        if size >= SMALL:
            start = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
            end = start + size
            yield _Block(name, shape, start, end)


def _reserve(file: IO[bytes], size: int) -> mmap.mmap:
    """Give a file its size on the disk, and map it; raise OSError where it has no room or is no file on a disk."""
    disk = os.fstatvfs(file.fileno())
    if disk.f_bavail * disk.f_frsize < size + MARGIN or _is_in_memory(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.posix_fallocate(file.fileno(), 0, size)
    return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)


def _is_in_memory(file: IO[bytes]) -> bool:
    """Tell whether a file is on a filesystem that is in memory itself."""
    device = os.fstat(file.fileno()).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = (line.split() for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines())
    return any(words[2] == number and words[words.index("-") + 1] in IN_MEMORY for words in mounts)
