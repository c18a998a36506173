"""Every error the library raises: one base, a stable `code`, and the builtin type that callers would expect."""

from __future__ import annotations

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
]


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
