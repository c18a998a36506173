"""Types of option values: points, boxes, sizes and the like as they are typed on the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click
from PIL import ImageColor

from sdinpaint.checks import dtype_name
from sdinpaint.errors import SettingError
from sdinpaint.images.boxes import Box

__all__ = ["BOX", "COLOR", "CROP", "DTYPE", "DTYPE_OR_AUTO", "EMBEDDING", "LORA", "POINT", "SAMPLER", "SIZE", "STROKE"]
__all__ += ["Value"]


class Value(click.ParamType):  # type: ignore[type-arg]  # older versions of click take none
    """An option value that is read from a text of a fixed form.

    Args:
        form: name of the form, which the help shows.
        example: a text of that form.
        read: text -> value; raises ValueError where the text is not of that form.
    """

    def __init__(self, form: str, example: str, read: Callable[[str], Any]) -> None:
        self.name, self.example, self.read = form, example, read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a value.

        Args:
            value: the text as typed; anything else has been read before and stays.
            param: the option.
            ctx: context of the command.

        Returns:
            The value.
        """
        if not isinstance(value, str):
            return value
        try:
            return self.read(value)
        except ValueError:
            self.fail(f"{value!r} is not {self.name}, such as {self.example}", param, ctx)


class SamplerName(click.ParamType):  # type: ignore[type-arg]  # older versions of click take none
    """The name of a sampler, in sdinpaint or in another program."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the name of a sampler.

        Args:
            value: the name as typed.
            param: the option.
            ctx: context of the command.

        Returns:
            The same name, which the library understands.
        """
        from sdinpaint.sampling import resolve

        try:
            resolve(value)
        except SettingError as error:
            self.fail("; ".join(filter(None, (f"{error.found} is not {error.expected}", error.hint))), param, ctx)
        return value


class DtypeName(click.ParamType):  # type: ignore[type-arg]  # older versions of click take none
    """The name of a dtype, as torch spells it or shorter.

    Args:
        also: words that are accepted too, such as "auto".
    """

    name = "DTYPE"

    def __init__(self, *also: str) -> None:
        self.also = also

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the name of a dtype.

        Args:
            value: the name as typed.
            param: the option.
            ctx: context of the command.

        Returns:
            Torch's name of the dtype, or one of `also`.
        """
        if value in self.also:
            return value
        try:
            return dtype_name(value)
        except SettingError as error:
            words = "".join(f"{word}, " for word in self.also)
            self.fail(f"{error.found} is not {words}{error.expected}; {error.hint}", param, ctx)


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


def _weighted(text: str) -> tuple[Any, ...]:
    """Take at most two trailing numbers off a file's name: FILE, FILE:WEIGHT or FILE:WEIGHT:TEXT_WEIGHT.

    A name of which there is a file or folder stays whole.
    """
    numbers: list[float] = []
    while len(numbers) < 2 and ":" in text and not _exists(text):
        before, _, last = text.rpartition(":")
        try:
            numbers.insert(0, float(last))
        except ValueError:
            break
        text = before
    if not text:
        raise ValueError(text)
    return text, *numbers


def _named(text: str) -> tuple[str, str | None]:
    """Split TOKEN=FILE; a file of that whole name has no token of its own."""
    token, equals, file = text.partition("=")
    if not equals or _exists(text):
        return text, None
    if not token or not file:
        raise ValueError(text)
    return file, token


def _exists(text: str) -> bool:
    return os.path.lexists(os.path.expanduser(text))


def _size(text: str) -> tuple[int, ...]:
    width, height = _whole(text.lower().replace("x", ","), 2)
    return height, width


POINT = Value("X,Y", "220,140", lambda text: _whole(text, 2))
BOX = Value("LEFT,TOP,RIGHT,BOTTOM", "100,50,300,400", lambda text: Box(*_whole(text, 4)))
STROKE = Value("'X,Y X,Y ...'", "'10,10 40,30 60,30'", _stroke)
COLOR = Value("COLOR", "255,0,128 or '#ff0080' or red", _color)
CROP = Value("auto|none|PIXELS", "64", _crop)
DTYPE, DTYPE_OR_AUTO = DtypeName(), DtypeName("auto")
SAMPLER = SamplerName()
LORA = Value("FILE[:WEIGHT[:TEXT_WEIGHT]]", "fox.safetensors:0.8", _weighted)
EMBEDDING = Value("[TOKEN=]FILE", "fox=learned_embeds.safetensors", _named)
SIZE = Value("WIDTHxHEIGHT", "640x480", _size)
