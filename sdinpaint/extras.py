"""Libraries that only some functions need, which are installed as extras."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdinpaint.errors import SettingError

__all__ = ["need", "quietly"]


def need(module: str, *, extra: str, what: str) -> Any:
    """The module of that name, for `what`. Raises: SettingError that says how to install `extra`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        found = f"needs {missing.partition('.')[0]}, which cannot be imported ({error})"
        hint = f"pip install 'sdinpaint[{extra}]'"
        raise SettingError("SETTING_EXTRA", what, found, hint=hint) from error


@contextmanager
def quietly(*libraries: Any) -> Iterator[None]:
    """Let diffusers or transformers show nothing meanwhile; then all is as before, the hub's bars too."""
    logs = [library.utils.logging for library in libraries]
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity(log.CRITICAL)
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level, bars in before:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()
