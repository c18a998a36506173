"""Every operation of a guided step and of decoding, at every shape in the model, beside the same in plain torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import sdinpaint_kernels
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sdinpaint.bench.cases import SEED, Case
from sdinpaint.bench.operations import OPERATIONS, TORCHS_OWN
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import OURS, SdInpaint
from sdinpaint.bench.report.rows import measured, spread
from sdinpaint.bench.roofline import Roofline, flop_count
from sdinpaint.bench.timing import interleaved, median_ratio, rounds_of, timed
from sdinpaint.errors import NumericError

__all__ = [
    "TORCH",
    "Recorded",
    "Reference",
    "heaviest_first",
    "measure_kernels",
    "milliseconds",
    "recorded_calls",
    "recording",
]

Row = dict[str, Any]
Function = Callable[..., Any]

TORCH = "torch"
"""The name of plain torch in the tables."""
BACKENDS = {
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Baselines of attention on a GPU: torch's fused backends, each forced."""
SAME = "the same bit for bit"
"""The check where ours runs torch's own function on this machine: a ratio would be noise."""
MODELS = "sdinpaint.models"
"""The package whose modules call the operations."""
HOW = "kernels"
"""The option that says how an operation runs, not what it computes."""
SHORTEST = 0.01
"""Seconds that are timed at once; shorter operations run several times."""
LONG = 1.0
"""Seconds of a first call after which no second one is needed to know how long they are."""
COLD_BYTES = 2**28
"""Bytes of inputs and outputs on a GPU over which calls rotate: several times the L2 cache."""
MOST_COPIES = 64
LAUNCHES = 64
"""Calls in one CUDA graph at the least, so that its own launch does not count."""


# Recording of calls


@dataclass(frozen=True)
class Layout:
    """The shape, strides, dtype and device of a tensor, without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """Take the layout of a tensor.

        Args:
            x: any tensor.

        Returns:
            Its layout.
        """
        return cls(x.shape, x.stride(), x.dtype, x.device)

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Draw unit-variance numbers in this layout.

        Args:
            generator: of the same device.

        Returns:
            A tensor of this layout.
        """
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        memory = torch.randn(last + 1, generator=generator, dtype=self.dtype, device=self.device)
        return memory.as_strided(self.shape, self.stride)

    def on_meta(self) -> Tensor:
        """Make a tensor of this layout on the meta device."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@dataclass
class Recorded:
    """Calls of one operation with arguments of the same layouts, and how many there were."""

    operation: str
    function: Function
    arguments: tuple[Sequence[Any], Mapping[str, Any]]
    """Positional and keyword arguments, with a `Layout` for each tensor."""
    count: int = 0

    @property
    def is_torchs_own(self) -> bool:
        """Tell whether the models leave the operation to torch."""
        return self.function in TORCHS_OWN

    def on_meta(self) -> tuple[list[Any], dict[str, Any]]:
        """Make arguments on the meta device."""
        return self._with(Layout.on_meta)

    def drawn(self, device: str) -> tuple[list[Any], dict[str, Any]]:
        """Make arguments with random numbers, the same every time.

        Args:
            device: where they were recorded.

        Returns:
            Positional and keyword arguments.
        """
        return self._with(partial(Layout.drawn, generator=torch.Generator(device).manual_seed(SEED)))

    def _with(self, make: Callable[[Layout], Tensor]) -> tuple[list[Any], dict[str, Any]]:
        args, options = tree_map_only(Layout, make, self.arguments)
        return args, options


class Recorder(TorchFunctionMode):
    """Records calls by their description; what an operation calls itself belongs to it, and is not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Recorded] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a function of torch; functions that it calls do not pass here."""
        if func in TORCHS_OWN:
            self.take(TORCHS_OWN[func], func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def watching(self, operation: str, function: Function) -> Function:
        """Wrap a function so that every call is recorded.

        Args:
            operation: a name in OPERATIONS.
            function: the function.

        Returns:
            A function with the same signature.
        """

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.take(operation, function, args, kwargs)
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs)

        return call

    def take(self, operation: str, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Record one call.

        Args:
            operation: a name in OPERATIONS.
            function: what was called.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        # repeated calls need their arguments, so nothing is overwritten
        options = {name: value for name, value in kwargs.items() if name not in (HOW, "overwrite")}
        told = f"{operation} {OPERATIONS[operation].told(*args, **options)}"
        if asked := kwargs.get(HOW):
            told, function = f"{told}, by {asked}", partial(function, **{HOW: asked})
        arguments = tree_map_only(Tensor, Layout.of, (list(args), options))
        self.calls.setdefault(told, Recorded(operation, function, arguments)).count += 1


@contextmanager
def recording() -> Iterator[dict[str, Recorded]]:
    """Record what the models call within this block, by its description."""
    recorder = Recorder()
    ours = {getattr(sdinpaint_kernels, name): name for name in sdinpaint_kernels.__all__ if name in OPERATIONS}
    modules = [module for name, module in sys.modules.items() if name.startswith(MODELS)]
    with ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if callable(value) and value in ours:
                    setattr(module, name, recorder.watching(ours[value], value))
                    stack.callback(setattr, module, name, value)
        stack.enter_context(recorder)
        yield recorder.calls


@torch.inference_mode()
def recorded_calls(case: Case) -> dict[str, dict[str, Recorded]]:
    """Record the operations of one guided step and of decoding one image, each run once.

    Args:
        case: checkpoint, size, dtype and device.

    Returns:
        The calls by description, of "UNet step" and of "VAE decode".
    """
    system = SdInpaint(case)
    system.pipe.graphs.enabled = False  # a replayed graph calls no Python
    with recording() as step:
        system.step()
    with recording() as decoding:
        system.decode()
    return {"UNet step": step, "VAE decode": decoding}


# Timing


@torch.inference_mode()
def measure_kernels(case: Case, commands: Sequence[Command]) -> Iterator[Row]:
    """Measure the milliseconds of every distinct call in a guided step and in decoding, ours and plain torch's.

    On a GPU the calls are captured in a CUDA graph, over inputs that do not stay in the L2 cache, and attention is
    compared with each of torch's fused backends too, where it supports the shape.

    Args:
        case: checkpoint, size, dtype and device.
        commands: unused.

    Returns:
        Rows, those with the longest time on the roofline first; `count` is the number of such calls.

    Raises:
        NumericError: an operation of ours is wrong.
    """
    for where, calls in recorded_calls(case).items():
        for what, call, roofline in rounds_of(heaviest_first(where, calls, case)):
            yield from _measured(what, call, roofline, case)


def heaviest_first(where: str, calls: Mapping[str, Recorded], case: Case) -> list[tuple[str, Recorded, Roofline]]:
    """Sort recorded calls by the time that they take together on the roofline.

    Args:
        where: the name of the network.
        calls: by description.
        case: gives the device.

    Returns:
        (name of the measurement, call, roofline), the longest time first.
    """
    work = [(f"{where}, {told}", call, _roofline(call, case)) for told, call in calls.items()]
    return sorted(work, key=lambda one: one[1].count * one[2].seconds, reverse=True)


def _measured(what: str, call: Recorded, roofline: Roofline, case: Case) -> list[Row]:
    functions: dict[str, Function] = {OURS: call.function}
    checks = {OURS: "torch's own"}
    if not call.is_torchs_own:
        functions[TORCH] = OPERATIONS[call.operation].plain
        reference = Reference.of(what, call, roofline, case)
        args, options = call.drawn(case.device)
        ours = _outputs(call.function(*args, **options))
        checks = {OURS: reference.check(ours), TORCH: SAME if reference.is_plain(ours) else "plain"}
        for name, function in _backends(call, case).items():
            functions[name], checks[name] = function, "forced"
    copies = _copies(call, roofline, case)
    calls = {
        name: milliseconds([partial(function, *args, **options) for args, options in copies], case.device)
        for name, function in functions.items()
    }
    values = interleaved(calls, case.rounds)
    return [
        measured(
            "kernels",
            what,
            case.fields,
            name,
            taken,
            "ms",
            ratio=None if name == OURS or checks[name] == SAME else median_ratio(values[OURS], taken),
            check=checks[name],
            steps=None,
            count=call.count,
            percent_of_floor=roofline.percent(spread(taken)["p50"] / 1e3),
        )
        for name, taken in values.items()
    ]


@dataclass(frozen=True)
class Reference:
    """The output of one recorded call in float64, and the largest error that ours may have."""

    what: str
    case: Case
    exact: tuple[Tensor, ...]
    plain: tuple[Tensor, ...]
    """Plain torch's, in the dtype of the case."""
    summing: float
    """The error of a plain float32 sum of as many products."""

    @classmethod
    def of(cls, what: str, call: Recorded, roofline: Roofline, case: Case) -> Reference:
        """Compute the reference of a call.

        A plain float32 sum of n products is off by eps / 2 * sqrt(n / 6) of its size, in the root mean square, since
        the k-th addition rounds a sum of k; torch's own orders of summation differ by as much from each other.

        Args:
            what: the name of the measurement.
            call: the recorded call.
            roofline: its arithmetic.
            case: the case.

        Returns:
            The reference.
        """
        plain = OPERATIONS[call.operation].plain
        args, options = call.drawn(case.device)
        right = _outputs(plain(*args, **options))
        args, options = tree_map_only(Tensor, Tensor.double, (args, options))
        exact = _outputs(plain(*args, **options))
        products = roofline.flops / 2 / sum(one.numel() for one in exact)
        return cls(what, case, exact, right, torch.finfo(torch.float32).eps / 2 * math.sqrt(products / 6))

    def check(self, ours: Sequence[Tensor]) -> str:
        """Check that the error of an output is at most twice plain torch's, one rounding, and that of a plain sum.

        Args:
            ours: the outputs of the call.

        Returns:
            The error in words.

        Raises:
            NumericError: it is larger, or shape or dtype are others.
        """
        said = []
        for mine, theirs, right in zip(ours, self.plain, self.exact, strict=True):
            found, expected = (f"{one.dtype} of shape {tuple(one.shape)}" for one in (mine, theirs))
            if found != expected:
                raise self._wrong(found, expected)
            largest = float(right.abs().max())
            error, torchs = (float((one - right).abs().max()) / largest for one in (mine, theirs))
            bound = 2 * torchs + torch.finfo(theirs.dtype).eps + self.summing
            if not error <= bound:
                raise self._wrong(f"off by {error:.2g} of the largest number", f"at most {bound:.2g}")
            said.append(f"off by {error:.1e} (bound {bound:.1e})")
        return "; ".join(said)

    def is_plain(self, ours: Sequence[Tensor]) -> bool:
        """Tell whether outputs equal plain torch's bit for bit.

        Args:
            ours: the outputs of the call.

        Returns:
            True where all are equal.
        """
        return all(map(torch.equal, ours, self.plain))

    def _wrong(self, found: str, expected: str) -> NumericError:
        subject = f"kernels, {self.case.family} in {self.case.dtype}: {self.what}"
        return NumericError("BENCH_WRONG", subject, found, expected=expected, hint="no row of it is recorded")


def milliseconds(calls: Sequence[Callable[[], object]], device: str) -> Callable[[], float]:
    """Prepare the timing of an operation.

    Args:
        calls: the same operation over one or several copies of its inputs.
        device: on a GPU the calls are captured in a CUDA graph; elsewhere they are repeated for SHORTEST seconds.

    Returns:
        A function that returns the average milliseconds of one call.
    """
    if device.startswith("cuda"):
        return _graphed(calls, device)
    once = timed(calls[0], device)
    taken = once()
    times = 1 if taken > LONG else math.ceil(SHORTEST / once())  # the first call may have prepared something

    def several() -> None:
        for _ in range(times):
            calls[0]()

    together = timed(several, device)
    return lambda: 1e3 * together() / times


def _graphed(calls: Sequence[Callable[[], object]], device: str) -> Callable[[], float]:
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls[0]()  # kernels are compiled and chosen
    stream.synchronize()
    times = math.ceil(LAUNCHES / len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            for call in calls:
                call()
    graph.replay()

    def replayed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / (times * len(calls))

    return replayed


def _copies(call: Recorded, roofline: Roofline, case: Case) -> list[tuple[list[Any], dict[str, Any]]]:
    """Draw the arguments, on a GPU so often that none stays in the cache until its next call."""
    count = min(MOST_COPIES, math.ceil(COLD_BYTES / roofline.bytes)) if case.device.startswith("cuda") else 1
    return [call.drawn(case.device) for _ in range(count)]


def _backends(call: Recorded, case: Case) -> dict[str, Function]:
    """Return torch's fused backends of attention that support this call on a GPU."""
    if call.operation != "attention" or not case.device.startswith("cuda"):
        return {}
    found: dict[str, Function] = {}
    args, options = call.drawn(case.device)
    for name, backend in BACKENDS.items():
        function = partial(_forced, backend)
        try:
            function(*args, **options)
        except RuntimeError:  # torch's, for shapes and dtypes that a backend does not support
            continue
        found[name] = function
    return found


def _forced(backend: SDPBackend, *args: Any, **options: Any) -> Tensor:
    with sdpa_kernel(backend):
        return OPERATIONS["attention"].plain(*args, **options)


def _roofline(call: Recorded, case: Case) -> Roofline:
    """Return the roofline of the formula's arithmetic, and of reading each input and writing each output once."""
    args, options = call.on_meta()
    plain = partial(OPERATIONS[call.operation].plain, *args, **options)
    tensors = [leaf for leaf in tree_leaves((args, options, plain())) if isinstance(leaf, Tensor)]
    moved = sum(one.numel() * one.element_size() for one in tensors)
    return Roofline(flops=flop_count(plain), bytes=moved, dtype=tensors[0].dtype, device=case.device)


def _outputs(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out
