"""Write a file or a folder whole or not at all, and leave nothing else behind, however the program ends."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from sdinpaint_weights.strays import is_temporary, lock, new_name, sweep, unfinished
from sdinpaint_weights.targets import check_file, check_folder, resolved

__all__ = ["atomic_folder", "atomic_write", "keep_others"]

NO_NAME = getattr(os, "O_TMPFILE", 0)
"""Flag of a file without a name, which is gone when its writer is; 0 where the system has none."""
HERE, EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE. Source: linux/fcntl.h, linux/fs.h"""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing and reading that replaces `path` when the block ends without an error.

    Folders that are missing are made. A link stays, and its target is replaced; permissions stay, too. A killed program
    leaves the old file as it was. What it may leave beside it, where the system has no files without a name, the next
    call removes.

    Args:
        path: the file to replace.

    Yields:
        The open file.

    Raises:
        OSError: the file cannot be written, or what is there is no regular file, or read-only.
    """
    target = resolved(path)
    previous = check_file(target)
    with _folder_of(target), contextlib.ExitStack() as temporaries:
        sweep(target)
        file, temporary = _create(target, temporaries)
        with file:
            yield file
            if previous is not None and hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), stat.S_IMODE(previous.st_mode))
            file.flush()
            os.fsync(file.fileno())
            if temporary is None:
                _name(file, target, temporaries, replaces=previous is not None)
                return
            if os.name != "posix":
                file.close()  # before Windows renames it; elsewhere it is held until it has its name
            os.replace(temporary, target)


def _create(target: Path, temporaries: contextlib.ExitStack) -> tuple[BinaryIO, Path | None]:
    """Open a new file in the folder of a target, if possible one that has no name."""
    if NO_NAME:
        with contextlib.suppress(OSError):  # the file system has none, or the folder is not writable: told below
            file = os.fdopen(os.open(target.parent, NO_NAME | os.O_RDWR, 0o666), "w+b")
            if os.path.exists(_by_handle(file)):
                lock(file.fileno())
                return file, None
            file.close()
    while True:
        temporary = temporaries.enter_context(unfinished(new_name(target)))
        file = temporary.open("x+b")
        if lock(file.fileno()) and temporary.exists():
            return file, temporary
        file.close()  # another process found it before it was locked, and removes it


def _name(file: BinaryIO, target: Path, temporaries: contextlib.ExitStack, *, replaces: bool) -> None:
    """Name a file that has no name yet."""
    source, final = _by_handle(file), os.fspath(target)
    # Python asks for links to be followed if there is a folder's handle, which an absolute path does not need.
    link = functools.partial(os.link, source, src_dir_fd=file.fileno(), follow_symlinks=True)
    if not replaces:
        with contextlib.suppress(FileExistsError):  # another program made one in the meantime
            link(final)
            return
    temporary = os.fspath(temporaries.enter_context(unfinished(new_name(target))))
    link(temporary)  # A link replaces nothing. A program that is killed before the next line leaves it behind.
    os.replace(temporary, final)


def _by_handle(file: BinaryIO) -> str:
    return f"/proc/self/fd/{file.fileno()}"


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make an empty folder to fill, which replaces `path` when the block ends without an error.

    Folders above it that are missing are made. Where the system can, both are exchanged in one step, so that there
    always is a folder of that name; the previous one is removed then. The current folder and a mounted one stay, and
    the new content is exchanged for theirs. What a killed program leaves beside the folder, the next call removes.

    Args:
        path: the folder to replace.

    Yields:
        The folder to fill.

    Raises:
        OSError: the folder cannot be written, or what is there is no folder, or cannot be removed.
    """
    target = resolved(path)
    previous = check_folder(target)
    stays = previous is not None and _must_stay(target)
    beside = target / target.name if stays else target
    with _folder_of(beside), contextlib.ExitStack() as held:
        sweep(beside)
        temporary = _new_folder(beside, held)
        yield temporary
        if previous is not None:
            temporary.chmod(stat.S_IMODE(previous.st_mode))
        _flush_folder(temporary)
        if stays:
            for name in sorted(os.listdir(temporary)):
                _take_place(temporary / name, target / name)
        else:
            _take_place(temporary, target)


def keep_others(target: str | os.PathLike[str], folder: Path) -> None:
    """Link into a new folder those files of the previous one that it does not replace.

    Args:
        target: the previous folder, which need not exist.
        folder: the new folder.

    Raises:
        OSError: a file can neither be linked nor copied.
    """
    for parent, folders, files in os.walk(target):
        folders[:] = [name for name in folders if not is_temporary(name)]
        inside = folder / os.path.relpath(parent, target)
        inside.mkdir(exist_ok=True)
        for name in files:
            if not is_temporary(name) and not os.path.lexists(inside / name):
                try:
                    os.link(os.path.join(parent, name), inside / name, follow_symlinks=False)
                except OSError:
                    shutil.copy2(os.path.join(parent, name), inside / name, follow_symlinks=False)


def _must_stay(folder: Path) -> bool:
    """Tell whether a folder cannot be renamed, or only to the confusion of whoever is in it."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return os.path.ismount(folder)
    return os.path.ismount(folder) or folder in (here, *here.parents)


def _new_folder(target: Path, held: contextlib.ExitStack) -> Path:
    """Make an empty folder beside a target, which is removed at the end if it is still there."""
    while True:
        temporary = held.enter_context(unfinished(new_name(target)))
        temporary.mkdir()
        if _hold(temporary, held) and temporary.exists():
            return temporary


def _hold(folder: Path, held: contextlib.ExitStack) -> bool:
    if os.name != "posix":
        return True  # Windows opens no folder
    handle = os.open(folder, os.O_RDONLY)
    held.callback(os.close, handle)
    return lock(handle)


def _take_place(new: Path, target: Path) -> None:
    """Rename a file or folder to the target's name; the target's becomes the name of what was there before."""
    if not os.path.lexists(target) or not (new.is_dir() or target.is_dir()):
        os.replace(new, target)
    elif not _exchange(new, target):
        with contextlib.ExitStack() as held:
            previous = new_name(target, "old")
            if target.is_dir():
                _hold(target, held)
            os.replace(target, previous)
            try:
                os.replace(new, target)
            except BaseException:
                if not target.exists():
                    os.replace(previous, target)
                raise
            os.replace(previous, new)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False where the system cannot."""
    rename = _renameat2()
    return rename is not None and rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    import ctypes  # noqa: PLC0415 - slow to import, and not needed for files

    return getattr(ctypes.CDLL(None), "renameat2", None)


@contextlib.contextmanager
def _folder_of(target: Path) -> Iterator[None]:
    """Make the folders above a target that are missing; remove them again if the block fails."""
    missing = [*takewhile(lambda folder: not folder.exists(), target.parents)]
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    for folder in (target, *missing):
        _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, where its file system can."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
