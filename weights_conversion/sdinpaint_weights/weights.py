"""Represent the tensors of one or several weights files as a lazy mapping from name to tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdinpaint_weights.dtypes import StoredDtype
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.files import FETCH_AGAIN, SourceFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_TENSORS = 20_000
"""Largest number of tensors accepted; an SD1 checkpoint has about 1,100, an SDXL one 2,500."""
MAX_NAME = 1000
"""Characters in a tensor's name at most."""
RUN = 1 << 28
"""Bytes in one run of tensors; see `Weights.runs`."""


@dataclass(eq=False)
class Storage:
    """A range of bytes in a file, with its CRC-32 checksum where the file has one."""

    file: SourceFile
    offset: int
    size: int
    crc: int | None = None
    name: str = ""

    def verify(self) -> None:
        """Check the CRC-32 checksum on the first call, and raise CheckpointError where it does not match."""
        if self.crc is None:
            return
        if self.file.crc32(self.offset, self.size) != self.crc:
            found = f"the bytes of {self.name!r} do not match their CRC-32 checksum"
            raise CheckpointError("CKPT_BAD_CRC", self.file.path, found, hint=FETCH_AGAIN)
        self.crc = None


@dataclass(frozen=True)
class Entry:
    """The place of one tensor: it begins `start` bytes into a storage; `stride` is in elements."""

    storage: Storage
    start: int
    dtype: StoredDtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Return the number of elements from the first to the last one used."""
        return extent_of(self.shape, self.stride)

    @property
    def begin(self) -> int:
        """Return the byte of the file at which the tensor begins."""
        return self.storage.offset + self.start

    @property
    def place(self) -> tuple[str, int]:
        """Return a key that sorts entries by file and position."""
        return str(self.storage.file.path), self.begin

    def follows(self, other: Entry) -> bool:
        """Tell whether this tensor directly follows another one in the file.

        Args:
            other: the other tensor.

        Returns:
            True where both together are a dense, aligned sequence of elements of one dtype.
        """
        return (
            self.storage.file is other.storage.file
            and self.dtype == other.dtype
            and self.begin == other.begin + other.extent * self.dtype.itemsize
            and self.begin % self.dtype.itemsize == 0
            and all(one.extent == math.prod(one.shape) > 0 for one in (self, other))
        )

    def tensor(self, dtype: torch.dtype | None) -> Tensor:
        """Return the tensor.

        Args:
            dtype: dtype of the result; None keeps the stored one.

        Returns:
            A view of the mapped file, or a cast copy for another dtype; a copy too where the bytes are not aligned.

        Raises:
            CheckpointError: the bytes are damaged or cannot be read.
        """
        self.storage.verify()
        stored = self.dtype.torch
        file, offset = self.storage.file, self.begin
        aligned = offset % self.dtype.itemsize == 0
        flat = (file.mapped if aligned else file.loaded)(offset, self.extent, stored)
        tensor = flat.as_strided(self.shape, self.stride)
        if dtype in (None, stored):
            return tensor
        cast = tensor.to(dtype)
        self.release()  # else the file's pages use memory beside the copy
        return cast

    def release(self) -> None:
        """Free the memory of the file's pages that hold this tensor alone."""
        self.storage.file.release(self.begin, self.extent * self.dtype.itemsize)

    def copy(self) -> Tensor:
        """Return the tensor in new memory, through plain reads of the file."""
        self.storage.verify()
        return self.storage.file.loaded(self.begin, self.extent, self.dtype.torch).as_strided(self.shape, self.stride)


@dataclass(eq=False)
class Weights(Mapping[str, "Tensor"]):
    """The tensors of a file or of a folder's shards; each is read when it is accessed.

    `weights[key]` and `weights.tensor(key)` are views of the mapped file.
    """

    path: Path
    kind: str
    """"safetensors", "zip pickle" or "legacy pickle"."""
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    """Unknown classes named in a pickle; they were neither imported nor called."""
    notes: tuple[str, ...] = ()
    """Sentences about choices that the caller may want to know of."""
    variant: str | None = None
    """The variant of a folder's files, such as "fp16"."""

    @property
    def files(self) -> set[SourceFile]:
        """Return the files that hold the tensors."""
        return {entry.storage.file for entry in self.entries.values()}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __repr__(self) -> str:
        return f"Weights({str(self.path)!r}, {self.kind}, {len(self)} tensors)"

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it.

        Args:
            key: name of the tensor.

        Returns:
            The shape.

        Raises:
            KeyError: there is no such tensor.
        """
        return self.entries[key].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {name: shape} without reading tensors."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Return the stored dtype of a tensor without reading it.

        Args:
            key: name of the tensor.

        Returns:
            The dtype.

        Raises:
            KeyError: there is no such tensor.
        """
        return self.entries[key].dtype.torch

    def stored_dtype(self, key: str) -> StoredDtype:
        """Return the stored dtype of a tensor by name and size, without importing torch.

        Args:
            key: name of the tensor.

        Returns:
            The dtype.

        Raises:
            KeyError: there is no such tensor.
        """
        return self.entries[key].dtype

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor.

        A view may be written to without changing the file; the file must stay unchanged while the view exists. Where
        the file has checksums, the one of each storage is checked on its first read.

        Args:
            key: name of the tensor.
            dtype: dtype of the result; None keeps the stored one.

        Returns:
            The tensor on the CPU: a view of the mapped file, or a copy: cast to another dtype, or because the file is
            not to be mapped.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: the bytes are damaged or cannot be read.
        """
        return self.entries[key].tensor(dtype)

    def runs(self, keys: Iterable[str]) -> list[list[str]]:
        """Group tensors of one dtype that are adjacent in a file, without reading them.

        Args:
            keys: names of tensors.

        Returns:
            The names in the order of their bytes, in runs of about `RUN` bytes at most; each alone where the file is
            not to be mapped.
        """
        runs: list[list[str]] = []
        for key in sorted(keys, key=lambda key: self.entries[key].place):
            entry, before = self.entries[key], self.entries[runs[-1][-1]] if runs else None
            joins = before is not None and entry.storage.file.may_map and entry.follows(before)
            if joins and entry.begin < self.entries[runs[-1][0]].begin + RUN:
                runs[-1].append(key)
            else:
                runs.append([key])
        return runs

    def run(self, keys: list[str]) -> Tensor:
        """Return the values of a run as one tensor.

        Args:
            keys: an item of `runs`.

        Returns:
            A flat view of the mapped file in the stored dtype.

        Raises:
            CheckpointError: the bytes are damaged or cannot be read.
        """
        first, last = self.entries[keys[0]], self.entries[keys[-1]]
        for key in keys:
            self.entries[key].storage.verify()
        count = (last.begin - first.begin) // first.dtype.itemsize + last.extent
        return first.storage.file.mapped(first.begin, count, first.dtype.torch)

    def release(self, key: str) -> None:
        """Free the memory of a tensor's pages in the mapped file; a later access reads them again.

        Args:
            key: name of the tensor.

        Raises:
            KeyError: there is no such tensor.
        """
        self.entries[key].release()

    def copy(self, key: str) -> Tensor:
        """Return a tensor in new memory, without mapping the file.

        Args:
            key: name of the tensor.

        Returns:
            The tensor on the CPU, in the stored dtype.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: the bytes are damaged or cannot be read.
        """
        return self.entries[key].copy()


def is_tensor_name(name: str) -> bool:
    """Tell whether a tensor's name is printable and of reasonable length.

    Args:
        name: the name.

    Returns:
        True where a message can show the name as it is.
    """
    return 0 < len(name) <= MAX_NAME and name.isprintable()


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Compute the strides of a dense row-major tensor.

    Args:
        shape: shape of the tensor.

    Returns:
        Strides in elements.
    """
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))


def extent_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Count the elements of a storage that a tensor spans.

    Args:
        shape: shape of the tensor.
        stride: strides in elements.

    Returns:
        Number of elements from the first to the last one used; 0 for a tensor without elements.
    """
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
