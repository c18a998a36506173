"""The table of rows where a baseline is faster, with reasons from a file that is written by hand."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sdinpaint.bench.report.rows import WHAT_IT_IS, Row
from sdinpaint.bench.report.tables import Columns, baseline_is_faster, case_of, dtypes, markdown, more_is_better, number
from sdinpaint.errors import SettingError

__all__ = ["UNWRITTEN", "Reason", "read_reasons", "slower_rows", "where_slower"]

Reason = Mapping[str, object]
TEXTS = {"reason", "next"}
UNWRITTEN = "**reason not yet written**"


COLUMNS: Columns[Row] = {
    "part": lambda row: row["part"],
    "what": case_of,
    "family": lambda row: row["family"],
    "dtype": dtypes,
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
    found = [{**row, **_reason_for(row, reasons)} for row in slower_rows(rows)]
    return markdown(COLUMNS, found) if found else "Nowhere in these rows.\n"


def slower_rows(rows: Iterable[Row]) -> list[Row]:
    """List the rows where a baseline is faster.

    Args:
        rows: rows of the suite.

    Returns:
        Those rows. "pictures a minute" says the same as "picture", and is left out.
    """
    return [row for row in rows if baseline_is_faster(row) and not more_is_better(row)]


def read_reasons(path: Path) -> list[Reason]:
    """Read the [[case]] tables of a TOML file, each of which is about the rows that agree with it.

    Args:
        path: the file.

    Returns:
        The tables; none where there is no file.

    Raises:
        SettingError: one lacks `reason` or `next`, or has another key than the fields that identify rows.
    """
    if not path.is_file():
        return []
    try:
        found: list[Reason] = tomllib.loads(path.read_text(encoding="utf-8")).get("case", [])
    except tomllib.TOMLDecodeError as error:
        raise SettingError("BENCH_REASONS", str(path), str(error), expected="a TOML file") from error
    for case in found:
        if not isinstance(case, dict) or not TEXTS <= case.keys() <= {*TEXTS, *WHAT_IT_IS}:
            expected = f"a [[case]] with reason, next, and fields of its rows: {', '.join(WHAT_IT_IS)}"
            raise SettingError("BENCH_REASONS", str(path), f"{case!r}", expected=expected)
    return found


def _reason_for(row: Row, reasons: Iterable[Reason]) -> Reason:
    for case in reasons:
        if all(row[name] == value for name, value in case.items() if name not in TEXTS):
            return case
    return {"reason": UNWRITTEN, "next": ""}
