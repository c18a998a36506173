"""Exif data as raw entries: what a camera wrote keeps its own types and bytes, and is written again as it was."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, TypeAlias

__all__ = ["DESCRIPTION", "EXIF", "ORIENTATION", "STORAGE", "USER_COMMENT", "Entry", "Exif", "Ifd", "Order"]
__all__ += ["ifd_bytes", "long", "parse", "rational", "short", "text", "undefined"]

Order = Literal["<", ">"]
Ifd: TypeAlias = "dict[int, Entry | Ifd]"
"""An image file directory: tag -> its entry, or the directory that it points to."""

EXIF, GPS, INTEROP = 0x8769, 0x8825, 0xA005
POINTERS: dict[int, tuple[int, ...]] = {0: (EXIF, GPS), EXIF: (INTEROP,), GPS: (), INTEROP: ()}
"""Directory by the tag that points to it, 0 for the first -> the tags that point further. Thumbnails are in another
chain, which is not followed: they show the image before."""
DESCRIPTION, ORIENTATION, USER_COMMENT = 0x010E, 0x0112, 0x9286

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED = 1, 2, 3, 4, 5, 7
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Type of an entry -> bytes of one value. Source: TIFF 6.0, section 2."""
STORAGE = frozenset(
    {0x00FE, 0x00FF, 0x0100, 0x0101, 0x0102, 0x0103, 0x0106, 0x0107, 0x0108, 0x0109, 0x010A, 0x0111, ORIENTATION}
    | {0x0115, 0x0116, 0x0117, 0x0118, 0x0119, 0x011A, 0x011B, 0x011C, 0x0120, 0x0121, 0x0122, 0x0123, 0x0124, 0x0125}
    | {0x0128, 0x012D, 0x013D, 0x013E, 0x013F, 0x0140, 0x0141, 0x0142, 0x0143, 0x0144, 0x0145, 0x014A, 0x014C, 0x0150}
    | {0x0151, 0x0152, 0x0153, 0x0154, 0x0155, 0x0156, 0x015B, 0x0200, 0x0201, 0x0202, 0x0211, 0x0212, 0x0213, 0x0214}
    | {0x02BC, 0x8649, 0x8773}
)
"""Tags of the first directory that say how a file stores its pixels: every file has its own. Orientation is applied;
resolution, colour profile (0x8773) and XMP (0x02BC) are carried apart. Source: TIFF 6.0; Exif 2.32, table 4."""
MAX_BYTES = 1 << 20
"""Bytes of values that are kept of one file."""
PREFIX = b"Exif\0\0"


@dataclass(frozen=True)
class Entry:
    """The values of one tag.

    Args:
        kind: type of the values by TIFF's number.
        count: number of values.
        value: the values, in the byte order of their block.
    """

    kind: int
    count: int
    value: bytes


@dataclass
class Exif:
    """A block of Exif data.

    Args:
        order: byte order of all values, "<" or ">" as in `struct`.
        ifd: the first directory, with those of the camera and of its position.
        whole: whether every entry could be read.
    """

    order: Order = ">"
    ifd: Ifd = field(default_factory=dict)
    whole: bool = True

    def part(self, tag: int) -> Ifd:
        """Return the directory that a tag of the first one points to, and make it if there is none.

        Args:
            tag: the tag.

        Returns:
            The directory itself, which may be changed.
        """
        part = self.ifd.get(tag)
        if not isinstance(part, dict):
            part = self.ifd[tag] = {}
        return part

    def copy(self) -> Exif:
        """Return an equal block, whose directories may be changed.

        Returns:
            The copy.
        """
        return Exif(self.order, _copied(self.ifd), self.whole)

    def text(self, tag: int) -> str | None:
        """Return the text of a tag of the first directory.

        Args:
            tag: the tag.

        Returns:
            The text; None where there is none.
        """
        entry = self.ifd.get(tag)
        if not isinstance(entry, Entry) or entry.kind not in (BYTE, ASCII, UNDEFINED):
            return None
        return entry.value.split(b"\0")[0].decode("utf-8", "replace")

    def to_bytes(self) -> bytes:
        """Encode the block as image files hold it.

        Returns:
            The bytes, after the prefix that JPEG files need; empty where there is no entry.
        """
        mark = b"II" if self.order == "<" else b"MM"
        header = mark + struct.pack(self.order + "HI", 42, 8)
        return PREFIX + header + ifd_bytes(self.ifd, self.order, 8) if self.ifd else b""


def text(value: str) -> Entry:
    """Make an entry of a text.

    Args:
        value: the text.

    Returns:
        The entry, in UTF-8 where ASCII does not suffice, as most programs write and read it.
    """
    data = value.encode("utf-8", "replace") + b"\0"
    return Entry(ASCII, len(data), data)


def undefined(value: bytes) -> Entry:
    """Make an entry of bytes.

    Args:
        value: the bytes.

    Returns:
        The entry.
    """
    return Entry(UNDEFINED, len(value), value)


def short(order: Order, *values: int) -> Entry:
    """Make an entry of whole numbers below 2**16.

    Args:
        order: byte order of the block.
        values: the numbers.

    Returns:
        The entry.
    """
    return Entry(SHORT, len(values), struct.pack(f"{order}{len(values)}H", *values))


def long(order: Order, *values: int) -> Entry:
    """Make an entry of whole numbers below 2**32.

    Args:
        order: byte order of the block.
        values: the numbers.

    Returns:
        The entry.
    """
    return Entry(LONG, len(values), struct.pack(f"{order}{len(values)}I", *values))


def rational(order: Order, value: float) -> Entry:
    """Make an entry of a positive fraction, to thousandths.

    Args:
        order: byte order of the block.
        value: the number, below 4 million.

    Returns:
        The entry.
    """
    return Entry(RATIONAL, 1, struct.pack(order + "II", round(1000 * value), 1000))


def parse(source: bytes | BinaryIO) -> Exif:
    """Read a block of Exif data, or the tags of a TIFF file.

    Args:
        source: the block, or the open TIFF file.

    Returns:
        The entries; an entry whose values are not there is left out, and `whole` says so.

    Raises:
        ValueError: it is no such block.
    """
    stream = io.BytesIO(source.removeprefix(PREFIX).removeprefix(PREFIX)) if isinstance(source, bytes) else source
    stream.seek(0)
    header = stream.read(8)
    order: Order = "<" if header[:2] == b"II" else ">"
    if len(header) < 8 or header[:2] not in (b"II", b"MM") or struct.unpack(order + "H", header[2:4]) != (42,):
        raise ValueError(f"no header of Exif data: {header[:8]!r}")
    exif = Exif(order)
    exif.ifd = _Reader(stream, exif).directory(struct.unpack(order + "I", header[4:])[0], 0)
    return exif


class _Reader:
    """Reads the directories of a block, and notes in it what cannot be read."""

    def __init__(self, stream: BinaryIO, exif: Exif) -> None:
        self.stream, self.exif, self.left = stream, exif, MAX_BYTES

    def directory(self, offset: int, pointer: int) -> Ifd:
        number = self._read(offset, 2)
        if number is None:
            self.exif.whole = False
            return {}
        table = self._read(offset + 2, 12 * struct.unpack(self.exif.order + "H", number)[0], at_least=0) or b""
        ifd: Ifd = {}
        for tag, kind, count, value in struct.iter_unpack(self.exif.order + "HHI4s", table[: len(table) // 12 * 12]):
            at = struct.unpack(self.exif.order + "I", value)[0]
            if tag in POINTERS[pointer]:
                ifd[tag] = self.directory(at, tag)
            elif pointer == 0 and tag in STORAGE:
                continue
            elif (entry := self._entry(kind, count, value, at)) is not None:
                ifd[tag] = entry
            else:
                self.exif.whole = False
        return ifd

    def _entry(self, kind: int, count: int, value: bytes, at: int) -> Entry | None:
        size = SIZES.get(kind, 0) * count
        data = value[:size] if size <= len(value) else self._read(at, size)
        return None if not size or data is None else Entry(kind, count, data)

    def _read(self, offset: int, size: int, at_least: int | None = None) -> bytes | None:
        """Return bytes of the block; None where it ends before all of them, or before `at_least` of them."""
        if size > self.left:
            return None
        self.stream.seek(offset)
        data = self.stream.read(size)
        self.exif.whole &= len(data) == size
        self.left -= len(data)
        return None if len(data) < (size if at_least is None else at_least) else data


def ifd_bytes(ifd: Ifd, order: Order, offset: int) -> bytes:
    """Encode a directory with its values and the directories that it points to.

    Args:
        ifd: the directory.
        order: byte order of its values.
        offset: position of the directory in its block.

    Returns:
        The bytes.
    """
    after = offset + 2 + 12 * len(ifd) + 4
    table, values = b"", b""
    for tag, entry in sorted(ifd.items()):
        at = after + len(values)
        if isinstance(entry, dict):
            kind, count, stored = LONG, 1, struct.pack(order + "I", at)
            values += ifd_bytes(entry, order, at)
        elif len(entry.value) <= 4:
            kind, count, stored = entry.kind, entry.count, entry.value.ljust(4, b"\0")
        else:
            kind, count, stored = entry.kind, entry.count, struct.pack(order + "I", at)
            values += entry.value + b"\0" * (len(entry.value) % 2)  # directories and values begin at even positions
        table += struct.pack(order + "HHI", tag, kind, count) + stored
    return struct.pack(order + "H", len(ifd)) + table + bytes(4) + values


def _copied(ifd: Ifd) -> Ifd:
    return {tag: _copied(entry) if isinstance(entry, dict) else entry for tag, entry in ifd.items()}
