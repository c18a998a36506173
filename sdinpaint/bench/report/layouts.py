"""diffusers in its two layouts of memory: summaries compare with the one that is faster on the machine."""

from __future__ import annotations

from collections.abc import Iterable

from sdinpaint.bench.report.rows import Row
from sdinpaint.bench.report.tables import by_case, more_is_better, ratio_cell

__all__ = ["LAYOUTS", "faster_layouts", "layout_cell", "library"]

LAYOUTS = {"diffusers": "", "diffusers-channels-last": " (channels-last)"}
"""The systems that are one library in another layout, and what is said of each behind its ratio."""


def faster_layouts(rows: Iterable[Row]) -> list[Row]:
    """Leave out the rows of the layout of diffusers that is slower, or takes more memory, in the same measurement.

    Args:
        rows: rows of the suite.

    Returns:
        The other rows, in their order. What counts is the ratio, since the two may be of different runs.
    """
    rows, slower = list(rows), set()
    for case in by_case(row for row in rows if row["system"] in LAYOUTS and row["ratio"] is not None):
        case.sort(key=lambda row: row["ratio"], reverse=not more_is_better(case[0]))
        slower |= {id(row) for row in case[1:]}
    return [row for row in rows if id(row) not in slower]


def library(row: Row) -> str:
    """Name the library of a row, whatever its layout.

    Args:
        row: a row of the suite.

    Returns:
        The system, or "diffusers" for each of LAYOUTS.
    """
    return next(iter(LAYOUTS)) if row["system"] in LAYOUTS else row["system"]


def layout_cell(row: Row) -> str:
    """Write the ratio to the baseline, and in which layout it is where that is not the default one.

    Args:
        row: a row of the suite.

    Returns:
        A cell of a table.
    """
    return f"{ratio_cell(row)}{LAYOUTS.get(row['system'], '')}"
