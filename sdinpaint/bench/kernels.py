"""Every operation of a guided step and of a decoding, at every shape that the models give it, beside plain torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial, wraps
from typing import Any

import sdinpaint_kernels
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sdinpaint.bench.cases import SEED, Case
from sdinpaint.bench.floors import Floor, flop_count
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import OURS, SdInpaint
from sdinpaint.bench.report.rows import spread
from sdinpaint.bench.timing import in_turns, ratio, timed
from sdinpaint.errors import NumericError

__all__ = ["OPERATIONS", "TORCH", "Recorded", "measure_kernels", "recorded_calls", "recording"]

Row = dict[str, Any]
Function = Callable[..., Any]

TORCH = "torch"
"""What plain torch is called in the table."""
SAME = "the same bit for bit"
"""What is said where ours is torch's own function on this machine: a ratio would be noise."""
MODELS = "sdinpaint.models"
"""The package that calls the operations."""
HOW = "kernels"
"""The option that says how an operation runs, and not what it computes."""
SHORTEST = 0.01
"""Seconds that are measured at a time; of operations that take less, several."""
LONG = 1.0
"""Seconds of a first call, after which no second one is needed to know how long they are."""


# What each operation computes, in torch's own functions, and how a call of it is told from others


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    silu: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    if addend is not None:
        x = x + addend[:, :, None, None]
    normed = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(normed) if silu else normed


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def _add_bias(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    return x + h + bias[:, None, None]


def _conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def _upsample_conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None, size: Sequence[int] = ()) -> Tensor:
    size = tuple(size) or tuple(2 * side for side in x.shape[2:])
    return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)


def _size(x: Tensor) -> str:
    """As "2x320x64x64", and how it lies in memory unless in order."""
    size = "x".join(map(str, x.shape))
    if x.is_contiguous():
        return size
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return f"{size} {'channels-last' if channels_last else 'strided'}"


def _of_attention(q: Tensor, k: Tensor, *_: object, **options: object) -> str:
    return _size(q) if q.shape == k.shape else f"{_size(q)} to {k.shape[1]}"


def _of_group_norm(x: Tensor, *_: object, silu: bool = False, addend: Tensor | None = None, **options: object) -> str:
    return _size(x) + " + addend" * (addend is not None) + ", silu" * silu


def _of_first(x: Tensor, *_: object, **options: object) -> str:
    return _size(x)


def _of_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    return f"{_size(x)} to {len(weight)}" + " + bias" * (bias is not None)


def _of_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1, 1), *_: object
) -> str:
    channels, _in, height, width = weight.shape
    strided = f", stride {stride[0]}" * (stride[0] > 1)
    return f"{height}x{width}, {_size(x)} to {channels}{strided}" + " + bias" * (bias is not None)


def _of_upsampling(x: Tensor, weight: Tensor, bias: Tensor | None = None, size: Sequence[int] = ()) -> str:
    return _of_convolution(x, weight, bias) + (f" of {size[0]}x{size[1]}" if size else "")


@dataclass(frozen=True)
class Operation:
    """One that the models call."""

    plain: Function
    """The same in torch, called with the same arguments."""
    told: Callable[..., str]
    """What of its arguments tells one call from another."""


OPERATIONS: Mapping[str, Operation] = {
    "attention": Operation(_attention, _of_attention),
    "group_norm": Operation(_group_norm, _of_group_norm),
    "geglu": Operation(_geglu, _of_first),
    "add_layer_norm": Operation(_add_layer_norm, _of_first),
    "add_bias": Operation(_add_bias, _of_first),
    "conv3": Operation(_conv3, _of_convolution),
    "upsample_conv3": Operation(_upsample_conv3, _of_upsampling),
    "linear": Operation(F.linear, _of_linear),
    "F.conv2d": Operation(F.conv2d, _of_convolution),
    "F.linear": Operation(F.linear, _of_linear),
}
TORCHS_OWN = {F.conv2d: "F.conv2d", F.linear: "F.linear"}
"""What the models leave to torch: there is no other to compare with."""


# Which calls there are


@dataclass(frozen=True)
class Layout:
    """A tensor's size and how it lies in memory, without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """That of a tensor."""
        return cls(x.shape, x.stride(), x.dtype, x.device)

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Unit-variance numbers that lie so."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        memory = torch.randn(last + 1, generator=generator, dtype=self.dtype, device=self.device)
        return memory.as_strided(self.shape, self.stride)

    def on_meta(self) -> Tensor:
        """Without memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@dataclass
class Recorded:
    """Calls of `function`, which is `operation`, with arguments of one kind, and how many there were."""

    operation: str
    function: Function
    arguments: tuple[Sequence[Any], Mapping[str, Any]]
    """In order and by name; of tensors their `Layout`."""
    count: int = 0

    @property
    def is_torchs_own(self) -> bool:
        """Whether the models leave it to torch."""
        return self.function in TORCHS_OWN

    def on_meta(self) -> tuple[list[Any], dict[str, Any]]:
        """Arguments that hold no numbers."""
        return self._with(Layout.on_meta)

    def drawn(self, device: str) -> tuple[list[Any], dict[str, Any]]:
        """Arguments with random numbers, the same every time."""
        return self._with(partial(Layout.drawn, generator=torch.Generator(device).manual_seed(SEED)))

    def _with(self, make: Callable[[Layout], Tensor]) -> tuple[list[Any], dict[str, Any]]:
        args, options = tree_map_only(Layout, make, self.arguments)
        return args, options


class Recorder(TorchFunctionMode):
    """Takes down calls by what is told of them; what an operation calls in turn is part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Recorded] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch's functions go through within this mode, and those that they call do not."""
        if func in TORCHS_OWN:
            self.take(TORCHS_OWN[func], func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def watching(self, operation: str, function: Function) -> Function:
        """`function`, of which every call is taken down."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.take(operation, function, args, kwargs)
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs)

        return call

    def take(self, operation: str, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """One call more."""
        # what is measured again and again needs its arguments
        options = {name: value for name, value in kwargs.items() if name not in (HOW, "overwrite")}
        told = f"{operation} {OPERATIONS[operation].told(*args, **options)}"
        if asked := kwargs.get(HOW):
            told, function = f"{told}, by {asked}", partial(function, **{HOW: asked})
        arguments = tree_map_only(Tensor, Layout.of, (list(args), options))
        self.calls.setdefault(told, Recorded(operation, function, arguments)).count += 1


@contextmanager
def recording() -> Iterator[dict[str, Recorded]]:
    """What the models call as long as this lasts, by what is told of it."""
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
    """List the operations that one guided step and the decoding of one image call; each is run once."""
    system = SdInpaint(case)
    system.pipe.graphs.enabled = False  # a replayed step calls nothing
    with recording() as step:
        system.step()
    with recording() as decoding:
        system.decode()
    return {"UNet step": step, "VAE decode": decoding}


# What they take


@torch.inference_mode()
def measure_kernels(case: Case, commands: Sequence[Command]) -> Iterator[Row]:
    """Milliseconds of every distinct call in a guided step and in a decoding: ours and, in turns, plain torch's.

    Of each of the two the calls with the highest floors come first; `count` is how often it makes that call.
    """
    for where, calls in recorded_calls(case).items():
        work = [(f"{where}, {told}", call, _floor(call, case)) for told, call in calls.items()]
        work.sort(key=lambda one: one[1].count * one[2].seconds, reverse=True)
        for what, call, floor in work:
            yield from _measured(what, call, floor, case)


def _measured(what: str, call: Recorded, floor: Floor, case: Case) -> list[Row]:
    args, options = call.drawn(case.device)
    calls = {OURS: partial(call.function, *args, **options)}
    checks = {OURS: "torch's own"}
    if not call.is_torchs_own:
        calls[TORCH] = partial(OPERATIONS[call.operation].plain, *args, **options)
        checks = _checks(what, call, calls, floor, case)
    values = in_turns({name: _milliseconds(run, case.device) for name, run in calls.items()}, case.rounds)
    of_case = {name: value for name, value in asdict(case).items() if name not in ("peers", "checkpoint", "rounds")}
    return [
        {
            "part": "kernels",
            "what": what,
            **of_case,
            "steps": None,
            "system": name,
            **spread(taken),
            "unit": "ms",
            "values": taken,
            "ratio": None if name == OURS or checks[name] == SAME else ratio(values[OURS], taken),
            "check": checks[name],
            "count": call.count,
            "percent_of_floor": floor.percent(spread(taken)["p50"] / 1e3),
        }
        for name, taken in values.items()
    ]


def _checks(what: str, call: Recorded, calls: Mapping[str, Function], floor: Floor, case: Case) -> dict[str, str]:
    """Ours must be as near to float64 as twice plain torch, one rounding of the largest number, and a plain sum.

    A plain float32 sum of n products is off by eps / 2 * sqrt(n / 6) of its size, in the root mean square, since the
    k-th addition rounds a sum of k; torch's own orders of summation differ by as much from each other.
    Raises: NumericError where it is not.
    """
    args, options = tree_map_only(Tensor, Tensor.double, call.drawn(case.device))
    exact = _outputs(OPERATIONS[call.operation].plain(*args, **options))
    ours, plain = (_outputs(calls[name]()) for name in (OURS, TORCH))
    products = floor.flops / 2 / sum(right.numel() for right in exact)
    summing = torch.finfo(torch.float32).eps / 2 * math.sqrt(products / 6)
    said = []
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        found, expected = (f"{one.dtype} of shape {tuple(one.shape)}" for one in (mine, theirs))
        if found != expected:
            raise _wrong(what, case, found, expected)
        largest = float(right.abs().max())
        error, torchs = (float((one - right).abs().max()) / largest for one in (mine, theirs))
        bound = 2 * torchs + torch.finfo(theirs.dtype).eps + summing
        if not error <= bound:
            raise _wrong(what, case, f"off by {error:.2g} of the largest number", f"at most {bound:.2g}")
        said.append(f"off by {error:.1e} (bound {bound:.1e})")
    same = all(map(torch.equal, ours, plain))
    return {OURS: "; ".join(said), TORCH: SAME if same else "plain"}


def _wrong(what: str, case: Case, found: str, expected: str) -> NumericError:
    subject = f"kernels, {case.family} in {case.dtype}: {what}"
    return NumericError("BENCH_WRONG", subject, found, expected=expected, hint="nothing of it is recorded")


def _milliseconds(call: Callable[[], object], device: str) -> Callable[[], float]:
    """A call that returns what `call` takes, on average over so many calls that a clock can tell."""
    once = timed(call, device)
    taken = once()
    times = 1 if taken > LONG else math.ceil(SHORTEST / once())  # the first call may have prepared something

    def several() -> None:
        for _ in range(times):
            call()

    together = timed(several, device)
    return lambda: 1e3 * together() / times


def _floor(call: Recorded, case: Case) -> Floor:
    """Of the formula's arithmetic, and of reading each input and writing each output once."""
    args, options = call.on_meta()
    plain = partial(OPERATIONS[call.operation].plain, *args, **options)
    tensors = [leaf for leaf in tree_leaves((args, options, plain())) if isinstance(leaf, Tensor)]
    moved = sum(one.numel() * one.element_size() for one in tensors)
    return Floor(flops=flop_count(plain), bytes=moved, dtype=tensors[0].dtype, device=case.device)


def _outputs(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out
