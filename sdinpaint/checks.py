"""Validators for the values that callers give, and for the libraries that extras install."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdinpaint.errors import SettingError, said

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "as_list", "axes_of", "check_call", "check_choice", "check_number", "check_path", "check_prompt"]
__all__ += ["check_switch", "check_tensor", "check_whole", "dtype_name", "find_device", "quietly"]
__all__ += ["require_extra"]

MAX_PROMPT = 100_000
"""Characters of a prompt at most; ten thousand words, which take a quarter of a second."""


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


NO_DEVICE = {
    "device string": "",
    "Device string": "",
    "CUDA enabled": ": this torch is built without CUDA",
    "Could not run": ": this torch is built without it",
    "not compiled with": ": this torch is built without it",
    "No module named": ": this torch is built without it",
    "meta tensor": ": tensors there have no values",
}
"""Part of an error of torch -> the reason for which a device cannot be used, after its name."""
MAX_PATH, MAX_PART = 4096, 255
"""Bytes of a path, and of a name in it, at most: those of Linux, which are not less elsewhere but on Windows."""
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
    word = said(dtype).strip("'").removeprefix("torch.").lower()
    for name, others in DTYPES.items():
        if word in (name, *others):
            return name
    close = difflib.get_close_matches(word, [name for row in DTYPES.items() for name in (row[0], *row[1])], n=1)
    hint = f"did you mean {close[0]!r}?" if close else "fp32, fp16, half and bf16 name them too"
    raise SettingError("SETTING_DTYPE", "dtype", said(dtype), expected="float32, float16 or bfloat16", hint=hint)


def find_device(device: object = None) -> torch.device:
    """Find a device that can compute here.

    Args:
        device: a `torch.device` or its name, such as "cpu" or "cuda:1"; None for the GPU where there is one.

    Returns:
        The device.

    Raises:
        SettingError: there is no such device, or nothing can be stored on it.
    """
    import torch  # noqa: PLC0415 - takes seconds, and other checks need not wait for it

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = "'cpu', 'cuda' or 'cuda:1'"
    try:
        if not isinstance(device, str | torch.device):
            raise TypeError(f"a {type(device).__name__}")
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()  # of some, torch knows the name and has no part of it
    except Exception as error:  # whatever a device's own library raises
        name, reason = said(device if isinstance(device, str) else str(device)), str(error).partition(". ")[0]
        why = next((words for part, words in NO_DEVICE.items() if part in reason), f": {reason or 'unknown'}")
        hint = "leave it out to take the GPU where there is one, or give device='cpu'"
        raise SettingError("SETTING_DEVICE", "device", f"{name}{why}", expected=expected, hint=hint) from error
    return found


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
        close = difflib.get_close_matches(said(value), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else ""
        expected = "one of " + ", ".join(known)
        code = code or f"SETTING_{name.upper()}"
        raise SettingError(code, _subject(name, of), said(value), expected=expected, hint=hint)
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
    value = _plain(value)
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool | np.bool_) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        code, expected = code or f"SETTING_{name.upper()}", f"a {_bounds('number', low, high)}"
        raise SettingError(code, _subject(name, of), said(value), expected=expected)
    return number


def check_whole(name: str, value: Any, low: int, high: float = math.inf, *, code: str = "", of: str = "") -> int:
    """Check that an argument is a whole number from `low` to `high`, both included, of any type.

    Args:
        name: name of the argument.
        value: what was given; 3.0 is a whole number, and a bool is none.
        low: lowest value.
        high: highest value.
        code: code of the error; by default SETTING_ and the argument's name.
        of: name of the function whose argument it is, where the argument's name alone would not tell.

    Returns:
        The value as an int.

    Raises:
        SettingError: it names the argument and the bounds.
    """
    value = _plain(value)
    is_number = isinstance(value, Real) and not isinstance(value, bool | np.bool_)
    if not is_number or not low <= value <= min(high, sys.maxsize) or value != int(value):
        expected = f"a {_bounds('whole number', low, high)}"
        raise SettingError(code or f"SETTING_{name.upper()}", _subject(name, of), said(value), expected=expected)
    return int(value)


def check_call(name: str, value: Any) -> Any:
    """Check that an argument can be called.

    Args:
        name: name of the argument.
        value: what was given; None is no function.

    Returns:
        The value.

    Raises:
        SettingError: it names the argument.
    """
    if value is not None and not callable(value):
        raise SettingError(f"SETTING_{name.upper()}", name, f"a {type(value).__name__}", expected="a function, or None")
    return value


def check_tensor(name: str, value: Any, axes: str, *, finite: bool = False, code: str = "", hint: str = "") -> Any:
    """Check that an argument is a dense tensor of floating-point numbers.

    Args:
        name: name of the argument.
        value: what was given.
        axes: names of its axes for people, such as "(B, 4, H, W)"; a number in it is the size of that axis.
        finite: whether every value must be finite in float32.
        code: code of the error; by default SETTING_ and the argument's name.
        hint: hint of the error.

    Returns:
        The tensor.

    Raises:
        SettingError: it names the argument, its type and its shape.
    """
    import torch  # noqa: PLC0415 - takes seconds, and other checks need not wait for it

    code = code or f"SETTING_{name.upper()}"
    expected = f"a dense tensor {axes} of {'finite ' * finite}floating-point numbers, 16 bits or more"
    if not isinstance(value, torch.Tensor) or value.is_nested:  # which has no shape
        kind = "nested tensor" if isinstance(value, torch.Tensor) else type(value).__name__
        raise SettingError(code, name, f"a {kind}", expected=expected, hint=hint)
    sizes = [int(size) if size.isdigit() else None for size in axes.strip("()").split(", ")]
    fits = value.ndim == len(sizes) and all(
        size in (None, found) for size, found in zip(sizes, value.shape, strict=True)
    )
    dense = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    floats = value.is_floating_point() and value.dtype.itemsize > 1  # nothing can be computed in less
    if not fits or not dense or not floats or not value.numel():
        kind = f"dtype {value.dtype}, layout {value.layout}, on {value.device}"
        raise SettingError(code, name, f"shape {tuple(value.shape)}, {kind}", expected=expected, hint=hint)
    if finite and (bad := int((~value.detach().float().isfinite()).sum())):
        found = f"{bad} of {value.numel()} values are NaN or infinite in float32"
        raise SettingError(code, name, found, expected=expected, hint=hint)
    return value


def axes_of(tensor: torch.Tensor) -> str:
    """Write the shape of a tensor as `check_tensor` takes it, to ask for another one of that shape.

    Args:
        tensor: the tensor, of one axis or more.

    Returns:
        The sizes, such as "(1, 4, 64, 64)".
    """
    return f"({', '.join(map(str, tensor.shape))})"


def check_path(name: str, value: Any) -> str | Path:
    """Check that an argument can be the path of a file or folder, or a name of the hub.

    Args:
        name: name of the argument.
        value: what was given: a string, or any path-like object.

    Returns:
        The string, or a Path.

    Raises:
        SettingError: it names the argument.
    """
    code, expected = f"SETTING_{name.upper()}", "the path of a file or a folder"
    try:
        path = value if isinstance(value, str) else os.fspath(value)
        encoded = os.fsencode(path) if isinstance(path, str) else b""
    except UnicodeEncodeError:
        encoded = b"\0"
    except Exception as error:  # whatever a class of the caller's does there
        why = f" that gives no path: {type(error).__name__}: {error}" if isinstance(value, os.PathLike) else ""
        raise SettingError(code, name, f"a {type(value).__name__}{why}", expected=expected) from error
    if not encoded:  # "" would be the current folder
        raise SettingError(code, name, said(path), expected=expected)
    if len(encoded) > MAX_PATH or any(len(part) > MAX_PART for part in encoded.split(b"/")):
        found = f"{len(encoded)} bytes, longer than a path can be: {said(path)}"
        raise SettingError(code, name, found, expected=expected)
    if b"\0" in encoded:
        raise SettingError(code, name, f"{said(path)}, a name that no file can have", expected=expected)
    return path if isinstance(value, str) else Path(path)


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
    value = _plain(value)
    if not isinstance(value, bool | np.bool_):
        raise SettingError(f"SETTING_{name.upper()}", name, said(value), expected="True or False")
    return bool(value)


def check_prompt(name: str, prompt: Any) -> str:
    """Check that a prompt is valid text.

    Args:
        name: name of the argument.
        prompt: what was given; None is the empty prompt.

    Returns:
        The prompt.

    Raises:
        SettingError: it is no string, not valid Unicode, or far longer than any model can read.
    """
    if prompt is None:
        return ""
    if not isinstance(prompt, str):
        raise SettingError("SETTING_PROMPT", name, f"a {type(prompt).__name__}", expected="a string")
    if len(prompt) > MAX_PROMPT:
        found, expected = f"a text of {len(prompt)} characters", f"at most {MAX_PROMPT}"
        hint = "a model sees the first 75 tokens, some 300 characters"
        raise SettingError("SETTING_PROMPT", name, found, expected=expected, hint=hint)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        found = f"character {error.start} is the lone surrogate U+{ord(prompt[error.start]):04X}"
        expected, hint = "valid Unicode text", "remove that character"
        raise SettingError("SETTING_PROMPT", name, found, expected=expected, hint=hint) from error
    return prompt


def as_list(value: Any) -> list[Any]:
    """Return a list, a tuple, or an array or tensor with one axis as a list, and anything else as a list of that one.

    Args:
        value: any value.

    Returns:
        A new list.
    """
    if isinstance(value, list | tuple):
        return list(value)
    if getattr(value, "ndim", None) == 1 and hasattr(value, "dtype") and hasattr(value, "tolist"):
        with suppress(RuntimeError):  # a tensor without values
            return list(value.tolist())
    return [value]


def _plain(value: Any) -> Any:
    """Return the number or bool in an array or tensor without axes, and anything else as it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        try:
            return value.item()
        except (RuntimeError, ValueError, TypeError):  # a tensor without numbers
            return value
    return value


def _subject(name: str, of: str) -> str:
    return f"{of}: {name}" if of else name


def _bounds(kind: str, low: float, high: float) -> str:
    if math.isinf(low):
        return f"finite {kind}"
    if math.isinf(high):
        return f"{kind} of at least {low:g}"
    shown = (str(bound) if isinstance(bound, int) else f"{bound:.16g}" for bound in (low, high))
    return f"{kind} from {' to '.join(shown)}"
