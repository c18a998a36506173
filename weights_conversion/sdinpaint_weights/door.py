"""The one door for files from outside: regular files alone, and a bound on what is read whole."""

from __future__ import annotations

import errno
import functools
import io
import os
import stat
from pathlib import Path
from typing import Literal

__all__ = ["Reason", "Refusal", "open_regular", "read_whole"]

Reason = Literal["missing", "folder", "special", "unreadable", "large"]
VIRTUAL = ("/proc", "/sys")
"""File systems whose files are made while they are read: some of them never end, and some wait for an event."""

NOT_A_FILE: tuple[Reason, str, str] = ("special", "a pipe, socket or device", "save its content as a file first")
NO_FILE: tuple[Reason, str, str] = ("missing", "no such file", "check the path")
BY_ERRNO: dict[int | None, tuple[Reason, str, str]] = {
    errno.ELOOP: ("special", "a link that leads back to itself", "give the path of the file itself"),
    errno.ENAMETOOLONG: ("missing", "a path longer than the system allows", "check the path"),
    errno.ENOENT: NO_FILE,
    errno.ENOTDIR: NO_FILE,
    errno.EACCES: ("unreadable", "no permission to read it", "check its permissions"),
    errno.EPERM: ("unreadable", "no permission to read it", "check its permissions"),
    errno.ENXIO: NOT_A_FILE,
    errno.ENODEV: NOT_A_FILE,
    errno.EOPNOTSUPP: NOT_A_FILE,
}


class Refusal(Exception):
    """A path that is not read; callers tell it as an error of their own kind.

    Args:
        reason: one word for a program.
        found: what is there, for a person.
        hint: what to do about it.
    """

    def __init__(self, reason: Reason, found: str, hint: str = "") -> None:
        super().__init__(found)
        self.reason, self.found, self.hint = reason, found, hint


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file for reading; nothing else is opened, so that nothing waits for a pipe or a device.

    Args:
        path: the file, or a link to it; ~ at its beginning is a home folder.

    Returns:
        The open file.

    Raises:
        Refusal: the path is no regular file, or cannot be read.
    """
    path = os.path.expanduser(path)
    try:
        _require_regular(path, os.stat(path))
        # between the two calls the path may become a pipe, which would wait for its other end
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise _refusal(path, error) from error
    file = io.FileIO(handle, "rb")
    try:
        _require_regular(path, os.fstat(handle))
    except Refusal:
        file.close()
        raise
    return file


def read_whole(path: str | os.PathLike[str], at_most: int) -> bytes:
    """Read all bytes of a regular file.

    Args:
        path: the file, or a link to it.
        at_most: the largest size in bytes that is read.

    Returns:
        The bytes.

    Raises:
        Refusal: the path is no regular file, cannot be read, or is larger.
    """
    with open_regular(path) as file:
        try:
            parts, size = [], 0
            while part := file.read(min(1 << 20, at_most + 1 - size)):  # the size that the system states may change
                parts.append(part)
                size += len(part)
                if size > at_most:
                    raise Refusal("large", f"more than {at_most} bytes")
        except OSError as error:
            raise _refusal(path, error) from error
    return b"".join(parts)


def _require_regular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise Refusal("folder", "a folder", "give the path of one file")
    if not stat.S_ISREG(status.st_mode):
        raise Refusal(*NOT_A_FILE)
    if status.st_dev in _virtual_systems():
        raise Refusal("special", f"a file of the system, under {_top(path)}", "save its content as a file first")


def _refusal(path: str | os.PathLike[str], error: OSError | ValueError) -> Refusal:
    """Explain an error of the system."""
    if isinstance(error, OSError):
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and os.path.islink(path):
            return Refusal("missing", "a link whose target does not exist", "repair the link, or fetch the file again")
        found = error.strerror or type(error).__name__
        unknown = Refusal("unreadable", found, "check the disk or the network mount, then try again")
        return Refusal(*BY_ERRNO[error.errno]) if error.errno in BY_ERRNO else unknown
    character = "characters that no file name has" if isinstance(error, UnicodeEncodeError) else "a NUL character"
    return Refusal("missing", f"a path with {character}", "check the path")


@functools.cache
def _virtual_systems() -> frozenset[int]:
    return frozenset(os.stat(place).st_dev for place in VIRTUAL if os.path.isdir(place))


def _top(path: str | os.PathLike[str]) -> str:
    return "/" + Path(os.path.realpath(path)).parts[1]
