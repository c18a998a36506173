"""Read the bytes of a weights file, by plain reads or through a private memory map."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sdinpaint_weights.door import Refusal, open_regular
from sdinpaint_weights.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 1 << 20
FETCH_AGAIN = "the download is incomplete or damaged: delete the file and fetch it again"


class _OpenFile:
    """A file that is open for reading, and what it was like when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = open_regular(path)
        except Refusal as refusal:
            _refuse(path, refusal)
        weakref.finalize(self, self.file.close)
        self.status = os.fstat(self.file.fileno())

    def require_unchanged(self, used: str) -> None:
        """Check that nobody wrote to the file since; a new file under the same name is another one.

        Args:
            used: what the file was used for meanwhile, for the error.

        Raises:
            CheckpointError: the file was written to, or truncated.
        """
        now, then = os.fstat(self.file.fileno()), self.status
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise CheckpointError(
                "CKPT_CHANGED",
                self.path,
                f"the file was changed while {used}: {size_text(then.st_size)} before, {size_text(now.st_size)} now",
                hint="load again, once nothing writes to it; replace such a file by renaming a new one",
            )


class SourceFile:
    """A regular file that is open for reading.

    Args:
        path: the file.

    Raises:
        CheckpointError: the path does not exist, is a folder or a device, cannot be read, or is empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._open = _OpenFile(self.path)
        self._file = self._open.file
        self.size = self._open.status.st_size
        if self.size == 0:
            raise CheckpointError("CKPT_EMPTY", path, "an empty file", expected="weights", hint=FETCH_AGAIN)
        self.may_map = True
        """False reads tensors into memory, where the file is on a drive that may vanish or change."""
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None

    def read(self, offset: int, count: int) -> bytearray:
        """Read bytes into new memory.

        Args:
            offset: first byte.
            count: number of bytes.

        Returns:
            The bytes.

        Raises:
            CheckpointError: the file ends early, changed since it was opened, or cannot be read.
        """
        buffer = bytearray(count)
        self._read_into(memoryview(buffer), offset)
        return buffer

    def second_handle(self, kind: type[io.FileIO]) -> io.FileIO:
        """Return a duplicate handle of the open file, which shares its position.

        Args:
            kind: the class of the handle.

        Returns:
            The handle, which the caller closes.
        """
        return kind(os.dup(self._file.fileno()), "rb")

    def crc32(self, offset: int, count: int) -> int:
        """Compute the CRC-32 checksum of some bytes.

        Args:
            offset: first byte.
            count: number of bytes.

        Returns:
            The checksum.

        Raises:
            CheckpointError: the file ends early, changed since it was opened, or cannot be read.
        """
        crc = 0
        for part in self._parts(offset, count):
            crc = zlib.crc32(part, crc)
        return crc

    def sha256(self, on_bytes: Callable[[int], object] | None = None) -> str:
        """Compute the SHA-256 of the whole file.

        Args:
            on_bytes: called with the number of bytes of each part that was read, for a progress bar.

        Returns:
            The digest in hexadecimal digits.

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be read.
        """
        digest = hashlib.sha256()
        for part in self._parts(0, self.size):
            digest.update(part)
            if on_bytes is not None:
                on_bytes(len(part))
        return digest.hexdigest()

    def mapped(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """View elements in the file's private memory map; writes to the tensor do not reach the file.

        Another program must not change or truncate the file while the tensor exists; `Watched` notices it.

        Args:
            offset: first byte; a multiple of the dtype's size.
            count: number of elements.
            dtype: dtype of the elements.

        Returns:
            A view, (count,); new memory where the file may not be mapped.

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be mapped.
        """
        import torch

        if not self.may_map:
            return self.loaded(offset, count, dtype)
        if count == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        return torch.frombuffer(self.map(), dtype=dtype, count=count, offset=offset)

    def release(self, offset: int, count: int) -> None:
        """Free the memory pages that lie wholly within some bytes of the map; a later access reads them again.

        Args:
            offset: first byte.
            count: number of bytes.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            start, end = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, (offset + count) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def loaded(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """Read elements into new memory.

        Args:
            offset: first byte.
            count: number of elements.
            dtype: dtype of the elements.

        Returns:
            A tensor on the CPU, (count,).

        Raises:
            CheckpointError: the file ends early, changed since it was opened, or cannot be read.
        """
        import torch

        values = torch.empty(count, dtype=dtype, device="cpu")  # aligned, other than the memory of a bytearray
        if count:
            self._read_into(values.view(torch.uint8).numpy().data, offset)
        return values

    def map(self) -> mmap.mmap:
        """Return the private memory map of the whole file, which is made on first use."""
        with self._lock:
            self._require_unchanged()
            if self._map is None:
                try:
                    self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
                except OSError as error:
                    hint = "free memory, or load with mmap=False, which reads the file"
                    raise CheckpointError("CKPT_NOT_MAPPED", self.path, _reason(error), hint=hint) from error
            return self._map

    def _parts(self, offset: int, count: int) -> Iterator[memoryview]:
        """Yield bytes in chunks, so that little memory is used; each chunk is overwritten by the next one."""
        chunk = memoryview(bytearray(min(CHUNK, count)))
        for start in range(offset, offset + count, CHUNK):
            part = chunk[: min(CHUNK, offset + count - start)]
            self._read_into(part, start)
            yield part

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        with self._lock:
            self._require_unchanged()
            try:
                self._file.seek(offset)
                while buffer:
                    # One call reads at most 2 GB on Linux, and 0 bytes at the end of the file.
                    count = self._file.readinto(buffer)
                    if not count:
                        raise CheckpointError("CKPT_TRUNCATED", self.path, "the file ends early", hint=FETCH_AGAIN)
                    buffer = buffer[count:]
            except CheckpointError:
                raise
            except OSError as error:
                hint = "check the disk or the network mount, then try again"
                raise CheckpointError("CKPT_NOT_READABLE", self.path, _reason(error), hint=hint) from error

    def _require_unchanged(self) -> None:
        self._open.require_unchanged("it was read")


class Watched:
    """Files that weights are mapped from, which must not change while these are in use.

    A file is watched for as long as a tensor is a view of it. Copies of a model, and what another process unpickles,
    have their weights in memory of their own, and watch nothing.

    Args:
        files: files that were opened; those that nothing is mapped from are left out.
    """

    def __init__(self, files: Iterable[SourceFile] = ()) -> None:
        self._files = [(weakref.ref(file._map), file._open) for file in files if file._map is not None]

    def __reduce__(self) -> tuple[type[Watched], tuple[()]]:
        return Watched, ()

    def require_unchanged(self) -> None:
        """Check every file, in about a microsecond each.

        Raises:
            CheckpointError: a file was written to or truncated, so that the weights are not those that were loaded.
        """
        for mapped, opened in self._files:
            if mapped() is not None:
                opened.require_unchanged("its weights were in use")


def size_text(count: int) -> str:
    """Format a number of bytes for people.

    Args:
        count: number of bytes.

    Returns:
        The size in a suitable unit, with the exact number too, since two sizes may differ by a few bytes.
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit} ({count} bytes)"
    return f"{count} bytes"


def _refuse(path: Path, refusal: Refusal) -> NoReturn:
    """Raise the error for a path that is no weights file."""
    if refusal.reason == "folder":
        hint = "give the weights file itself, or load the folder as a diffusers folder"
        raise CheckpointError("CKPT_IS_DIRECTORY", path, "a folder", expected="a weights file", hint=hint) from refusal
    if refusal.reason == "missing" and refusal.found == "no such file":
        raise CheckpointError("CKPT_NOT_FOUND", path, refusal.found, hint=_what_is_there(path)) from refusal
    regular = "a regular file"
    if refusal.reason == "special" or os.path.islink(path):
        raise CheckpointError("CKPT_NOT_REGULAR", path, refusal.found, expected=regular, hint=refusal.hint) from refusal
    code = "CKPT_NOT_FOUND" if refusal.reason == "missing" else "CKPT_NOT_READABLE"
    raise CheckpointError(code, path, refusal.found, expected=regular, hint=refusal.hint) from refusal


def _what_is_there(path: Path) -> str:
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir())
    except (OSError, ValueError):
        return f"check the path: the folder {path.parent} does not exist either"
    return f"check the path; its folder holds: {', '.join(beside[:5]) or 'nothing'}"


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
