"""Read the bytes of a weights file, by plain reads or through a private memory map."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import stat
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sdinpaint_weights.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 1 << 20
FETCH_AGAIN = "the download is incomplete or damaged: delete the file and fetch it again"


class SourceFile:
    """A regular file that is open for reading.

    Args:
        path: the file.

    Raises:
        CheckpointError: the path does not exist, is a folder or a device, cannot be read, or is empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        require_regular(self.path)
        try:
            self._file = io.FileIO(self.path, "rb")
            self._opened = os.fstat(self._file.fileno())
        except OSError as error:
            raise CheckpointError("CKPT_NOT_READABLE", path, _reason(error), hint="check its permissions") from error
        weakref.finalize(self, self._file.close)
        self.size = self._opened.st_size
        if self.size == 0:
            raise CheckpointError("CKPT_EMPTY", path, "an empty file", expected="weights", hint=FETCH_AGAIN)
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

    def second_handle(self) -> io.FileIO:
        """Return a duplicate handle of the open file, which shares its position."""
        return io.FileIO(os.dup(self._file.fileno()), "rb")

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

        Another program must not change or truncate the file while the tensor exists.

        Args:
            offset: first byte; a multiple of the dtype's size.
            count: number of elements.
            dtype: dtype of the elements.

        Returns:
            A view, (count,).

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be mapped.
        """
        import torch

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

        if count == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        return torch.frombuffer(self.read(offset, count * dtype.itemsize), dtype=dtype)

    def map(self) -> mmap.mmap:
        """Return the private memory map of the whole file, which is made on first use."""
        with self._lock:
            self._require_unchanged()
            if self._map is None:
                try:
                    self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
                except OSError as error:
                    hint = "free memory, or ask for another dtype so that the file is read instead of mapped"
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
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise CheckpointError(
                "CKPT_CHANGED",
                self.path,
                f"the file was changed while it was read: {size_text(self.size)} before, {size_text(now.st_size)} now",
                hint="wait until the download or copy has ended, then load again",
            )


def require_regular(path: Path) -> None:
    """Check that a path is a regular file, before it is opened: opening a FIFO would wait forever.

    Args:
        path: the path.

    Raises:
        CheckpointError: the path does not exist, is a folder or a device, or cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if _is_link(path):
            found, hint = "a link whose target does not exist", "fetch the file again, or repair the link"
            raise CheckpointError("CKPT_NOT_REGULAR", path, found, hint=hint) from error
        raise CheckpointError("CKPT_NOT_FOUND", path, "no such file", hint=_what_is_there(path)) from error
    except OSError as error:
        loop = _is_link(path)
        code = "CKPT_NOT_REGULAR" if loop else "CKPT_NOT_READABLE"
        found = "a link that leads back to itself" if loop else _reason(error)
        raise CheckpointError(code, path, found, hint="give the path of a weights file") from error
    if stat.S_ISDIR(mode):
        hint = "give the weights file itself, or load the folder as a diffusers folder"
        raise CheckpointError("CKPT_IS_DIRECTORY", path, "a folder", expected="a weights file", hint=hint)
    if not stat.S_ISREG(mode):
        found = "a pipe, socket or device"
        raise CheckpointError("CKPT_NOT_REGULAR", path, found, expected="a regular file", hint="save it to disk first")


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


def _what_is_there(path: Path) -> str:
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir())
    except (OSError, ValueError):
        return f"check the path: the folder {path.parent} does not exist either"
    return f"check the path; its folder holds: {', '.join(beside[:5]) or 'nothing'}"


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
