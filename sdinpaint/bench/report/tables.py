"""Rows as Markdown tables, one for every part, family, device and processor kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.rows import WHAT_IT_IS, Row, by_kind, grouped, machine

__all__ = [
    "Columns",
    "Section",
    "baseline_is_faster",
    "by_case",
    "case_of",
    "dtypes",
    "limits_reached",
    "markdown",
    "more_is_better",
    "number",
    "ratio_cell",
    "sections",
    "table",
    "title",
]

T = TypeVar("T")
Columns = Mapping[str, Callable[[T], str]]
Section = tuple[str, str, str, str]
"""Part, family, device and processor kind; the last is "" on a GPU."""

MORE_IS_BETTER = ("1/min",)
"""Units of which more is better; of any other, less is."""


def number(value: float | None) -> str:
    """Write a number with three significant digits, and as an integer from 100 on.

    Args:
        value: the number.

    Returns:
        The text; "" for None.
    """
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def more_is_better(row: Row) -> bool:
    """Tell whether a larger value of a row is better.

    Args:
        row: a row of the suite.

    Returns:
        True for a rate.
    """
    return row["unit"] in MORE_IS_BETTER


def baseline_is_faster(row: Row) -> bool:
    """Tell whether the baseline of a row takes less time or memory than sdinpaint, or has a higher rate.

    Args:
        row: a row of the suite.

    Returns:
        False for rows without a ratio.
    """
    ratio = row.get("ratio")
    return ratio is not None and (ratio < 1 if more_is_better(row) else ratio > 1)


def case_of(row: Row) -> str:
    """Name a measurement with its number of steps.

    Args:
        row: a row of the suite.

    Returns:
        A text such as "picture, 20 steps".
    """
    steps = row["steps"]
    return row["what"] if steps is None else f"{row['what']}, {steps} step{'s' * (steps != 1)}"


def dtypes(row: Row) -> str:
    """Name the dtype that is computed in, and that of the files where it is another.

    Args:
        row: a row of the suite.

    Returns:
        A text such as "bfloat16 from float16".
    """
    return row["dtype"] if row["stored"] in (None, row["dtype"]) else f"{row['dtype']} from {row['stored']}"


def limits_reached(row: Row) -> dict[str, str]:
    """Describe where a curve's fitted powers meet the limits.

    Args:
        row: a row of the part "growth".

    Returns:
        By limit, a text such as "300 s at 1360 x 1360".
    """
    scales = {"seconds": (1, "s"), "bytes": (1e-9, "GB")}
    return {
        name: f"{number(row['limits'][name] * scales[name][0])} {scales[name][1]} at {_amount(row, amount)}"
        for name, amount in row["reaches"].items()
        if amount is not None
    }


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows that differ in the system alone, ours first.

    Args:
        rows: rows of the suite.

    Returns:
        The rows of each case.
    """
    cases = grouped(rows, _case).values()
    return [sorted(case, key=lambda row: row["system"] != OURS) for case in cases]


def ratio_cell(row: Row) -> str:
    """Write the ratio to the baseline, bold where the baseline is faster.

    Args:
        row: a row of the suite.

    Returns:
        A cell of a table.
    """
    said = number(row["ratio"])
    return f"**{said}**" if baseline_is_faster(row) else said


def _case(row: Row) -> tuple[object, ...]:
    return (*(row[name] for name in WHAT_IT_IS if name != "system"), machine(row))


def _plain(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None else str(row[name])


def _score(name: str, scale: float = 1) -> Callable[[Row], str]:
    return lambda row: number(row[name] * scale)


def _power(cost: str) -> Callable[[Row], str]:
    """Return a column of the powers over all points, and over the last two."""

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
    "ratio to baseline": ratio_cell,
    "% of roofline": lambda row: number(row.get("percent_of_floor")),
    "check": _plain("check"),
}
SCORED: Columns[Row] = {
    "steps": _plain("steps"),
    "sampler": _plain("sampler"),
    "dtype": _plain("dtype"),
    "seconds per image": _score("seconds"),
    "processor seconds": _score("cpu_seconds"),
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
    "power of processor time": _power("cpu_seconds"),
    "power of memory": _power("bytes"),
    "ended by": lambda row: row["ended_by"] or "",
    "where the power meets the limits": lambda row: "; ".join(limits_reached(row).values()),
}
JOINED: Columns[Row] = {
    "blend": _plain("blend"),
    "match_color": lambda row: "yes" if row["match_color"] else "no",
    "cover": _plain("cover"),
    "seam": _score("seam"),
    "ring delta E": _score("ring_delta_e"),
    "colour right, %": _score("right_color", 100),
    "shape right, %": _score("right_shape", 100),
    "check": _plain("check"),
}
COLUMNS: Mapping[str, Columns[Row]] = {"quality": SCORED, "growth": GROWN, "seams": JOINED}
"""The columns of parts whose rows hold more than percentiles."""
BESIDE = "defects"
"""The part whose table has a column for each system."""


def sections(rows: Iterable[Row]) -> dict[Section, list[Row]]:
    """Group rows by part, family, device and processor kind; the kinds of one family follow each other.

    Args:
        rows: rows of the suite.

    Returns:
        The rows by section.
    """
    families = grouped(rows, lambda row: (row["part"], row["family"], row["device"]))
    return {(*name, kind): found for name, of_it in families.items() for kind, found in by_kind(of_it).items()}


def title(section: Section) -> str:
    """Write the heading of a section.

    Args:
        section: part, family, device and kind.

    Returns:
        A text such as "step: sd15, cpu, avx2 (pretended)".
    """
    part, *where = section
    return f"{part}: {', '.join(filter(None, where))}"


def table(rows: Sequence[Row]) -> str:
    """Write the table of a section, with a line for every row, ours before the baselines'.

    Args:
        rows: of one part. Of several machines, each line says its own.

    Returns:
        Markdown.
    """
    if rows[0]["part"] == BESIDE:
        return _beside(rows)
    lines = [row for case in by_case(rows) for row in case]
    columns = COLUMNS.get(lines[0]["part"], MEASURED)
    return markdown(columns if len({*map(machine, lines)}) == 1 else {"machine": machine, **columns}, lines)


def _beside(rows: Sequence[Row]) -> str:
    """Write a line for every case, with what was found in each system."""

    def of(system: str) -> Callable[[Mapping[str, Row]], str]:
        return lambda case: _found(case[system]["found"]) if system in case else ""

    def first(name: str) -> Callable[[Mapping[str, Row]], str]:
        return lambda case: str(next(iter(case.values()))[name])

    cases = [{row["system"]: row for row in case} for case in by_case(rows)]
    systems = {system: of(system) for case in cases for system in case}
    return markdown({"what": first("what"), "unit": first("unit"), **systems, "how": first("how")}, cases)


def _found(value: object) -> str:
    """Write a number, a list of numbers, or a text."""
    if isinstance(value, list):
        return "; ".join(map(_found, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float | int) else str(value)


def markdown(columns: Columns[T], lines: Sequence[T]) -> str:
    """Write a table.

    Args:
        columns: by heading, a function of a line that returns the cell.
        lines: the lines.

    Returns:
        Markdown.
    """
    rows = [list(columns), ["---"] * len(columns), *([cell(line) for cell in columns.values()] for line in lines)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)
