"""Prepacked weights: a transformed copy, cached as long as the weights live and do not change.

The pages of the weights themselves are released where a file backs them, so that the copy replaces them in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sdinpaint_kernels import pages
from sdinpaint_kernels.contents import Contents, contents, place, unchanged
from sdinpaint_kernels.heap import give_back


class Prepacked(NamedTuple):
    """A transformed copy of weights, the function that made it, and the contents that it was made from."""

    form: Any
    make: Callable[..., Any]
    contents: Sequence[Contents]
    others: Sequence[Tensor]
    """The weights beside the one that the copy is cached for."""


class InMemory(NamedTuple):
    """A note that weights at these places have no file behind them."""

    places: Sequence[object]


_cache = WeakTensorKeyDictionary()
_released = WeakTensorKeyDictionary()
"""Weights -> whether their pages were released when a copy was made."""
_thread = threading.local()
"""`verified`: the copies that a block of `verified` found to be true, by identity; `made`: whether any was made."""


def prepacked(weight: Tensor, make: Callable[[Tensor], Any]) -> Any:
    """Return `make(weight)` from the cache, and compute it again when the weight or `make` changed.

    Args:
        weight: the weights.
        make: the transform.

    Returns:
        The transformed copy.
    """
    cached = _cache.get(weight)
    return cached.form if _holds(cached, [weight], make) else _packed([weight], make)


def replaced(weights: Sequence[Tensor], make: Callable[..., Any]) -> Any | None:
    """Return `make(*weights)` as `prepacked` does, but only where the copy replaces the weights in memory.

    It does so where all of them are mapped from a file, and nobody wrote to them.

    Args:
        weights: the weights; the copy is cached for the first.
        make: the transform.

    Returns:
        The transformed copy, or None.
    """
    cached = _cache.get(weights[0])
    if isinstance(cached, InMemory):
        if cached.places == list(map(place, weights)):
            return None
    elif _holds(cached, weights, make):
        return cached.form
    maps = pages.private_maps()
    if all(pages.lies_in(weight, maps) and pages.is_unwritten(weight) for weight in weights):
        return _packed(weights, make)
    _cache[weights[0]] = InMemory(list(map(place, weights)))
    return None


@contextmanager
def verified(weights: Iterable[Tensor]) -> Iterator[None]:
    """Check all cached copies of some weights at once, and within the block only where they lie.

    One check after the other takes a tenth of the time of checks between the layers, whose numbers fill the caches of
    the processor. Nobody else may run code within the block: writes that torch does not count would go unnoticed.

    Args:
        weights: the weights of a network.
    """
    before: dict[int, Prepacked] = getattr(_thread, "verified", {})
    cached = [(weight, one) for weight in weights if isinstance(one := _cache.get(weight), Prepacked)]
    _thread.verified = before | {id(one): one for weight, one in cached if _is_true(one, [weight, *one.others])}
    made, _thread.made = getattr(_thread, "made", False), False
    try:
        yield
    finally:
        _thread.verified = before
        if _thread.made:  # transforms leave holes between the copies
            give_back()
        _thread.made = made


def forget(weight: Tensor) -> None:
    """Drop the cached copy of these weights; it is made again when needed.

    Args:
        weight: the weights.
    """
    _cache.pop(weight, None)
    _released.pop(weight, None)


def is_replaced(weight: Tensor) -> bool:
    """Tell whether a copy replaced these weights in memory, which are then read from their file when somebody asks.

    Args:
        weight: the weights.

    Returns:
        True if one did.
    """
    return bool(_released.get(weight, False))


def _holds(cached: object, weights: Sequence[Tensor], make: Callable[..., Any]) -> bool:
    if not isinstance(cached, Prepacked) or (cached.make, len(cached.contents)) != (make, len(weights)):
        return False
    if id(cached) in getattr(_thread, "verified", {}):
        return all(one.place == place(weight) for one, weight in zip(cached.contents, weights, strict=True))
    return _is_true(cached, weights)


def _is_true(cached: Prepacked, weights: Sequence[Tensor]) -> bool:
    return all(unchanged(cached.contents, weights))


@torch.no_grad()
def _packed(weights: Sequence[Tensor], make: Callable[..., Any]) -> Any:
    with torch.inference_mode(False):  # a plain tensor serves inside and outside of inference mode
        held = contents(weights)  # first, so that a write by another thread is noticed at the next call
        form = make(*(weight.detach() for weight in weights))
        _cache[weights[0]] = Prepacked(form, make, held, weights[1:])
    _thread.made = True
    for weight in weights:
        _released[weight] = pages.release(weight.detach())
    return form
