"""Read single values of a component's JSON files, or refuse them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from sdinpaint.errors import CheckpointError

Json = Mapping[str, Any]

__all__ = ["Json", "check_divides", "positive", "refuse", "switch", "whole_number", "without_nulls"]


def whole_number(json: Json, name: str, default: int, where: Path, low: int = 1) -> int:
    """Read a whole number from a JSON table.

    Args:
        json: the table.
        name: the number's name in it.
        default: what the number is where the table does not have it.
        where: the file or folder that errors name.
        low: the smallest number allowed.

    Returns:
        The number.

    Raises:
        CheckpointError: the value is not a whole number, or is out of range.
    """
    value = json.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= 2**20:
        refuse(where, name, value, f"a whole number from {low}")
    return int(value)


def positive(json: Json, name: str, default: float, where: Path, zero: bool = False) -> float:
    """Read a positive number from a JSON table.

    Args:
        json: the table.
        name: the number's name in it.
        default: what the number is where the table does not have it.
        where: the file or folder that errors name.
        zero: whether it may be 0.

    Returns:
        The number.

    Raises:
        CheckpointError: the value is no such number.
    """
    value = json.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < 1e6 or (zero and value == 0)):
        refuse(where, name, value, "0 or a positive number" if zero else "a positive number")
    return value if isinstance(value, int) and zero else float(value)


def switch(json: Json, name: str, default: bool, where: Path) -> bool:
    """Read true or false from a JSON table.

    Args:
        json: the table.
        name: the value's name in it.
        default: what the value is where the table does not have it.
        where: the file or folder that errors name.

    Returns:
        The value.

    Raises:
        CheckpointError: the value is neither.
    """
    value = json.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        refuse(where, name, value, "true or false")
    return bool(value)


def check_divides(where: Path, name: str, number: int, widths: list[int]) -> None:
    """Check that a number divides all widths of a network.

    Args:
        where: the file or folder that errors name.
        name: the number's name.
        number: the number.
        widths: the widths.

    Raises:
        CheckpointError: it does not.
    """
    if any(width % number for width in widths):
        refuse(where, name, number, f"a number that divides the widths {widths}")


def refuse(where: Path, name: str, value: object, expected: str) -> NoReturn:
    """Refuse a value of a configuration.

    Args:
        where: the file or folder that errors name.
        name: the value's name.
        value: the value.
        expected: what it may be.

    Raises:
        CheckpointError: always.
    """
    hint = "give the configuration that belongs to these weights: config=FOLDER"
    raise CheckpointError("CKPT_BAD_CONFIG", where, f"{name} is {value!r}", expected=expected, hint=hint)


def without_nulls(json: Json) -> dict[str, Any]:
    """Leave out what is null in a JSON table.

    Args:
        json: the table.

    Returns:
        The others.
    """
    return {key: value for key, value in json.items() if value is not None}
