"""Checks of places that are written: that they can be, and that nothing there is being read."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_file", "check_folder", "check_writable", "nearest_folder", "overlap", "resolved"]

Identity = tuple[int, int]
"""Device and inode, which are the same under all names of a file or folder."""


def resolved(path: str | os.PathLike[str]) -> Path:
    """Follow all links of a path, also where there is nothing yet.

    Args:
        path: a file or folder; ~ at its beginning is a home folder.

    Returns:
        The absolute path.

    Raises:
        OSError: no file can have that name.
    """
    try:
        return Path(os.path.realpath(os.path.expanduser(path)))
    except ValueError as error:  # a NUL or a character that no file name has
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error


def check_file(path: Path) -> os.stat_result | None:
    """Check that a path may be replaced by a new file.

    Args:
        path: the file.

    Returns:
        What the system says of the file that is there; None if there is none.

    Raises:
        OSError: it is a folder, no regular file, or read-only, or no file can have that name.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder of that name exists", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device of that name exists", str(path))
    _require_write_permission(path, status)
    return status


def check_folder(path: Path) -> os.stat_result | None:
    """Check that a path may be replaced by a new folder, and that the one that is there can be removed.

    Args:
        path: the folder.

    Returns:
        What the system says of the folder that is there; None if there is none.

    Raises:
        OSError: it is no folder, or a folder in it is read-only, or no folder can have that name.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "a file of that name exists", str(path))
    for folder, _, _ in os.walk(path):
        _require_write_permission(Path(folder), os.stat(folder))
    return status


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check, without leaving anything behind, that a file can be written; its folder need not exist yet.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be written, for the reason that writing would give.
    """
    target = resolved(path)
    check_file(target)
    folder = nearest_folder(target)
    if hasattr(os, "pathconf"):
        limit = os.pathconf(folder, "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > limit for part in target.relative_to(folder).parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(target))
    with tempfile.TemporaryFile(dir=folder):
        pass


def nearest_folder(path: Path) -> Path:
    """Return the nearest of the folders above a path that exists.

    Args:
        path: a file or folder.

    Returns:
        The folder.
    """
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def overlap(target: str | os.PathLike[str], source: str | os.PathLike[str]) -> bool:
    """Tell whether writing one place could change what is read from another.

    Args:
        target: the file or folder to write, which need not exist.
        source: the file or folder that is read.

    Returns:
        True if they are the same under whatever names, if one lies in the other, and if a file of theirs is the same.
    """
    there, here = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if _identity(here) is None:
        return False
    if _identity(here) in map(_identity, there.parents) or _identity(there) in map(_identity, here.parents):
        return True
    return not {*_identities(there)}.isdisjoint(_identities(here))


def _identities(path: Path) -> Iterator[Identity]:
    """Yield the identity of a file, or of a folder and of all that is in it."""
    inside = (Path(folder, name) for folder, folders, files in os.walk(path) for name in (*folders, *files))
    for one in itertools.chain([path], inside):
        if (identity := _identity(one)) is not None:
            yield identity


def _identity(path: Path) -> Identity | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _require_write_permission(path: Path, status: os.stat_result) -> None:
    """Refuse what is marked read-only, also to those whom the system lets write everywhere."""
    if not status.st_mode & 0o222 or not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "read-only", str(path))
