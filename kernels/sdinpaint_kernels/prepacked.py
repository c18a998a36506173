"""Prepacked weights: a transformed copy, cached as long as the weights live and do not change.

The pages of the weights themselves are released where a file backs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sdinpaint_kernels import pages
from sdinpaint_kernels.contents import Contents, contents, unchanged


class Prepacked(NamedTuple):
    """A transformed copy of weights, the function that made it, and the contents that it was made from."""

    form: Tensor
    make: Callable[[Tensor], Tensor]
    contents: Contents


_cache = WeakTensorKeyDictionary()


@torch.no_grad()
def prepacked(weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `make(weight)` from the cache, and compute it again when the weight or `make` changed.

    Args:
        weight: the weights.
        make: the transform.

    Returns:
        The transformed copy.
    """
    cached = _cache.get(weight)
    if cached is None or cached.make is not make or not unchanged([cached.contents], [weight])[0]:
        with torch.inference_mode(False):  # a plain tensor serves inside and outside of inference mode
            (held,) = contents([weight])  # first, so that a write by another thread is noticed at the next call
            cached = _cache[weight] = Prepacked(make(weight.detach()), make, held)
        pages.release(weight.detach())
    return cached.form


def forget(weight: Tensor) -> None:
    """Drop the cached copy of these weights; it is made again when needed.

    Args:
        weight: the weights.
    """
    _cache.pop(weight, None)
