"""What is checked of values that people give, and of the libraries that are installed as extras."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np

from sdinpaint.errors import SettingError

__all__ = ["DTYPES", "as_list", "check_name", "check_prompt", "dtype_name", "need", "number", "quietly"]
__all__ += ["require_number", "require_whole", "switch", "whole_number"]


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


DTYPES = {"float32": ("fp32", "single"), "float16": ("fp16", "half"), "bfloat16": ("bf16",)}
"""The dtypes that models compute and are written in, by torch's name, with the other names that they go by."""


def dtype_name(dtype: object) -> str:
    """Translate a dtype, torch's or any of its names, to torch's name for it.

    Args:
        dtype: a name, such as "float16", "fp16" or "half", or a `torch.dtype`.

    Returns: a key of `DTYPES`.

    Raises: SettingError that lists the names.
    """
    said = str(dtype).removeprefix("torch.").lower()
    for name, others in DTYPES.items():
        if said in (name, *others):
            return name
    close = difflib.get_close_matches(said, [name for row in DTYPES.items() for name in (row[0], *row[1])], n=1)
    hint = f"did you mean {close[0]!r}?" if close else "fp32, fp16, half and bf16 name them too"
    raise SettingError("SETTING_DTYPE", "dtype", f"{dtype!r}", expected="float32, float16 or bfloat16", hint=hint)


def check_name(code: str, subject: str, name: object, names: Iterable[str]) -> None:
    """Refuse a name that is none of `names`. Raises: SettingError that lists them, with the closest one."""
    known = list(names)
    if not isinstance(name, str) or name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else ""
        raise SettingError(code, subject, f"{name!r}", expected="one of " + ", ".join(known), hint=hint)


def require_number(subject: str, name: str, value: Any, low: float = 0, high: float = math.inf) -> float:
    """A finite number from `low` to `high`. Raises: SettingError naming `subject`, a verb, and its argument."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool | np.bool_) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        expected = f"a number of at least {low:g}" if math.isinf(high) else f"a number from {low:g} to {high:g}"
        raise SettingError(f"SETTING_{name.upper()}", f"{subject}: {name}", f"{value!r}", expected=expected)
    return number


def require_whole(subject: str, name: str, value: Any, low: int, high: float = math.inf) -> int:
    """A whole number from `low` to `high`. Raises: SettingError naming `subject`, a verb, and its argument."""
    number = require_number(subject, name, value, low, high)
    if number != int(number):
        raise SettingError(f"SETTING_{name.upper()}", f"{subject}: {name}", f"{value!r}", expected="a whole number")
    return int(number)


def check_prompt(name: str, prompt: Any) -> str:
    """A prompt; None is the empty one. Raises: SettingError."""
    if prompt is None:
        return ""
    if not isinstance(prompt, str):
        raise SettingError("SETTING_PROMPT", name, f"a {type(prompt).__name__}", expected="a string")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        found = f"character {error.start} is the lone surrogate U+{ord(prompt[error.start]):04X}"
        expected, hint = "valid Unicode text", "remove that character"
        raise SettingError("SETTING_PROMPT", name, found, expected=expected, hint=hint) from error
    return prompt


def as_list(value: Any) -> list[Any]:
    """A list or tuple as a list; anything else as the list of that one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in these bounds, of any type. Raises: SettingError that names it."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= value <= high or value != int(value):
        expected = f"a whole number from {low} to {high}"
        raise SettingError(f"SETTING_{name.upper()}", name, f"{value!r}", expected=expected)
    return int(value)


def switch(name: str, value: Any) -> bool:
    """True or False, also of numpy. Raises: SettingError that names it."""
    if not isinstance(value, bool | np.bool_):
        raise SettingError(f"SETTING_{name.upper()}", name, f"{value!r}", expected="True or False")
    return bool(value)


def number(name: str, value: Any, low: float, high: float) -> float:
    """Check that a setting is a finite number from `low` to `high`. Raises: SettingError that names it."""
    bounds = "a finite number" if math.isinf(low) else f"a number from {low:g} to {high:g}"
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        code = "SETTING_GUIDANCE" if name == "guidance_scale" else f"SETTING_{name.upper()}"
        raise SettingError(code, name, f"{value!r}", expected=bounds)
    return number
