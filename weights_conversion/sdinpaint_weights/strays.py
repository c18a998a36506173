"""Temporary files and folders under names of their own, so that abandoned ones are known and removed.

A writer locks its temporary for as long as it lives. Whoever writes beside it later removes what nobody holds, which a
killed program has left behind.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed
    fcntl = None  # type: ignore[assignment]

__all__ = ["discard_unfinished", "is_temporary", "lock", "new_name", "sweep", "unfinished"]

NAME = re.compile(r"\.sdinpaint-(?P<kernel>[0-9a-f]{8})-(?P<target>[0-9a-f]{8})-[0-9a-f]{8}\.(?P<kind>tmp|old)")
"""Matches a temporary ("tmp"), and the previous folder while a new one takes its place ("old")."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
DAY = 86400.0
"""Age in seconds at which a temporary is abandoned where no lock tells: on another machine, or without locks."""
MANY, REST = 10_000, 100
"""A folder of more than MANY files is listed again only after REST times as long as that takes: 1% of the time."""

_unfinished: set[tuple[int, Path]] = set()
"""Process and path of each temporary; a forked process must not remove those of its parent."""
_rested: dict[Path, float] = {}
"""Folder of many files -> time of the clock from which it is swept again."""


def new_name(target: Path, kind: str = "tmp") -> Path:
    """Choose an unused name beside a file or folder, of a length that does not depend on the target's.

    Args:
        target: the file or folder that is to be written.
        kind: "tmp", or "old" for the previous folder.

    Returns:
        The path.
    """
    return target.with_name(f".sdinpaint-{_kernel()}-{_digest(target.name)}-{secrets.token_hex(4)}.{kind}")


def is_temporary(name: str) -> bool:
    """Tell whether a file or folder is a temporary, from its name.

    Args:
        name: the name without its folder.

    Returns:
        True for a name of `new_name`.
    """
    return NAME.fullmatch(name) is not None


def lock(handle: int) -> bool:
    """Hold a temporary until its handle is closed, so that no other process takes it for abandoned.

    Args:
        handle: the open file or folder.

    Returns:
        False where another process holds it.
    """
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without locks, where the age tells
    return True


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Remove a temporary at the end of the block, if it is still there, or when a signal ends the process.

    Args:
        path: the file or folder.

    Yields:
        The path.
    """
    entry = os.getpid(), path
    _unfinished.add(entry)
    try:
        yield path
    finally:
        _remove(path)
        _unfinished.discard(entry)


def discard_unfinished() -> None:
    """Remove the temporaries of this process, which is about to end."""
    for process, path in list(_unfinished):
        if process == os.getpid():
            _remove(path)


def sweep(target: Path) -> None:
    """Remove what killed programs of this user have left beside a file or folder that is about to be written.

    The previous folder of a program that was killed between two renames is put back.

    Args:
        target: the file or folder.
    """
    folder, started = target.parent, time.monotonic()
    if started < _rested.get(folder, 0.0):
        return
    try:
        names = os.listdir(folder)
    except OSError:
        return  # a folder that cannot be listed
    if len(names) > MANY:
        _rested[folder] = started + REST * (time.monotonic() - started)
    for match in filter(None, map(NAME.fullmatch, names)):
        path = folder / match[0]
        if not _is_abandoned(path, match["kernel"]):
            continue
        if match["kind"] == "tmp" or (match["target"] == _digest(target.name) and target.exists()):
            _remove(path)
        elif match["target"] == _digest(target.name):
            with contextlib.suppress(OSError):
                os.replace(path, target)


def _is_abandoned(path: Path, kernel: str) -> bool:
    """Tell whether a temporary is this user's, and nobody writes it."""
    try:
        status = os.lstat(path)
        if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            return False
        if fcntl is None or kernel != _kernel():
            return time.time() - status.st_mtime > DAY
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return time.time() - status.st_mtime > DAY
        finally:
            os.close(handle)
    except OSError:
        return False  # it is gone, or it cannot be opened
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@functools.cache
def _kernel() -> str:
    """Return a name of the running kernel, which is how far its locks reach."""
    try:
        name = BOOT.read_text(encoding="ascii")
    except OSError:
        import platform  # noqa: PLC0415 - slow to import, and not needed on Linux

        name = platform.node()
    return _digest(name)


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
