"""Keyword arguments: the nearest name for one that a function does not have, also from diffusers' names."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["knowing_keywords"]

Given = ParamSpec("Given")
Returned = TypeVar("Returned")

NAMES_ELSEWHERE = {
    "generator": "seed",
    "latents": "noise",
    "mask_image": "mask",
    "num_inference_steps": "steps",
    "scheduler": "sampler",
    "torch_dtype": "dtype",
}
"""Name of an argument in diffusers -> name here."""


def knowing_keywords(*more: str) -> Callable[[Callable[Given, Returned]], Callable[Given, Returned]]:
    """Let a function suggest the nearest name in the TypeError of a keyword that it does not have; a decorator.

    Args:
        more: the names that it takes by `**options`.

    Returns:
        The decorator, which keeps the signature.
    """

    def decorate(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
        parameters = inspect.signature(function).parameters.values()
        names = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD] + [*more]

        @functools.wraps(function)
        def call(*given: Given.args, **options: Given.kwargs) -> Returned:
            for name in options.keys() - names:
                close = difflib.get_close_matches(NAMES_ELSEWHERE.get(name, name), names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}{hint}")
            return function(*given, **options)

        return call

    return decorate
