"""Weights in another form, kept beside those they were made from as long as those live and do not change.

The pages of the first form are given back where a file holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sdinpaint_kernels.pages import give_back

SAMPLES = 2
"""Along each of the first two sides of the weights, of those that are looked at for changes."""


class Kept(NamedTuple):
    """Another form, what made it, and by what it is seen that the weights have not changed since."""

    form: Tensor
    make: Callable[[Tensor], Tensor]
    version: tuple[int, int]
    sample: Tensor


_kept = WeakTensorKeyDictionary()


def reformed(weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(weight), weight (O, C, 3, 3); made at the first call, after a change, and when another was made since."""
    version = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    # a change through `weight.data` leaves the version as it is; of a merge of weights the sample tells
    steps = [max(1, size // SAMPLES) for size in weight.shape[:2]]
    sample = weight.detach()[:: steps[0], :: steps[1], 1, 1]
    kept = _kept.get(weight)
    if kept is None or (kept.make, kept.version) != (make, version) or not torch.equal(kept.sample, sample):
        kept = _kept[weight] = Kept(make(weight.detach()), make, version, sample.clone())
        give_back(weight.detach())
    return kept.form


def forget(weight: Tensor) -> None:
    """Give up what is kept beside these weights; it is made again when it is needed."""
    _kept.pop(weight, None)
