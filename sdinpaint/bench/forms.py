"""The part `forms` of the suite: every form of the CPU's operations, and the table of the fastest that follows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sdinpaint_kernels import cpu_kinds
from sdinpaint_kernels.heap import keeping_memory
from sdinpaint_weights.atomic import atomic_write
from torch import Tensor

from sdinpaint.bench.cases import Case
from sdinpaint.bench.kernels import Recorded, heaviest_first, milliseconds, recorded_calls
from sdinpaint.bench.operations import OPERATIONS
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.report.rows import Row, latest, measured
from sdinpaint.bench.timing import interleaved, rounds_of
from sdinpaint.checkpoints.building import find_dtype
from sdinpaint.errors import SettingError

__all__ = ["MEASURED", "PART", "fastest", "measure_forms", "write_table", "written"]

PART = "forms"
MEASURED = ("conv3", "upsample_conv3", "attention")
"""The operations that have several forms."""
WITH_WEIGHTS = MEASURED[:2]
ARGUMENTS = 3
"""The arguments of a form: x, weight and bias; or queries, keys and values."""
GROW = ("tiles", "packed_transposed")
"""Forms with 16 numbers for each 9 of the weights."""
PRICE = 0.7
"""Milliseconds that a megabyte more has to save, so that a step takes no more memory than with plain forms."""
NOISE = 0.06
"""The share by which a form has to be faster than the plain one."""
MOST_TIMES = 5.0
"""A form may have this many times the error of the plain one: Winograd's rounds four times as often in bfloat16."""


@torch.inference_mode()
def measure_forms(case: Case, commands: Sequence[Command]) -> Iterator[dict[str, Any]]:
    """Time every form of each operation at the sizes of a guided step and of decoding, with its error.

    Args:
        case: checkpoint, size and dtype.
        commands: unused.

    Returns:
        Rows, those with the longest time on the roofline first; `system` is the form.

    Raises:
        SettingError: the device is not the CPU.
    """
    if case.device != "cpu":
        raise SettingError("SETTING_DEVICE", "the device of the part forms", case.device, expected="cpu")
    work: dict[tuple[str, tuple[int, ...]], Recorded] = {}
    for where, calls in recorded_calls(case).items():
        for _, call, _ in heaviest_first(where, calls, case):
            if call.operation in MEASURED:
                sizes = _module(call.operation).sizes(*_arguments(call.on_meta()))
                kept = work.setdefault((call.operation, sizes), call)
                kept.count += call.count if kept is not call else 0
    with TemporaryDirectory() as folder, keeping_memory():  # as where models run: large maps cost no page faults
        for (operation, sizes), call in rounds_of(list(work.items())):
            yield from _measured(operation, sizes, call, case, Path(folder))


def _module(operation: str) -> Any:
    """Import the module of an operation, which has the same name as the package's function."""
    return import_module(f"sdinpaint_kernels.{operation}")


def _arguments(call: tuple[list[Any], dict[str, Any]]) -> list[Any]:
    return [*call[0], None][:ARGUMENTS]


def _mapped(weight: Tensor, file: Path) -> Tensor:
    """Map weights from a file, as those of a checkpoint are: only such ones are known to be unchanged at no cost."""
    file.unlink(missing_ok=True)
    weight.contiguous().view(torch.uint8).numpy().tofile(file)
    return torch.from_file(str(file), shared=False, size=weight.numel(), dtype=weight.dtype).view(weight.shape)


def _measured(
    operation: str, sizes: Sequence[int], recorded: Recorded, case: Case, folder: Path
) -> list[dict[str, Any]]:
    kind, given = cpu_kinds.cpu_kind(), _arguments(recorded.drawn(case.device))
    exact = OPERATIONS[operation].plain(*(one.double() if isinstance(one, Tensor) else one for one in given))
    forms = {name: form for name, form in _module(operation).FORMS.items() if form.takes(*given)}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, form in forms.items():
        own = [*given]
        if operation in WITH_WEIGHTS:  # a form of weights replaces another one of the same weights
            own[1] = _mapped(given[1], folder / name)
        calls[name] = partial(form.run, *own)
    errors = {name: _error(call(), exact) for name, call in calls.items()}
    timed = {name: milliseconds([call], case.device) for name, call in calls.items()}
    return [
        measured(
            PART,
            f"{kind}: {operation} {' '.join(map(str, sizes))}",
            case.fields,
            name,
            taken,
            "ms",
            check=f"off by {errors[name]:.1e}",
            kind=kind,
            operation=operation,
            sizes=list(sizes),
            error=errors[name],
            count=recorded.count,
            steps=None,
        )
        for name, taken in interleaved(timed, case.rounds).items()
    ]


def _error(found: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the error relative to that of the exact numbers."""
    return float((found.double() - exact).norm() / exact.norm())


def fastest(rows: Iterable[Row]) -> dict[str, Any]:
    """Make the table of the kernels from measured rows.

    Args:
        rows: rows of this part, of any machines.

    Returns:
        The table, as `sdinpaint_kernels.forms` reads it.
    """
    times: dict[tuple[Any, ...], dict[str, tuple[float, float]]] = {}
    for row in rows:
        key = row["kind"], row["dtype"], row["operation"], tuple(row["sizes"])
        times.setdefault(key, {})[row["system"]] = row["p50"], row["error"]
    table: dict[str, Any] = {}
    for (kind, dtype, operation, sizes), forms in sorted(times.items()):
        bound = MOST_TIMES * forms["plain"][1]
        more = 7 * sizes[0] * sizes[1] * find_dtype(dtype).itemsize / 1e6
        prices = {name: ms + PRICE * more * (name in GROW) for name, (ms, error) in forms.items() if error <= bound}
        prices["plain"] *= 1 - NOISE
        names = sorted(prices, key=prices.__getitem__)
        place = table.setdefault(kind, {}).setdefault(dtype, {}).setdefault(operation, {})
        place[" ".join(map(str, sizes))] = " ".join(names)
    return table


def write_table(rows: Path, table: Path) -> None:
    """Write the table of the kernels.

    Args:
        rows: file of rows of this part.
        table: the file to write.

    Raises:
        OSError: a file cannot be read or written.
    """
    with atomic_write(table) as file:
        file.write(written(fastest(latest([rows]))).encode())


def written(table: Mapping[str, Any]) -> str:
    """Write the table as the file of the kernels has it.

    Args:
        table: from `fastest`.

    Returns:
        The text.
    """
    return json.dumps(table, indent=1) + "\n"
