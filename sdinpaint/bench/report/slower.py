"""The table of rows where a baseline is faster, with reasons from a file that is written by hand."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sdinpaint.bench.report.layouts import faster_layouts
from sdinpaint.bench.report.rows import WHAT_IT_IS, Row, machine
from sdinpaint.bench.report.tables import Columns, baseline_is_faster, case_of, dtypes, markdown, more_is_better, number
from sdinpaint.errors import SettingError

__all__ = ["UNWRITTEN", "Reason", "open_questions", "read_reasons", "slower_rows", "where_slower"]

Reason = Mapping[str, object]
TEXTS = {"reason", "next"}
FIELDS = {*WHAT_IT_IS, "kind"}
"""The fields by which a reason names its rows; each is a value, or a list of values."""
UNWRITTEN = "**reason not yet written**"
CASE = "[[case]]"


COLUMNS: Columns[Row] = {
    "part": lambda row: row["part"],
    "what": case_of,
    "family": lambda row: row["family"],
    "size": lambda row: str(row["size"] or ""),
    "dtype": dtypes,
    "machine": machine,
    "baseline": lambda row: row["system"],
    "ratio to baseline": lambda row: number(row["ratio"]),
    "reason": lambda row: row["reason"],
    "next idea": lambda row: row["next"],
}


def where_slower(rows: Iterable[Row], reasons: Sequence[Reason]) -> str:
    """Write a table of the rows where a baseline is faster, with the reason and the next idea.

    Args:
        rows: rows of the suite.
        reasons: of them, the first that agrees with a row is shown.

    Returns:
        Markdown.
    """
    unwritten = {"reason": UNWRITTEN, "next": ""}
    found = [{**row, **(_reason_for(row, reasons) or unwritten)} for row in slower_rows(rows)]
    return markdown(COLUMNS, found) if found else "Nowhere in these rows.\n"


def slower_rows(rows: Iterable[Row]) -> list[Row]:
    """List the rows where a baseline is faster, of diffusers those of its faster layout.

    Args:
        rows: rows of the suite.

    Returns:
        Those rows. "pictures a minute" says the same as "picture", and is left out.
    """
    return [row for row in faster_layouts(rows) if baseline_is_faster(row) and not more_is_better(row)]


def open_questions(rows: Iterable[Row], path: Path) -> list[str]:
    """List the rows where a baseline is faster for no reason that is written, and the reasons that no row needs.

    Args:
        rows: rows of the suite.
        path: the file of reasons.

    Returns:
        Texts that begin with the path, and the line where a reason stands.

    Raises:
        SettingError: the file cannot be used.
    """
    reasons = read_reasons(path)
    found = [(row, _reason_for(row, reasons)) for row in slower_rows(rows)]
    used = [id(reason) for _, reason in found]
    said = [f"{path}: no reason for {_named(row)}" for row, reason in found if reason is None]
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    places = [number for number, line in enumerate(text.splitlines(), start=1) if line.strip() == CASE]
    unused = [place for reason, place in zip(reasons, places, strict=True) if id(reason) not in used]
    return said + [f"{path}:{place}: there is no row where a baseline is faster for this reason" for place in unused]


def read_reasons(path: Path) -> list[Reason]:
    """Read the [[case]] tables of a TOML file, each of which is about the rows that agree with it.

    Args:
        path: the file.

    Returns:
        The tables; none where there is no file.

    Raises:
        SettingError: one lacks `reason` or `next`, or has another key than FIELDS.
    """
    if not path.is_file():
        return []
    try:
        found: list[Reason] = tomllib.loads(path.read_text(encoding="utf-8")).get("case", [])
    except tomllib.TOMLDecodeError as error:
        raise SettingError("BENCH_REASONS", str(path), str(error), expected="a TOML file") from error
    for case in found:
        known = isinstance(case, dict) and TEXTS <= case.keys() <= TEXTS | FIELDS
        if not known or not all(isinstance(case[name], str) and case[name] for name in TEXTS):
            expected = f"a {CASE} with reason, next, and fields of its rows: {', '.join(WHAT_IT_IS)}, kind"
            raise SettingError("BENCH_REASONS", str(path), f"{case!r}", expected=expected)
    return found


def _reason_for(row: Row, reasons: Iterable[Reason]) -> Reason | None:
    """Return the first reason that agrees with a row."""
    known = {**row, "kind": row.get("environment", {}).get("kind")}
    for case in reasons:
        given = {name: value if isinstance(value, list) else [value] for name, value in case.items()}
        if all(known[name] in values for name, values in given.items() if name not in TEXTS):
            return case
    return None


def _named(row: Row) -> str:
    what = f"{row['part']}, {case_of(row)}, {row['family']} at {row['size']} in {dtypes(row)}, {machine(row)}"
    return f"{what}: {row['system']} is faster, ratio {number(row['ratio'])}"
