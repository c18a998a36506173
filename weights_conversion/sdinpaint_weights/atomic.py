"""Write files and folders atomically: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file under a temporary name, and let it replace `path` when the block ends without an error.

    A killed program leaves the old file unchanged, and at worst a stray `.<name>.<random>.tmp`.

    Args:
        path: the file to write.

    Yields:
        A path in the same folder to write to.

    Raises:
        OSError: the system does not permit writing.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that only their owner may read
        _flush_to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        _flush_to_disk(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder under a temporary name, and let it replace `path` when the block ends without an error.

    The old folder is removed only then. A killed program leaves at worst a stray `.<name>.<random>.tmp`, and between
    two renames the old folder as `.<name>.<random>.old`.

    Args:
        path: the folder to write.

    Yields:
        An empty folder beside `path` to fill.

    Raises:
        OSError: the system does not permit writing.
    """
    target = Path(os.path.realpath(path))
    beside = f".{target.name}.{secrets.token_hex(4)}"
    temporary, old = target.with_name(f"{beside}.tmp"), target.with_name(f"{beside}.old")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    if os.name == "posix":
        _flush_to_disk(target.parent)


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
