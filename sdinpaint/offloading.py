"""Weights that are on the device, and in the dtype that it computes in, only while they are used."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdinpaint.models.layers import rest

__all__ = ["Offloading"]

LINE = 64
"""Bytes, to a multiple of which a weight begins, as torch's own memory does."""


class Offloading:
    """Models at home between their uses: where they were loaded, as their file holds them, and mapped from it.

    `release(weight)` gives back the memory of a weight that can be had again, and does nothing to another one. Models
    beside `models` are brought to the device in their own dtype.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        models: Iterable[nn.Module],
        release: Callable[[Tensor], object],
    ) -> None:
        self.device, self.dtype = device, dtype
        self._models, self._release = set(models), release
        self._uses: Counter[nn.Module] = Counter()
        self._home: dict[nn.Module, list[Tensor]] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Offloading:
        models = [copy.deepcopy(model, memo) for model in self._models]
        return Offloading(self.device, self.dtype, models, self._release)

    @contextmanager
    def using(self, *models: nn.Module) -> Iterator[None]:
        """The models are ready until the end. Uses within this one, and those of other threads, share them."""
        with ExitStack() as ready:
            for model in models:
                ready.callback(self._leave, model)  # first: also what came half way leaves
                self._enter(model)
            yield

    def _enter(self, model: nn.Module) -> None:
        # plain tensors, which serve inside of inference mode and outside
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._uses[model] += 1
            if self._uses[model] > 1:
                return
            weights = list(model.parameters())
            home = self._home[model] = [weight.data for weight in weights]
            if model in self._models and not all(self._is_ready(weight) for weight in home):
                for weight, ready in zip(weights, _moved(home, self.device, self.dtype), strict=True):
                    self._give_back(weight)
                    weight.data = ready
            model.to(self.device)  # which also lays weights out as it wants them there

    def _leave(self, model: nn.Module) -> None:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._uses[model] -= 1
            if self._uses[model]:
                return
            rest(model)
            # nothing is copied back: their use does not change weights
            for weight, home in zip(model.parameters(), self._home.pop(model), strict=True):
                weight.data = home
                self._give_back(weight)

    def _is_ready(self, weight: Tensor) -> bool:
        return weight.device.type == self.device.type and weight.dtype == self.dtype

    def _give_back(self, weight: nn.Parameter) -> None:
        # what was written to a weight is nowhere else; of one made in inference mode that is not known
        if not weight.is_inference() and not weight._version:
            self._release(weight.data)


def _moved(weights: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """The weights on a device in a dtype, one by one.

    On a CPU they lie in one block, whose memory the system gets back; it does not get that of many smaller ones, which
    C's allocator keeps wherever something behind them is in use.
    """
    if device.type != "cpu":
        yield from (weight.to(device, dtype) for weight in weights)
        return
    step = LINE // dtype.itemsize
    sizes = [-(-weight.numel() // step) * step for weight in weights]
    block = torch.empty(sum(sizes), dtype=dtype)
    for weight, part in zip(weights, block.split(sizes), strict=True):
        yield part[: weight.numel()].view(weight.shape).copy_(weight)
