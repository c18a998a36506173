"""CUDA graphs: the kernels of a function are captured once, and from then on launched together."""

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
"""function(varying, constant): `varying` differs from call to call, `constant` is one tuple for many calls."""

SWITCH = "SDINPAINT_GRAPH"
KEPT = 4
"""The number of captured graphs that are kept at a time; they share their memory."""
_one_capture = threading.Lock()


class Graphs:
    """The CUDA graphs of one pipeline, by the shapes of their inputs.

    Calls from several threads wait for each other. A copy is empty.

    Args:
        enabled: capture graphs; by default they are, unless the environment variable SDINPAINT_GRAPH is 0.

    Raises:
        SettingError: SDINPAINT_GRAPH is neither 0 nor 1.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = _switched_on() if enabled is None else enabled
        self._captured: dict[Hashable, CapturedGraph[Any]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Graphs], tuple[bool]]:
        return Graphs, (self.enabled,)

    def can_capture(self, tensors: Tensors) -> bool:
        """Tell whether a function of these tensors would be captured.

        Args:
            tensors: arguments of the function.

        Returns:
            True where capture is enabled, all tensors are on a GPU, and no gradient is needed.
        """
        return self.enabled and _capturable(tensors)

    def __call__(self, key: str, function: Function[Out], varying: Tensors, constant: tuple[Tensor, ...]) -> Out:
        """Compute a function, by replaying its CUDA graph if it was captured for inputs of these shapes.

        Where `can_capture` is False, the function is called directly. Where capture fails, a warning says so, and from
        then on nothing is captured.

        Args:
            key: name of the function, with the `shapes` of its constants.
            function: function(varying, constant) -> a tensor or a list of tensors.
            varying: tensors that differ from call to call.
            constant: tensors that stay the same for many calls, as one tuple.

        Returns:
            The result of the function; a replay copies it into new tensors.
        """
        if self.can_capture([*varying, *constant]):
            shaped = key, *((one.shape, one.dtype, one.device) for one in varying)
            # Captured graphs hold plain tensors, so that they serve inside of inference mode and outside.
            with self._lock, torch.inference_mode(False), torch.no_grad():
                captured = self._captured.pop(shaped, None) or self._capture(function, varying, constant)
                if captured is not None:
                    self._captured[shaped] = captured  # in the order of their last use
                    return captured(varying, constant)
        return function(varying, constant)

    def _capture(
        self, function: Function[Out], varying: Tensors, constant: tuple[Tensor, ...]
    ) -> CapturedGraph[Out] | None:
        memory = next((one.graph.pool() for one in self._captured.values()), None)
        while len(self._captured) >= KEPT:
            del self._captured[next(iter(self._captured))]
        try:
            return CapturedGraph(function, varying, constant, memory)
        except RuntimeError as error:
            self.enabled = False
            reason = str(error).partition("\n")[0]
            message = f"a step cannot be captured as a CUDA graph, so kernels are launched one by one: {reason}"
            warn(message)
            return None


class CapturedGraph(Generic[Out]):
    """A captured CUDA graph of a function, with its own input tensors, into which those of a call are copied."""

    def __init__(self, function: Function[Out], varying: Tensors, constant: tuple[Tensor, ...], memory: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self._varying = [one.clone() for one in varying]
        self._constant = [one.clone() for one in constant]
        self._loaded = constant
        before = torch.cuda.current_stream(varying[0].device)
        stream = _stream(varying[0].device)
        # This context restores the caller's stream also where capture fails, which that of the graph does not.
        with _one_capture, torch.cuda.stream(stream):
            stream.wait_stream(before)
            benchmark = torch.backends.cudnn.benchmark
            try:
                torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
                function(self._varying, self._constant)  # compiles and chooses kernels
                stream.synchronize()
                with torch.cuda.graph(self.graph, memory, stream, capture_error_mode="thread_local"):
                    self._out = function(self._varying, self._constant)
            finally:
                torch.backends.cudnn.benchmark = benchmark
        before.wait_stream(stream)
        self._done = before.record_event()

    def __call__(self, varying: Tensors, constant: tuple[Tensor, ...]) -> Out:
        """Return the result of the function for tensors that have the shapes of those at capture."""
        with torch.cuda.device(self._varying[0].device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # another thread may have replayed it on another stream
            if constant is not self._loaded:
                _copy(constant, self._constant)
                self._loaded = constant
            _copy(varying, self._varying)
            self.graph.replay()
            out = cloned(self._out)
            self._done = stream.record_event()
        return out


def cloned(out: Out) -> Out:
    """Copy tensors that the next replay of a graph overwrites.

    Args:
        out: a tensor, or a list of tensors.

    Returns:
        The same as new tensors.
    """
    new: Any = out.clone() if isinstance(out, Tensor) else [one.clone() for one in out]
    return new


def shapes(tensors: Tensors) -> str:
    """Describe the properties of tensors that a captured graph depends on.

    Args:
        tensors: the tensors.

    Returns:
        Dtype, shape and device of each, as a string.
    """
    return ", ".join(f"{one.dtype} {tuple(one.shape)} on {one.device}" for one in tensors)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures: torch keeps memory for matrix products of each stream for good."""
    return torch.cuda.Stream(device)


def _switched_on() -> bool:
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise SettingError("SETTING_GRAPH", f"the environment variable {SWITCH}", repr(value), expected="0 or 1")
    return value == "1"


def _capturable(tensors: Tensors) -> bool:
    needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return all(tensor.is_cuda for tensor in tensors) and not needs_gradients


def _copy(sources: Tensors, targets: Tensors) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
