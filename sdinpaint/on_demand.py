"""Modules that are imported when they are first used, so that commands which need no torch do not wait for it."""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # importing it from typing takes a third of the time before the command line handles signals
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, TypeGuard

    from torch import Tensor

__all__ = ["OnDemand", "exports", "is_tensor"]


class OnDemand:
    """A module that is imported at the first use of one of its names.

    Args:
        name: full name of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next use does not come here
        return value


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Tell whether a value is a torch tensor, without importing torch: there are none before it was imported.

    Args:
        value: any value.

    Returns:
        True for a tensor.
    """
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def exports(
    package: str, homes: Mapping[str, str], names: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], Any]]:
    """Make the functions `__getattr__` and `__dir__` of a package that imports what it exports at first use.

    Args:
        package: full name of the package.
        homes: module within the package by the name that it exports.
        names: all names that the package shows.

    Returns:
        The two functions.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get, lambda: sorted(names)
