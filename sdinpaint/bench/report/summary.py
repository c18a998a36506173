"""The short table at the top of the page: the ratio to each baseline, by part and family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.layouts import faster_layouts, layout_cell, library
from sdinpaint.bench.report.rows import Row, grouped, machine
from sdinpaint.bench.report.tables import by_case, dtypes, markdown, number

__all__ = ["summary"]

HEADLINES = {
    "load": "load, with the weights in memory",
    "memory": "step, peak memory",
    "step": "guided step",
    "picture": "picture",
    "startup": "--help",
}
"""The measurement that stands for each part."""
SUMMED = {"kernels": "sum of the measured calls"}
"""Parts whose calls are added up, and what the sum is called."""

FIXED = ("part", "what", "family", "size", "dtype", "machine")
MAIN, OTHERS = ("diffusers", "openvino", "torch"), "other baselines"
"""Baselines with a column of their own, and the column of all others."""

Line = Mapping[str, str]


def summary(rows: Iterable[Row]) -> str:
    """Write a line for each part, family, size, device and machine, with the ratio to each baseline by dtype.

    Args:
        rows: rows of the suite.

    Returns:
        Markdown; "" where nothing was compared.
    """
    compared = faster_layouts(row for row in rows if row["part"] in {*HEADLINES, *SUMMED})
    sections = grouped(compared, lambda row: (row["part"], row["family"], row["size"], row["device"], machine(row)))
    lines = [line for found in sections.values() if (line := _line(found))]

    def of(name: str) -> Callable[[Line], str]:
        return lambda line: line.get(name, "")

    shown = (*FIXED, *(name for name in (*MAIN, OTHERS) if any(name in line for line in lines)))
    return markdown({f"/ {name}" if name in MAIN else name: of(name) for name in shown}, lines) if lines else ""


def _line(rows: Sequence[Row]) -> Line:
    """Return the cells of one line by column; nothing where no baseline was measured."""
    part = rows[0]["part"]
    by_dtype = grouped([row for row in rows if HEADLINES.get(part, row["what"]) == row["what"]], dtypes)
    ratios = {name: _summed(found) if part in SUMMED else _ratios(found) for name, found in by_dtype.items()}
    baselines = dict.fromkeys(name for found in ratios.values() for name in found)
    if not baselines:
        return {}
    cells = {name: ", ".join(found.get(name, "-") for found in ratios.values()) for name in baselines}
    others = "; ".join(f"{name} {cell}" for name, cell in cells.items() if name not in MAIN)
    first = rows[0]
    return {
        "part": part,
        "what": SUMMED.get(part) or HEADLINES[part],
        "family": first["family"],
        "size": str(first["size"] or ""),
        "dtype": ", ".join(ratios),
        "machine": machine(first),
        **{name: cell for name, cell in cells.items() if name in MAIN},
        **({OTHERS: others} if others else {}),
    }


def _ratios(rows: Sequence[Row]) -> dict[str, str]:
    return {library(row): layout_cell(row) for row in rows if row["ratio"] is not None}


def _summed(rows: Sequence[Row]) -> dict[str, str]:
    """Return the time of all calls over that of each baseline; calls that only one of them has are left out."""
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for case in by_case(rows):
        systems = {row["system"]: row["count"] * row["p50"] for row in case}
        for name, taken in systems.items():
            if name != OURS:
                ours[name] = ours.get(name, 0.0) + systems.get(OURS, math.nan)
                theirs[name] = theirs.get(name, 0.0) + taken
    return {name: _bold_above_one(ours[name] / theirs[name]) for name in ours if not math.isnan(ours[name])}


def _bold_above_one(ratio: float) -> str:
    return f"**{number(ratio)}**" if ratio > 1 else number(ratio)
