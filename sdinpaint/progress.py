"""Progress bars: shown in a terminal and in a notebook, and nowhere else."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import tqdm as bars

__all__ = ["Bar", "bar_class", "is_notebook", "progress_bar"]


class Bar(Protocol):
    """The calls that a progress bar takes."""

    def update(self, n: float = 1) -> object:
        """Report that `n` more units are done."""

    def set_postfix_str(self, s: str) -> object:
        """Show a text behind the bar."""


class _Silent:
    """A bar that shows nothing, and that neither takes a lock of tqdm nor starts its thread."""

    def update(self, n: float = 1) -> None:
        pass

    def set_postfix_str(self, s: str) -> None:
        pass


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook (Jupyter, VS Code, Colab): its stderr is no terminal."""
    try:
        return "IPKernelApp" in sys.modules["IPython"].get_ipython().config
    except (KeyError, AttributeError, TypeError):
        return False


def _kind() -> Any:
    """The class of tqdm that draws bars here: a widget in a notebook that has ipywidgets, else a line of text."""
    if is_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm wants ipywidgets, without which a line of text does as well
            from tqdm.auto import tqdm  # noqa: PLC0415 - a terminal need not wait for asyncio

            return tqdm
    return bars.tqdm


_Bar: Any = _kind()
"""Chosen at once: huggingface_hub, where it comes first, makes tqdm warn of what is missing."""


@contextmanager
def progress_bar(total: int, title: str, unit: str = "it", *, show: bool = True, **options: Any) -> Iterator[Bar]:
    """A bar of `total` units until the end of the block; it is removed where an error ends the block.

    Where `show` is False, or standard error goes into a file or a pipe, nothing is shown. options: those of tqdm.
    """
    if not (show and _is_seen()):
        yield _Silent()
        return
    bar = _Bar(total=total, desc=title, unit=unit, **options)
    try:
        yield bar
    except BaseException:
        bar.total, bar.leave = None, False  # with a total, a notebook keeps it in red
        raise
    finally:
        bar.close()


def bar_class(*, show: bool = True) -> type[Any]:
    """The class of such bars, for libraries that make their own; where nothing is to be shown, they are disabled."""
    disabled = not (show and _is_seen())

    class Chosen(_Bar):  # type: ignore[misc]
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **(given | {"disable": True} if disabled else given))

    return Chosen


def _is_seen() -> bool:
    """Whether somebody looks at standard error."""
    if is_notebook():
        return True
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False
