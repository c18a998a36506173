"""Offloading: weights are on the device, in the dtype for computing, only while they are used."""

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
    """Keeps weights in host memory between uses, in the dtype of their file and mapped from it.

    Weights that do not belong to `models` are moved to the device in their own dtype. A weight that is written to
    during a use keeps the new values: it then stays in host memory in the dtype of the use.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, models: Iterable[nn.Module]) -> None:
        self.device, self.dtype = device, dtype
        self._own = {weight for model in models for weight in model.parameters()}
        self._begin()

    def _begin(self) -> None:
        self._uses: Counter[nn.Parameter] = Counter()
        self._on_host: dict[nn.Parameter, Tensor] = {}
        self._loaded: dict[nn.Parameter, Contents] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy, which leaves out the uses in progress."""
        return {"device": self.device, "dtype": self.dtype, "_own": self._own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @contextmanager
    def using(self, *models: nn.Module) -> Iterator[None]:
        """Bring models to the device for the duration of a `with` block.

        Nested uses, and uses in other threads, share the weights on the device.

        Args:
            *models: the models to use.

        Yields:
            Nothing; the models are ready inside the block.
        """
        with ExitStack() as ready:
            for model in models:
                weights = list(model.parameters())
                ready.callback(self._leave, weights)  # first, so that a failed entry is undone too
                self._enter(model, weights)
            yield

    def at_rest(self, weight: nn.Parameter) -> Tensor:
        """Return what a weight holds between uses.

        Args:
            weight: the weight.

        Returns:
            The numbers in host memory.
        """
        return self._on_host.get(weight, weight.data)

    def dtype_in_use(self, weight: nn.Parameter) -> torch.dtype:
        """Return the dtype in which a weight computes.

        Args:
            weight: the weight.

        Returns:
            The dtype.
        """
        return self.dtype if weight in self._own else weight.dtype

    def place(self, weight: nn.Parameter, data: Tensor) -> None:
        """Let a weight hold other numbers between uses, and in a use that is in progress.

        Args:
            weight: the weight.
            data: the numbers in host memory, in the shape of the weight.
        """
        with self._lock:
            if weight not in self._on_host:
                point_to(weight, data)
                return
            self._on_host[weight] = data
            point_to(weight, data.to(self.device, self.dtype_in_use(weight)))
            self._loaded.pop(weight, None)
            if weight.data_ptr() != data.data_ptr():
                [self._loaded[weight]] = contents([weight])

    def _enter(self, model: nn.Module, weights: Sequence[nn.Parameter]) -> None:
        # Plain tensors serve inside and outside of inference mode.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._uses.update(weights)
            entering = [weight for weight in weights if self._uses[weight] == 1]
            self._on_host.update((weight, weight.data) for weight in entering)
            try:
                self._load(model, entering)
            except BaseException:
                for weight in entering:
                    point_to(weight, self._on_host.pop(weight))
                raise

    def _load(self, model: nn.Module, entering: Sequence[nn.Parameter]) -> None:
        own = [weight for weight in entering if weight in self._own and not self._is_ready(weight)]
        moved = _moved([weight.data for weight in own], self.device, self.dtype)
        for weight, ready in zip(own, moved, strict=True):
            release(weight.data)
            point_to(weight, ready)
        model.to(self.device)  # this also packs weights as is best there
        loaded = [weight for weight in entering if weight.data_ptr() != self._on_host[weight].data_ptr()]
        self._loaded.update(zip(loaded, contents(loaded), strict=True))

    def _leave(self, weights: Sequence[nn.Parameter]) -> None:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._uses.subtract(weights)
            leaving = [weight for weight in weights if self._uses[weight] == 0 and weight in self._on_host]
            loaded = {weight: self._loaded.pop(weight) for weight in leaving if weight in self._loaded}
            same = dict(zip(loaded, unchanged(list(loaded.values()), list(loaded)), strict=True))
            for weight in leaving:
                on_host = self._on_host.pop(weight)
                if same.get(weight, False):
                    point_to(weight, on_host)
                elif weight.data_ptr() != on_host.data_ptr():  # written to, or given other memory
                    point_to(weight, weight.data.to(on_host.device, copy=True))
                forget_derived(weight)
                release(weight.data)  # drops the pages that nobody wrote to

    def _is_ready(self, weight: Tensor) -> bool:
        return weight.device.type == self.device.type and weight.dtype == self.dtype


def _moved(weights: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the weights on a device in a dtype, one by one.

    On a CPU they share one block, whose memory returns to the system when it is released. C's allocator keeps the
    memory of many smaller blocks wherever something behind them is in use.
    """
    if device.type != "cpu":
        yield from (weight.to(device, dtype) for weight in weights)
        return
    step = ALIGNED // dtype.itemsize
    sizes = [-(-weight.numel() // step) * step for weight in weights]
    block = torch.empty(sum(sizes), dtype=dtype, device="cpu")
    for weight, part in zip(weights, block.split(sizes), strict=True):
        yield part[: weight.numel()].view(weight.shape).copy_(weight)
