"""The part `tuning` of the suite: the configurations of the Triton kernels, beside the one that is shipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain, product
from typing import Any

import torch
from sdinpaint_kernels import backend
from torch import Tensor

from sdinpaint.bench.cases import Case
from sdinpaint.bench.kernels import Recorded, Reference, heaviest_first, milliseconds, recorded_calls
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.rows import measured
from sdinpaint.bench.roofline import Roofline
from sdinpaint.bench.timing import interleaved, median_ratio, rounds_of
from sdinpaint.errors import NumericError, SettingError

__all__ = ["TUNABLE", "Tunable", "candidates_of", "measure_tuning"]

Row = dict[str, Any]
Found = Row | str

MOST_CALLS = 12
"""The number of calls of a network that are tuned, those with the longest time on the roofline."""


def _module(operation: str) -> Any:
    """Import the module of an operation, which has the same name as the package's function."""
    return import_module(f"sdinpaint_kernels.{operation}")


# Candidates, the shipped one first


def _of_attention(q: Tensor, k: Tensor, *_: object) -> Iterator[Any]:
    own = _module("attention")
    queries, head_dim, keys = q.shape[1], q.shape[3], k.shape[1]
    yield own._config(head_dim, queries, keys)
    if keys <= own.WHOLE_CONTEXT:
        tiles = [(64, 0, 4, 1), (128, 0, 4, 1), (128, 0, 8, 1), (256, 0, 8, 1)]
    else:
        tiles = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2)]
        narrow = [(64, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)]
        tiles += [(64, 32, 4, 3)] if head_dim > 80 else narrow
    pads = (True, False) if head_dim == 40 else (False,)
    yield from (own.Config(*tile, pad_pv=pad) for tile in tiles for pad in pads)


def _of_group_norm(x: Tensor, groups: int, *_: object) -> Iterator[Any]:
    """Yield plans of one pass where the tile may fit, and of two passes over tiles of several shapes."""
    own = _module("group_norm")
    samples, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    yield own.plan(samples, channels, pixels, groups)
    per_group = channels // groups
    smallest = own._smallest_bundle(per_group)
    fitting = list(range(smallest, groups + 1, smallest))
    rows = backend.power_of_two(pixels)
    for size, warps in product(fitting[:2], (2, 4, 8, 16)):
        width = backend.power_of_two(size * per_group)
        if pixels <= 1024 and 256 * warps <= rows * width <= 2048 * warps:
            yield own.Plan(size, width, rows, 1, warps, one_pass=True)
    tiles = ((4096, 4), (8192, 4), (8192, 8), (16384, 8))
    for width, (elements, warps), programs in product((64, 128, 256), tiles, (264, 528, 1056)):
        widest = max((size for size in fitting if size * per_group <= width), default=None)
        rows = elements // width
        if widest is None or pixels < 256 or rows > pixels:
            continue
        chunks = backend.power_of_two(-(-samples * -(-groups // widest) * pixels // rows // programs) or 1)
        yield own.Plan(widest, width, rows, chunks, warps, one_pass=False)


def _of_geglu(*_: object) -> Iterator[Any]:
    own = _module("geglu")
    yield own.TILE
    yield from (own.Tile(*each) for each in product((1, 2, 4, 8), (256, 512, 1024), (4, 8)))


def _of_add_layer_norm(x: Tensor, *_: object) -> Iterator[Any]:
    own = _module("add_layer_norm")
    yield own.tile_for(x.shape[-1])
    yield from (own.Tile(*each) for each in product((1, 2, 4, 8), (1, 2, 4, 8)))


@dataclass(frozen=True)
class Tunable:
    """A Triton kernel, and the configurations that are tried."""

    candidates: Callable[..., Iterator[Any]]
    """Yields configurations for the positional arguments of the launch, the shipped one first."""
    options: tuple[tuple[str, Any], ...] = ()
    """The operation's keyword arguments that follow its positional ones in the launch, with their defaults."""


TUNABLE: Mapping[str, Tunable] = {
    "attention": Tunable(_of_attention),
    "group_norm": Tunable(_of_group_norm, (("eps", None), ("silu", False), ("addend", None))),
    "geglu": Tunable(_of_geglu),
    "add_layer_norm": Tunable(_of_add_layer_norm),
}
"""Tunable kernels by operation."""


def candidates_of(operation: str, args: Sequence[Any]) -> list[Any]:
    """List the configurations of a kernel for one call.

    Args:
        operation: a name in TUNABLE.
        args: the positional arguments of the launch.

    Returns:
        Distinct configurations, the shipped one first.
    """
    return list(dict.fromkeys(TUNABLE[operation].candidates(*args)))


@torch.inference_mode()
def measure_tuning(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """Time every configuration of the Triton kernels at the shapes that take most of a step and of decoding.

    A row of another configuration holds the ratio of the shipped one to it. Compiling takes most of the time.

    Args:
        case: checkpoint, size, dtype and device.
        commands: unused.

    Returns:
        Rows, and a text for each configuration with a wrong result; those that do not compile are left out.

    Raises:
        SettingError: the device is not a GPU.
    """
    if not case.device.startswith("cuda"):
        raise SettingError("SETTING_DEVICE", "the device of the part tuning", case.device, expected="cuda")
    for where, calls in recorded_calls(case).items():
        tunable = {told: call for told, call in calls.items() if call.operation in TUNABLE}
        for what, call, roofline in rounds_of(heaviest_first(where, tunable, case)[:MOST_CALLS]):
            yield from _tuned(what, call, roofline, case)


def _tuned(what: str, call: Recorded, roofline: Roofline, case: Case) -> Iterator[Found]:
    args, options = call.drawn(case.device)
    args = [*args, *(options.get(name, default) for name, default in TUNABLE[call.operation].options)]
    launch = _module(call.operation).launch
    reference = Reference.of(what, call, roofline, case)
    runs, checks = {}, {}
    shipped, *others = candidates_of(call.operation, args)
    for name, config in chain([(OURS, shipped)], ((str(one), one) for one in others)):
        run = partial(launch, *args, config)
        try:
            out = run()
            checks[name] = reference.check((out,) if isinstance(out, Tensor) else out)
        except NumericError as error:
            yield f"{name}: {error}"
            continue
        except backend.kernel_errors():
            if name == OURS:
                raise
            continue  # a GPU has too few registers or too little shared memory for many of them
        runs[name] = milliseconds([run], case.device)
    values = interleaved(runs, case.rounds)
    for name, taken in values.items():
        ratio = None if name == OURS or OURS not in values else median_ratio(values[OURS], taken)
        yield measured(
            "tuning", what, case.fields, name, taken, "ms", ratio=ratio, check=checks[name], steps=None,
            count=call.count, config=str(shipped) if name == OURS else name,
        )  # fmt: skip
