"""Points, boxes and the like as they are typed on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from PIL import ImageColor

from sdinpaint.images.boxes import Box

__all__ = ["BOX", "COLOR", "CROP", "POINT", "SIZE", "STROKE", "Value"]


class Value(click.ParamType):  # type: ignore[type-arg]  # older versions of click take none
    """What `read` makes of the text of an option; it raises ValueError where the text is not of that form."""

    def __init__(self, form: str, example: str, read: Callable[[str], Any]) -> None:
        self.name, self.example, self.read = form, example, read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value of a text; what is none was converted before."""
        if not isinstance(value, str):
            return value
        try:
            return self.read(value)
        except ValueError:
            self.fail(f"{value!r} is not {self.name}, such as {self.example}", param, ctx)


def _whole(text: str, count: int) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in text.split(","))
    if len(numbers) != count:
        raise ValueError(text)
    return numbers


def _stroke(text: str) -> tuple[tuple[int, ...], ...]:
    if not text.split():
        raise ValueError(text)
    return tuple(_whole(point, 2) for point in text.split())


def _color(text: str) -> tuple[int, ...]:
    return _whole(text, 3) if "," in text else ImageColor.getrgb(text)[:3]


def _crop(text: str) -> int | str | None:
    return {"auto": "auto", "none": None}[text] if text in ("auto", "none") else int(text)


def _size(text: str) -> tuple[int, ...]:
    width, height = _whole(text.lower().replace("x", ","), 2)
    return height, width


POINT = Value("X,Y", "220,140", lambda text: _whole(text, 2))
BOX = Value("LEFT,TOP,RIGHT,BOTTOM", "100,50,300,400", lambda text: Box(*_whole(text, 4)))
STROKE = Value("'X,Y X,Y ...'", "'10,10 40,30 60,30'", _stroke)
COLOR = Value("COLOR", "255,0,128 or '#ff0080' or red", _color)
CROP = Value("auto|none|PIXELS", "64", _crop)
SIZE = Value("WIDTHxHEIGHT", "640x480", _size)
