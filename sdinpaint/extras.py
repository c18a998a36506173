"""Libraries that only some functions need, which are installed as extras."""

from __future__ import annotations

import importlib
from typing import Any

from sdinpaint.errors import SettingError

__all__ = ["need"]


def need(module: str, *, extra: str, what: str) -> Any:
    """The module of that name, for `what`. Raises: SettingError that says how to install `extra`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        found = f"needs {missing.partition('.')[0]}, which cannot be imported ({error})"
        hint = f"pip install 'sdinpaint[{extra}]'"
        raise SettingError("SETTING_EXTRA", what, found, hint=hint) from error
