"""Write a file or a folder whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    A killed program leaves the old file as it was, and at worst a stray `.<name>.<random>.tmp`.

    Raises: OSError, as writing does.
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
    """An empty folder beside `path` to fill; it takes the place of `path` when the block ends without an error.

    What was there before is removed only then. A killed program leaves at worst a stray `.<name>.<random>.tmp`, and
    between two renames the old folder as `.<name>.<random>.old`.

    Raises: OSError, as writing does.
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
