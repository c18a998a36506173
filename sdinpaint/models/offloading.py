"""Weights that are on the device, and in the dtype that it computes in, only while they are used."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdinpaint.models.weights import ALIGNED, Contents, contents, forget_derived, point_to, release, unchanged

__all__ = ["Offloading"]


class Offloading:
    """Weights in host memory between their uses: as their file holds them, and mapped from it.

    Weights beside those of `models` are brought to the device in their own dtype. What is written to a weight while it
    is used stays: it is then kept in host memory as it was used.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, models: Iterable[nn.Module]) -> None:
        self.device, self.dtype = device, dtype
        self._own = {weight for model in models for weight in model.parameters()}
        self._begin()

    def _begin(self) -> None:
        self._uses: Counter[nn.Parameter] = Counter()
        self._home: dict[nn.Parameter, Tensor] = {}
        self._brought: dict[nn.Parameter, Contents] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Hand to pickle and deepcopy what is not about the present uses."""
        return {"device": self.device, "dtype": self.dtype, "_own": self._own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @contextmanager
    def using(self, *models: nn.Module) -> Iterator[None]:
        """The models are ready until the end. Uses within this one, and those of other threads, share them."""
        with ExitStack() as ready:
            for model in models:
                weights = list(model.parameters())
                ready.callback(self._leave, weights)  # first: also what came half way leaves
                self._enter(model, weights)
            yield

    def _enter(self, model: nn.Module, weights: Sequence[nn.Parameter]) -> None:
        # plain tensors, which serve inside of inference mode and outside
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._uses.update(weights)
            coming = [weight for weight in weights if self._uses[weight] == 1]
            self._home.update((weight, weight.data) for weight in coming)
            try:
                self._bring(model, coming)
            except BaseException:
                for weight in coming:
                    point_to(weight, self._home.pop(weight))
                raise

    def _bring(self, model: nn.Module, coming: Sequence[nn.Parameter]) -> None:
        own = [weight for weight in coming if weight in self._own and not self._is_ready(weight)]
        moved = _moved([weight.data for weight in own], self.device, self.dtype)
        for weight, ready in zip(own, moved, strict=True):
            release(weight.data)
            point_to(weight, ready)
        model.to(self.device)  # which also lays weights out as they are best there
        brought = [weight for weight in coming if weight.data_ptr() != self._home[weight].data_ptr()]
        self._brought.update(zip(brought, contents(brought), strict=True))

    def _leave(self, weights: Sequence[nn.Parameter]) -> None:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._uses.subtract(weights)
            going = [weight for weight in weights if self._uses[weight] == 0 and weight in self._home]
            brought = {weight: self._brought.pop(weight) for weight in going if weight in self._brought}
            same = dict(zip(brought, unchanged(list(brought.values()), list(brought)), strict=True))
            for weight in going:
                home = self._home.pop(weight)
                if same.get(weight, False):
                    point_to(weight, home)
                elif weight.data_ptr() != home.data_ptr():  # it was written to, or given other memory
                    point_to(weight, weight.data.to(home.device, copy=True))
                forget_derived(weight)
                release(weight.data)  # the pages that nobody wrote to

    def _is_ready(self, weight: Tensor) -> bool:
        return weight.device.type == self.device.type and weight.dtype == self.dtype


def _moved(weights: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """The weights on a device in a dtype, one by one.

    On a CPU they lie in one block, whose memory the system gets back; it does not get that of many smaller ones, which
    C's allocator keeps wherever something behind them is in use.
    """
    if device.type != "cpu":
        yield from (weight.to(device, dtype) for weight in weights)
        return
    step = ALIGNED // dtype.itemsize
    sizes = [-(-weight.numel() // step) * step for weight in weights]
    block = torch.empty(sum(sizes), dtype=dtype, device="cpu")
    for weight, part in zip(weights, block.split(sizes), strict=True):
        yield part[: weight.numel()].view(weight.shape).copy_(weight)
