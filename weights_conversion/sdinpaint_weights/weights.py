"""A lazy mapping from name to tensor over one or several weights files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.files import FETCH_AGAIN, SourceFile

MAX_TENSORS = 20_000
"""An SD1 checkpoint has about 1,100 tensors, an XL one 2,500."""
MAX_NAME = 1000
RUN = 1 << 28


@dataclass(eq=False)
class Storage:
    """A run of bytes in a file, with the CRC-32 that the file promises for it, if it promises one."""

    file: SourceFile
    offset: int
    size: int
    crc: int | None = None
    name: str = ""

    def verify(self) -> None:
        """Compare the checksum, on the first read only.

        Raises: CheckpointError.
        """
        if self.crc is None:
            return
        if self.file.crc32(self.offset, self.size) != self.crc:
            found = f"the bytes of {self.name!r} do not match their CRC-32 checksum"
            raise CheckpointError("CKPT_BAD_CRC", self.file.path, found, hint=FETCH_AGAIN)
        self.crc = None


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` bytes into a storage; `stride` in elements."""

    storage: Storage
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements from the first to the last one used."""
        return extent_of(self.shape, self.stride)

    @property
    def begin(self) -> int:
        """Byte of the file at which it begins."""
        return self.storage.offset + self.start

    @property
    def place(self) -> tuple[str, int]:
        """Sorts entries by file and by their bytes."""
        return str(self.storage.file.path), self.begin

    def follows(self, other: Entry) -> bool:
        """Whether the values of `other` and its own are one dense, aligned row of numbers of one dtype."""
        return (
            self.storage.file is other.storage.file
            and self.dtype == other.dtype
            and self.begin == other.begin + other.extent * self.dtype.itemsize
            and self.begin % self.dtype.itemsize == 0
            and all(one.extent == math.prod(one.shape) > 0 for one in (self, other))
        )

    def tensor(self, dtype: torch.dtype | None) -> Tensor:
        """The tensor as a view of the mapped file, or read and cast where another dtype is asked for."""
        self.storage.verify()
        if self.extent == 0:
            return torch.empty(self.shape, dtype=dtype or self.dtype, device="cpu")
        file, offset = self.storage.file, self.begin
        aligned = offset % self.dtype.itemsize == 0
        flat = (file.mapped if aligned else file.loaded)(offset, self.extent, self.dtype)
        tensor = flat.as_strided(self.shape, self.stride)
        if dtype in (None, self.dtype):
            return tensor
        cast = tensor.to(dtype)
        file.release(offset, self.extent * self.dtype.itemsize)  # or the file's pages would count beside the copy
        return cast

    def copy(self) -> Tensor:
        """The tensor in memory of its own, through plain reads of the file."""
        self.storage.verify()
        if self.extent == 0:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        offset = self.storage.offset + self.start
        return self.storage.file.loaded(offset, self.extent, self.dtype).as_strided(self.shape, self.stride)


@dataclass(eq=False)
class Weights(Mapping[str, Tensor]):
    """The tensors of a file or of a folder's shards; nothing is read before it is asked for.

    `weights[key]` and `weights.tensor(key)` are views of the mapped file.
    """

    path: Path
    kind: str
    """"safetensors", "zip pickle" or "legacy pickle"."""
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    """Classes named in a pickle that are no weights; they were neither imported nor run."""
    notes: tuple[str, ...] = ()
    """What was chosen on the caller's behalf, as sentences."""

    @property
    def files(self) -> set[SourceFile]:
        """Where the bytes are."""
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
        """Shape of one tensor; reads nothing."""
        return self.entries[key].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; reads nothing."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of one tensor; reads nothing."""
        return self.entries[key].dtype

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on the CPU: a view of the mapped file, or where `dtype` differs a cast copy.

        A view may be written to (the file is not), and needs the file to stay unchanged while it lives.
        A checksum, where the file has one, is compared on the first read of each storage.
        Raises: KeyError for an unknown name; CheckpointError for damaged bytes.
        """
        return self.entries[key].tensor(dtype)

    def runs(self, keys: Iterable[str]) -> list[list[str]]:
        """The keys in the order of their bytes, those together whose values lie side by side in a file as one dtype.

        A run ends at RUN bytes. Reads nothing.
        """
        runs: list[list[str]] = []
        for key in sorted(keys, key=lambda key: self.entries[key].place):
            entry, before = self.entries[key], self.entries[runs[-1][-1]] if runs else None
            if before is not None and entry.follows(before) and entry.begin < self.entries[runs[-1][0]].begin + RUN:
                runs[-1].append(key)
            else:
                runs.append([key])
        return runs

    def run(self, keys: list[str]) -> Tensor:
        """All values of one of `runs` as stored: a flat view of the mapped file. Raises: CheckpointError."""
        first, last = self.entries[keys[0]], self.entries[keys[-1]]
        for key in keys:
            self.entries[key].storage.verify()
        count = (last.begin - first.begin) // first.dtype.itemsize + last.extent
        return first.storage.file.mapped(first.begin, count, first.dtype)

    def copy(self, key: str) -> Tensor:
        """One tensor as stored, in memory of its own: nothing of the file stays mapped.

        Raises: KeyError for an unknown name; CheckpointError for damaged bytes.
        """
        return self.entries[key].copy()


def is_tensor_name(name: str) -> bool:
    """Whether a name can be shown in a message as it is."""
    return 0 < len(name) <= MAX_NAME and name.isprintable()


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a dense row-major tensor."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))


def extent_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one used; 0 for a tensor without elements."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
