"""The short table of the README: SD 1.5 on the CPU, two processor kinds side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.kinds import PRETENDED, kind_of
from sdinpaint.bench.report.layouts import faster_layouts, layout_cell, library
from sdinpaint.bench.report.rows import Row, by_kind, grouped, machine
from sdinpaint.bench.report.tables import case_of, dtypes, markdown, number

__all__ = ["BEGIN", "END", "headline", "with_headline"]

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
"""The markers of the README's table."""
HEADLINES = {
    ("step", "guided step"): "guided step",
    ("step", "VAE decode"): "VAE decode",
    ("picture", "picture"): "whole image",
    ("picture", "first picture, new process"): "first image of a new process",
    ("load", "load, with the weights in memory"): "load, weights in memory",
    ("memory", "step, peak memory"): "peak memory of a step",
}
"""The measurements by part and `what`, and their names in the table."""
HEADLINE_OF = {"family": "sd15", "device": "cpu", "size": 512, "quick": False}
"""Fields of the rows in the table."""

Line = Mapping[tuple[str, str], Row]
"""The rows of one measurement in one dtype, by kind and library."""


def with_headline(readme: str, rows: Iterable[Row]) -> str:
    """Replace the table between the README's markers.

    Args:
        readme: its text.
        rows: rows of the suite.

    Returns:
        The text with `headline`; unchanged without the markers, or where there are no such rows.
    """
    said = headline(rows)
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{said}{end}{after}" if said and end else readme


def headline(rows: Iterable[Row]) -> str:
    """Write the README's table: what sdinpaint takes, and the ratio to each baseline, for one processor kind or two.

    Args:
        rows: rows of the suite; of each kind, those of the machine that comes last are shown.

    Returns:
        Markdown; "" without such rows.
    """
    order = [*HEADLINES]
    known = faster_layouts(row for row in rows if _measured(row) in HEADLINES and HEADLINE_OF.items() <= row.items())
    kinds = _two({kind: found for kind, found in by_kind(known).items() if OURS in {row["system"] for row in found}})
    last = {kind: [row for row in found if machine(row) == machine(found[-1])] for kind, found in kinds.items()}
    shown = sorted((row for found in last.values() for row in found), key=lambda row: order.index(_measured(row)))
    cases = grouped(shown, lambda row: (HEADLINES[_measured(row)], row["steps"], dtypes(row))).values()
    lines = [{(kind_of(row), library(row)): row for row in case} for case in cases]
    columns: dict[str, Callable[[Line], str]] = {"": _what, "dtype": lambda line: dtypes(_first(line))}
    for kind, found in last.items():
        before = f"{kind}: " * (len(last) > 1)
        peers = sorted({library(row) for row in found if row["system"] != OURS})
        columns[f"{before}{OURS}"] = _cell(kind, OURS, lambda row: f"{number(row['p50'])} {row['unit']}")
        columns |= {f"{before}/ {peer}": _cell(kind, peer, layout_cell) for peer in peers}
    compared = [line for line in lines if OURS in {system for _, system in line}]
    return markdown(columns, compared) if compared else ""


def _two(kinds: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Choose the first kind, and of the others one that a machine had, or the narrowest that was pretended."""
    first, *others = [*kinds] or [""]
    had = [kind for kind in others if not kind.endswith(PRETENDED)]
    return {kind: kinds[kind] for kind in (first, *(had[:1] or others[-1:])) if kind in kinds}


def _measured(row: Row) -> tuple[str, str]:
    return row["part"], row["what"]


def _first(line: Line) -> Row:
    return next(iter(line.values()))


def _what(line: Line) -> str:
    row = _first(line)
    return case_of({**row, "what": HEADLINES[_measured(row)]})


def _cell(kind: str, system: str, said: Callable[[Row], str]) -> Callable[[Line], str]:
    return lambda line: said(line[kind, system]) if (kind, system) in line else ""
