"""Progress bars, shown only in a terminal or a notebook."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import tqdm as bars
from sdinpaint_weights.errors import shown

__all__ = ["Bar", "bar_class", "is_notebook", "progress_bar"]


class Bar(Protocol):
    """The methods of a progress bar that the library uses."""

    def update(self, n: float = 1) -> object:
        """Report that units are done.

        Args:
            n: number of units since the last call.
        """

    def set_postfix_str(self, s: str) -> object:
        """Show a text behind the bar.

        Args:
            s: the text.
        """


class _Silent:
    """A bar that shows nothing, and neither takes a lock of tqdm nor starts its thread."""

    def update(self, n: float = 1) -> None:
        pass

    def set_postfix_str(self, s: str) -> None:
        pass


def is_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook (Jupyter, VS Code, Colab), whose stderr is no terminal."""
    try:
        return "IPKernelApp" in sys.modules["IPython"].get_ipython().config
    except (KeyError, AttributeError, TypeError):
        return False


def _kind() -> Any:
    """Return the class of tqdm for this process: a widget in a notebook with ipywidgets, else a line of text."""
    if is_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm warns that ipywidgets is missing; a line of text is enough
            from tqdm.auto import tqdm  # noqa: PLC0415 - imports asyncio, which a terminal does not need

            return tqdm
    return bars.tqdm


_Bar: Any = _kind()
"""Chosen at import: if huggingface_hub is imported first, it makes tqdm warn of missing widgets."""


@contextmanager
def progress_bar(total: int, title: str, unit: str = "it", *, show: bool = True, **options: Any) -> Iterator[Bar]:
    """Show a progress bar until the end of the block; an error that ends the block removes the bar.

    Args:
        total: number of units.
        title: text before the bar.
        unit: name of a unit.
        show: show the bar, unless standard error goes into a file or a pipe.
        options: further options of tqdm.

    Returns:
        A context manager that gives the bar.
    """
    if not (show and _is_seen()):
        yield _Silent()
        return
    bar = _Bar(total=total, desc=shown(title), unit=unit, **options)
    try:
        yield bar
    except BaseException:
        bar.total, bar.leave = None, False  # with a total, a notebook keeps it in red
        raise
    finally:
        bar.close()


def bar_class(*, show: bool = True) -> type[Any]:
    """Make a class of progress bars, for libraries that create their own.

    Args:
        show: show the bars, unless standard error goes into a file or a pipe.

    Returns:
        A subclass of tqdm.
    """
    disabled = not (show and _is_seen())

    class Chosen(_Bar):  # type: ignore[misc]
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **(given | {"disable": True} if disabled else given))

    return Chosen


def _is_seen() -> bool:
    """Tell whether standard error is shown to somebody."""
    if is_notebook():
        return True
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):  # stderr is missing or closed
        return False
