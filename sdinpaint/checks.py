"""Validators for the values that callers give, and for the libraries that extras install."""

from __future__ import annotations

import difflib
import importlib
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np

from sdinpaint.errors import SettingError

__all__ = ["DTYPES", "as_list", "check_choice", "check_number", "check_prompt", "check_switch", "check_whole"]
__all__ += ["dtype_name", "quietly", "require_extra"]


def require_extra(module: str, *, extra: str, what: str) -> Any:
    """Import a module that an extra installs.

    Args:
        module: name of the module.
        extra: name of the extra.
        what: what needs the module, which the error names.

    Returns:
        The module.

    Raises:
        SettingError: it cannot be imported; the hint says how to install the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        found = f"needs {missing.partition('.')[0]}, which cannot be imported ({error})"
        hint = f"pip install 'sdinpaint[{extra}]'"
        raise SettingError("SETTING_EXTRA", what, found, hint=hint) from error


@contextmanager
def quietly(*libraries: Any) -> Iterator[None]:
    """Silence diffusers or transformers until the end of the block, their progress bars too.

    Args:
        libraries: the imported modules.
    """
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

    Returns:
        A key of `DTYPES`.

    Raises:
        SettingError: it lists the names.
    """
    said = str(dtype).removeprefix("torch.").lower()
    for name, others in DTYPES.items():
        if said in (name, *others):
            return name
    close = difflib.get_close_matches(said, [name for row in DTYPES.items() for name in (row[0], *row[1])], n=1)
    hint = f"did you mean {close[0]!r}?" if close else "fp32, fp16, half and bf16 name them too"
    raise SettingError("SETTING_DTYPE", "dtype", f"{dtype!r}", expected="float32, float16 or bfloat16", hint=hint)


def check_choice(name: str, value: Any, choices: Iterable[str], *, code: str = "", of: str = "") -> str:
    """Check that an argument is one of some words.

    Args:
        name: name of the argument.
        value: what was given.
        choices: the words.
        code: code of the error; by default SETTING_ and the argument's name.
        of: name of the function whose argument it is, where the argument's name alone would not tell.

    Returns:
        The value.

    Raises:
        SettingError: it lists the words, and suggests the closest one.
    """
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else ""
        expected = "one of " + ", ".join(known)
        code = code or f"SETTING_{name.upper()}"
        raise SettingError(code, _subject(name, of), f"{value!r}", expected=expected, hint=hint)
    return value


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, code: str = "", of: str = ""
) -> float:
    """Check that an argument is a finite number from `low` to `high`, both included.

    Args:
        name: name of the argument.
        value: what was given; a bool is no number.
        low: lowest value.
        high: highest value.
        code: code of the error; by default SETTING_ and the argument's name.
        of: name of the function whose argument it is, where the argument's name alone would not tell.

    Returns:
        The value as a float.

    Raises:
        SettingError: it names the argument and the bounds.
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool | np.bool_) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        code, expected = code or f"SETTING_{name.upper()}", f"a {_bounds('number', low, high)}"
        raise SettingError(code, _subject(name, of), f"{value!r}", expected=expected)
    return number


def check_whole(name: str, value: Any, low: int, high: float = math.inf, *, of: str = "") -> int:
    """Check that an argument is a whole number from `low` to `high`, both included, of any type.

    Args:
        name: name of the argument.
        value: what was given; 3.0 is a whole number, and a bool is none.
        low: lowest value.
        high: highest value.
        of: name of the function whose argument it is, where the argument's name alone would not tell.

    Returns:
        The value as an int.

    Raises:
        SettingError: it names the argument and the bounds.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool | np.bool_)
    if not is_number or not low <= value <= min(high, sys.maxsize) or value != int(value):
        expected = f"a {_bounds('whole number', low, high)}"
        raise SettingError(f"SETTING_{name.upper()}", _subject(name, of), f"{value!r}", expected=expected)
    return int(value)


def check_switch(name: str, value: Any) -> bool:
    """Check that an argument is True or False, also numpy's.

    Args:
        name: name of the argument.
        value: what was given.

    Returns:
        The value as a bool.

    Raises:
        SettingError: it names the argument.
    """
    if not isinstance(value, bool | np.bool_):
        raise SettingError(f"SETTING_{name.upper()}", name, f"{value!r}", expected="True or False")
    return bool(value)


def check_prompt(name: str, prompt: Any) -> str:
    """Check that a prompt is valid text.

    Args:
        name: name of the argument.
        prompt: what was given; None is the empty prompt.

    Returns:
        The prompt.

    Raises:
        SettingError: it is no string, or not valid Unicode.
    """
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
    """Return a list or tuple as a list, and anything else as a list of that one.

    Args:
        value: any value.

    Returns:
        A new list.
    """
    return list(value) if isinstance(value, list | tuple) else [value]


def _subject(name: str, of: str) -> str:
    return f"{of}: {name}" if of else name


def _bounds(kind: str, low: float, high: float) -> str:
    if math.isinf(low):
        return f"finite {kind}"
    if math.isinf(high):
        return f"{kind} of at least {low:g}"
    shown = (str(bound) if isinstance(bound, int) else f"{bound:.16g}" for bound in (low, high))
    return f"{kind} from {' to '.join(shown)}"
