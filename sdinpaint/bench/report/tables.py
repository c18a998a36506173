"""The rows as Markdown tables: one for every part and family, with a line for every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.rows import WHAT_IT_IS, Row, grouped

__all__ = [
    "Columns",
    "by_case",
    "case_of",
    "dtypes",
    "limits_reached",
    "markdown",
    "number",
    "peer_leads",
    "ratio_cell",
    "sections",
    "table",
    "title",
]

T = TypeVar("T")
Columns = Mapping[str, Callable[[T], str]]

MORE_IS_BETTER = ("1/min",)
"""Units; of any other, less is."""


def number(value: float | None) -> str:
    """Three digits that count, none behind the point from a hundred on; "" for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def peer_leads(row: Row) -> bool:
    """Whether ours takes more than the system of this row, or brings less."""
    ratio = row.get("ratio")
    return ratio is not None and (ratio < 1 if row["unit"] in MORE_IS_BETTER else ratio > 1)


def case_of(row: Row) -> str:
    """What is measured, and with how many steps."""
    return row["what"] if row["steps"] is None else f"{row['what']}, {row['steps']} steps"


def dtypes(row: Row) -> str:
    """What it is run in, and what the files hold where that is another."""
    return row["dtype"] if row["stored"] in (None, row["dtype"]) else f"{row['dtype']} from {row['stored']}"


def limits_reached(row: Row) -> dict[str, str]:
    """Of a curve: by limit, what it is and the amount that meets it as the fitted power goes on."""
    scales = {"seconds": (1, "s"), "bytes": (1e-9, "GB")}
    return {
        name: f"{number(row['limits'][name] * scales[name][0])} {scales[name][1]} at {_amount(row, amount)}"
        for name, amount in row["reaches"].items()
        if amount is not None
    }


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of every case, ours before its peers'."""
    cases = grouped(rows, lambda row: tuple(row[name] for name in WHAT_IT_IS if name != "system")).values()
    return [sorted(case, key=lambda row: row["system"] != OURS) for case in cases]


def ratio_cell(row: Row) -> str:
    """What ours takes for each one of it, bold where that is worse."""
    said = number(row["ratio"])
    return f"**{said}**" if peer_leads(row) else said


def _plain(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None else str(row[name])


def _score(name: str, scale: float = 1) -> Callable[[Row], str]:
    return lambda row: number(row[name] * scale)


def _power(cost: str) -> Callable[[Row], str]:
    """Of all points, and of the last two."""

    def said(row: Row) -> str:
        powers = [row[field][cost] for field in ("exponent", "last_exponent")]
        return "; ".join(f"{power:.2f}" for power in powers if power is not None)

    return said


def _amount(row: Row, amount: float) -> str:
    return f"{amount**0.5:.0f} x {amount**0.5:.0f}" if row["grows"] == "pixels" else f"{amount:.0f}"


MEASURED: Columns[Row] = {
    "what": case_of,
    "dtype": _plain("dtype"),
    "stored": _plain("stored"),
    "size": _plain("size"),
    "system": _plain("system"),
    "p50 (p20-p80)": lambda row: f"{number(row['p50'])} ({number(row['p20'])}-{number(row['p80'])})",
    "unit": _plain("unit"),
    "sdinpaint / it": ratio_cell,
    "% of floor": lambda row: number(row.get("percent_of_floor")),
    "check": _plain("check"),
}
SCORED: Columns[Row] = {
    "steps": _plain("steps"),
    "sampler": _plain("sampler"),
    "dtype": _plain("dtype"),
    "seconds a picture": _score("seconds"),
    "of the processor": _score("cpu_seconds"),
    "colour right, %": _score("right_color", 100),
    "shape right, %": _score("right_shape", 100),
    "seam": _score("seam"),
    "ring delta E": _score("ring_delta_e"),
}
GROWN: Columns[Row] = {
    "grows": _plain("grows"),
    "dtype": _plain("dtype"),
    "from": lambda row: _amount(row, row["amount"][0]),
    "to": lambda row: _amount(row, row["amount"][-1]),
    "power of time; of its last two points": _power("seconds"),
    "of processor time": _power("cpu_seconds"),
    "of memory": _power("bytes"),
    "ended by": lambda row: row["ended_by"] or "",
    "where the power meets the limits": lambda row: "; ".join(limits_reached(row).values()),
}
COLUMNS: Mapping[str, Columns[Row]] = {"quality": SCORED, "growth": GROWN}
"""Of the parts whose rows hold more than percentiles."""


def sections(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The rows by part, family and device."""
    return grouped(rows, lambda row: (row["part"], row["family"], row["device"]))


def title(section: tuple[str, str, str]) -> str:
    """What stands above it."""
    part, family, device = section
    return f"{part}: {family}, {device}"


def table(rows: Sequence[Row]) -> str:
    """Of one part: a line for every row, ours before its peers'."""
    lines = [row for case in by_case(rows) for row in case]
    return markdown(COLUMNS.get(lines[0]["part"], MEASURED), lines)


def markdown(columns: Columns[T], lines: Sequence[T]) -> str:
    """A table of what each column says of each line."""
    rows = [list(columns), ["---"] * len(columns), *([cell(line) for cell in columns.values()] for line in lines)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)
