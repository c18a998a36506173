"""Prepacked weights: another form of them, cached as long as they live and hold what it was made from.

The pages of the weights themselves are released where a file holds them.
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
    """Another form of weights, what made it, and the contents that it was made from."""

    form: Tensor
    make: Callable[[Tensor], Tensor]
    contents: Contents


_cache = WeakTensorKeyDictionary()


@torch.no_grad()
def prepacked(weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return make(weight), which is made at the first call, after any change, and when another one was made since."""
    cached = _cache.get(weight)
    if cached is None or cached.make is not make or not unchanged([cached.contents], [weight])[0]:
        with torch.inference_mode(False):  # a plain tensor, which serves inside of inference mode and outside
            (held,) = contents([weight])  # before: what another thread writes meanwhile is noticed at the next call
            cached = _cache[weight] = Prepacked(make(weight.detach()), make, held)
        pages.release(weight.detach())
    return cached.form


def forget(weight: Tensor) -> None:
    """Drop what is cached for these weights; it is made again when it is needed."""
    _cache.pop(weight, None)
