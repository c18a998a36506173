"""CUDA graphs: a function of tensors is recorded once, and from then on launched whole."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sdinpaint.errors import SettingError, warn

Tensors = Sequence[Tensor]
Out = TypeVar("Out", bound=Tensor | list[Tensor])
Function = Callable[[Tensors, Tensors], Out]
"""function(varying, constant): `varying` are others at every call, `constant` is one tuple for many calls."""

SWITCH = "SDINPAINT_GRAPH"
KEPT = 4
"""Recordings that are kept at a time; they share their memory."""
_one_recorder = threading.Lock()


class Graphs:
    """What one pipeline has recorded, by shapes; with `enabled` False, or SDINPAINT_GRAPH=0, it records nothing.

    Calls from several threads wait for each other. A copy of it is empty. Raises: SettingError for another value.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = _switched_on() if enabled is None else enabled
        self._recordings: dict[Hashable, Recording[Any]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Graphs], tuple[bool]]:
        return Graphs, (self.enabled,)

    def can_capture(self, tensors: Tensors) -> bool:
        """Tell whether a function of these tensors would be captured."""
        return self.enabled and _recordable(tensors)

    def __call__(self, key: str, function: Function[Out], varying: Tensors, constant: tuple[Tensor, ...]) -> Out:
        """function(varying, constant), replayed if it was recorded with this key for tensors of these shapes.

        `key`: which function it is, and the `shapes` of its constants. Nothing is recorded without CUDA, or where
        gradients are needed. Where recording fails, a warning says so, and from then on functions run as they are.
        """
        if self.can_capture([*varying, *constant]):
            shaped = key, *((one.shape, one.dtype, one.device) for one in varying)
            # Recordings hold plain tensors, so that they serve inside of inference mode and outside.
            with self._lock, torch.inference_mode(False), torch.no_grad():
                recording = self._recordings.pop(shaped, None) or self._record(function, varying, constant)
                if recording is not None:
                    self._recordings[shaped] = recording  # in the order of their last use
                    return recording(varying, constant)
        return function(varying, constant)

    def _record(self, function: Function[Out], varying: Tensors, constant: tuple[Tensor, ...]) -> Recording[Out] | None:
        memory = next((one.graph.pool() for one in self._recordings.values()), None)
        while len(self._recordings) >= KEPT:
            del self._recordings[next(iter(self._recordings))]
        try:
            return Recording(function, varying, constant, memory)
        except RuntimeError as error:
            self.enabled = False
            reason = str(error).partition("\n")[0]
            message = f"no CUDA graph can be made of the step, which is launched piece by piece instead: {reason}"
            warn(message)
            return None


class Recording(Generic[Out]):
    """A function, recorded with tensors of its own, into which those of every call are copied."""

    def __init__(self, function: Function[Out], varying: Tensors, constant: tuple[Tensor, ...], memory: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self._varying = [one.clone() for one in varying]
        self._constant = [one.clone() for one in constant]
        self._loaded = constant
        before = torch.cuda.current_stream(varying[0].device)
        stream = _stream(varying[0].device)
        # The stream's context gives the caller its own back also where recording fails, which the graph's does not.
        with _one_recorder, torch.cuda.stream(stream):
            stream.wait_stream(before)
            benchmark = torch.backends.cudnn.benchmark
            try:
                torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
                function(self._varying, self._constant)  # kernels are compiled and chosen
                stream.synchronize()
                with torch.cuda.graph(self.graph, memory, stream, capture_error_mode="thread_local"):
                    self._out = function(self._varying, self._constant)
            finally:
                torch.backends.cudnn.benchmark = benchmark
        before.wait_stream(stream)
        self._done = before.record_event()

    def __call__(self, varying: Tensors, constant: tuple[Tensor, ...]) -> Out:
        """The function's value for these tensors, which have the shapes of the first ones."""
        with torch.cuda.device(self._varying[0].device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # perhaps of another thread, on another stream
            if constant is not self._loaded:
                _copy(constant, self._constant)
                self._loaded = constant
            _copy(varying, self._varying)
            self.graph.replay()
            out = cloned(self._out)
            self._done = stream.record_event()
        return out


def cloned(out: Out) -> Out:
    """A tensor, or each of several, as new ones: the next replay overwrites those of the recording."""
    new: Any = out.clone() if isinstance(out, Tensor) else [one.clone() for one in out]
    return new


def shapes(tensors: Tensors) -> str:
    """What of tensors a recording depends on."""
    return ", ".join(f"{one.dtype} {tuple(one.shape)} on {one.device}" for one in tensors)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where all recordings on a device are made: torch keeps memory for matrix products by stream, for good."""
    return torch.cuda.Stream(device)


def _switched_on() -> bool:
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise SettingError("SETTING_GRAPH", f"the environment variable {SWITCH}", repr(value), expected="0 or 1")
    return value == "1"


def _recordable(tensors: Tensors) -> bool:
    needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return all(tensor.is_cuda for tensor in tensors) and not needs_gradients


def _copy(sources: Tensors, targets: Tensors) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
