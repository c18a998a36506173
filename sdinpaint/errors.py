"""Every error the library raises: one base, a stable `code`, and the builtin type that callers would expect."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from sdinpaint_weights.errors import CheckpointError, SdInpaintError, said, shown, shown_lines

__all__ = [
    "AdapterError",
    "Cancelled",
    "CheckpointError",
    "ImageError",
    "MaskError",
    "NumericError",
    "OutOfMemoryError",
    "Remark",
    "SdInpaintError",
    "SdInpaintWarning",
    "SettingError",
    "TokenizerError",
    "already_warned",
    "explaining_memory",
    "keeping_warnings",
    "out_of_memory",
    "said",
    "shown",
    "shown_lines",
    "warn",
]

PASSED = ("sdinpaint", "sdinpaint_weights", "torch", "contextlib")
"""Packages whose lines a warning does not point at; torch's decorators are between, for its gradient modes."""


class ImageError(SdInpaintError, OSError, ValueError):
    """An image that cannot be read or written, or that is not usable."""


class MaskError(SdInpaintError, ValueError):
    """A mask that does not fit its image, or whose meaning is unclear."""


class SettingError(SdInpaintError, ValueError):
    """An argument that is not one of the allowed values."""


class AdapterError(SdInpaintError, ValueError):
    """A LoRA or an embedding that cannot be added to this model; the model stays as it was."""


class TokenizerError(SdInpaintError, OSError, ValueError):
    """No usable vocabulary for the text encoder."""


class NumericError(SdInpaintError, ArithmeticError):
    """A model produced NaN or infinity; no image is made of it."""


class OutOfMemoryError(SdInpaintError, MemoryError):
    """The machine or its GPU has less memory than was asked for."""


class Cancelled(SdInpaintError):
    """A run that a callback has stopped: raise it from `on_step` or `on_event`, and nothing is made of the run."""

    def __init__(self, reason: object = "a callback stopped it") -> None:
        super().__init__("CANCELLED", "run", str(reason))

    def __reduce__(self) -> tuple[object, ...]:
        return Cancelled, (self.found,)


class SdInpaintWarning(UserWarning):
    """Something was done that the caller may not have meant."""


NO_MEMORY = re.compile(
    "out of memory|allocate memory|not enough memory|unable to allocate|_ALLOC_FAILED"
    "|could not create a (?:primitive|memory object)$|failed to map segment"  # oneDNN; shared libraries
    "|can't start new thread",  # there is no memory for its stack
    re.IGNORECASE,
)
ASKED = re.compile(r"allocate ([0-9.]+ (?:bytes|[KMGT]?i?B))", re.IGNORECASE)
FREE = re.compile(r"of which ([0-9.]+ [KMGT]?i?B) is free")
"""The words of torch and numpy for memory that is not there, the amount asked for, and what was free on a GPU."""
LOWER = "take a smaller image or batch_size=1, give tile=512, dtype=float16 or offload=True, or close other programs"


def out_of_memory(error: Exception) -> OutOfMemoryError | None:
    """Explain what Python, numpy and torch raise for want of memory.

    Args:
        error: any error.

    Returns:
        An error that says what was asked for and what to lower; None where the error is another.
    """
    text = str(error)
    told = isinstance(error, RuntimeError | ImportError | OSError) and NO_MEMORY.search(text)
    if not (told or isinstance(error, MemoryError)):
        return None
    asked, free = ASKED.search(text), FREE.search(text)
    found = f"{asked[1]} more cannot be had" if asked else "there is no more memory"
    found += f", {free[1]} are free" if free else ""
    return OutOfMemoryError("OUT_OF_MEMORY", "memory", found, hint=LOWER)


@contextmanager
def explaining_memory() -> Iterator[None]:
    """Raise `OutOfMemoryError` for whatever Python, numpy and torch raise for want of memory."""
    try:
        yield
    except SdInpaintError:
        raise
    except (MemoryError, RuntimeError, ImportError) as error:
        explained = out_of_memory(error)
        if explained is None:
            raise
        error.__traceback__ = None  # its frames hold tensors, and the caller may try again with less
        raise explained from error


@dataclass(frozen=True)
class Remark:
    """A warning, kept as a value.

    Args:
        message: the sentence.
        index: index of the image in its batch that the sentence is about; None where it is about the whole run.
    """

    message: str
    index: int | None = None

    def __str__(self) -> str:
        return self.message


_kept: ContextVar[list[Remark] | None] = ContextVar("kept", default=None)
_said: ContextVar[bool] = ContextVar("said", default=False)


@contextmanager
def keeping_warnings() -> Iterator[list[Remark]]:
    """Keep the warnings of the library until the end of the block, beside showing them as Python does.

    Yields:
        A list that grows with every call of `warn` in this thread.
    """
    kept: list[Remark] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


@contextmanager
def already_warned() -> Iterator[None]:
    """Drop the warnings of the library until the end of the block, because the caller has given them before it."""
    token = _said.set(True)
    try:
        yield
    finally:
        _said.reset(token)


def warn(message: str, index: int | None = None) -> None:
    """Warn whoever called the library: the warning points at that line, and is told at every call.

    Args:
        message: a sentence.
        index: index of the image in its batch that the sentence is about.
    """
    if _said.get():
        return
    message = shown_lines(message)
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PASSED:
        frame = frame.f_back
    if (kept := _kept.get()) is not None:
        kept.append(Remark(message, index))
    # without a registry, in which Python notes what it has shown: one warning per image of a loop, not per line
    name, where = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
    warnings.warn_explicit(message, SdInpaintWarning, where, frame.f_lineno, module=name)
