"""Forms of an operation on the CPU: several ways to compute the same, of which a table names the fastest first.

Which form is fastest depends on the kind of the processor, the dtype, and the sizes. `sdinpaint bench kernels --choose`
measures them, and forms.json is made from its rows. Nothing is timed while a model runs, so that the same machine gives
the same numbers every time. A kind that nobody measured takes what is never slower than torch's own operation.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sdinpaint_kernels.cpu_kinds import cpu_kind

__all__ = ["PLAIN", "Form", "compute", "is_measured", "nearest", "ranked"]

Sizes = tuple[int, ...]
"""Numbers that tell one call of an operation from another, such as (channels in, channels out, pixels)."""

Table = dict[str, dict[str, dict[str, dict[str, str]]]]
"""Kind of processor -> dtype -> operation -> sizes, such as "320 320 8192" -> names of forms, the fastest first."""

TABLE = Path(__file__).with_name("forms.json")
PLAIN = "plain"
"""The form that is torch's own operation, which takes every call."""
SAFE = ("packed", "packed_transposed", PLAIN)
"""The forms of a kind that nobody measured."""
RANKED = 4096
"""The number of sizes whose forms are remembered; a server may see maps of any size."""


def _always(*_: object) -> bool:
    return True


class Form(NamedTuple):
    """One way to compute an operation."""

    run: Callable[..., Tensor]
    takes: Callable[..., bool] = _always
    """Tells whether it computes a call with arguments of these shapes."""


def compute(operation: str, forms: Mapping[str, Form], sizes: Sizes, x: Tensor, *given: Any) -> Tensor:
    """Compute an operation by the fastest of its forms that takes the call.

    Args:
        operation: name of the operation in the table.
        forms: its forms by name, with PLAIN among them.
        sizes: what tells this call from others.
        x: the input.
        given: the other arguments of the forms.

    Returns:
        The output.
    """
    for name in ranked(cpu_kind(), str(x.dtype).removeprefix("torch."), operation, sizes):
        form = forms.get(name)
        if form is not None and form.takes(x, *given):
            return form.run(x, *given)
    return forms[PLAIN].run(x, *given)


@functools.lru_cache(RANKED)
def ranked(kind: str, dtype: str, operation: str, sizes: Sizes) -> Sequence[str]:
    """Name the forms of an operation, the fastest first.

    Args:
        kind: kind of the processor, see `cpu_kinds`.
        dtype: such as "float32".
        operation: name of the operation.
        sizes: what tells this call from others.

    Returns:
        The names at the nearest sizes that were measured; those of SAFE where none were.
    """
    rows = _table().get(kind, {}).get(dtype, {}).get(operation, {})
    if not rows:
        return SAFE
    measured = [tuple(map(int, one.split())) for one in rows]
    return list(rows.values())[nearest(sizes, measured)].split()


def is_measured(kind: str) -> bool:
    """Tell whether a kind of processor was measured.

    Args:
        kind: see `cpu_kinds`.

    Returns:
        True where the table has rows of it.
    """
    return kind in _table()


def nearest(sizes: Sequence[int], measured: Sequence[Sequence[int]]) -> int:
    """Find the nearest sizes by the factors between them.

    Args:
        sizes: those of a call.
        measured: those that were measured.

    Returns:
        The index of the nearest, of the first where several are.
    """

    def distance(index: int) -> float:
        return sum(abs(math.log2(one / other)) for one, other in zip(sizes, measured[index], strict=True))

    return min(range(len(measured)), key=distance)


@functools.cache
def _table() -> Table:
    table: Table = json.loads(TABLE.read_text(encoding="utf-8"))
    return table
