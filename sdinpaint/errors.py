"""Every error the library raises: one base, a stable `code`, and the builtin type that callers would expect."""

from __future__ import annotations

import sys
import warnings

from sdinpaint_weights.errors import CheckpointError, SdInpaintError

__all__ = [
    "CheckpointError",
    "ImageError",
    "MaskError",
    "NumericError",
    "SdInpaintError",
    "SdInpaintWarning",
    "SettingError",
    "TokenizerError",
    "warn",
]

PASSED = ("sdinpaint", "sdinpaint_weights", "torch")
"""Packages whose lines a warning does not point at; torch's are between, for its inference mode."""


class ImageError(SdInpaintError, OSError, ValueError):
    """A picture that cannot be read or written, or that is not a usable picture."""


class MaskError(SdInpaintError, ValueError):
    """A mask that does not fit its picture or whose meaning is unclear."""


class SettingError(SdInpaintError, ValueError):
    """An argument outside of what it may be."""


class TokenizerError(SdInpaintError, OSError, ValueError):
    """No usable vocabulary for the text encoder."""


class NumericError(SdInpaintError, ArithmeticError):
    """A model produced NaN or infinity; no picture is made of it."""


class SdInpaintWarning(UserWarning):
    """Something was done that the caller may not have meant."""


def warn(message: str) -> None:
    """Warn whoever called the library: the warning points at that line."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SdInpaintWarning, stacklevel=level)
