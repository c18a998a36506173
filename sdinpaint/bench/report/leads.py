"""Where a peer leads, from the rows, and why it does, from a file that is written by hand."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sdinpaint.bench.report.rows import WHAT_IT_IS, Row
from sdinpaint.bench.report.tables import Columns, case_of, dtypes, markdown, number, peer_leads
from sdinpaint.errors import SettingError

__all__ = ["UNWRITTEN", "Reason", "leads", "read_reasons"]

Reason = Mapping[str, object]
TEXTS = {"reason", "next"}
UNWRITTEN = "**reason not yet written**"


COLUMNS: Columns[Row] = {
    "part": lambda row: row["part"],
    "what": case_of,
    "family": lambda row: row["family"],
    "dtype": dtypes,
    "leads": lambda row: row["system"],
    "sdinpaint / it": lambda row: number(row["ratio"]),
    "reason": lambda row: row["reason"],
    "next idea": lambda row: row["next"],
}


def leads(rows: Iterable[Row], reasons: Sequence[Reason]) -> str:
    """A line for every row where a peer leads, with the first reason that is for it, and the next idea."""
    led = [{**row, **_reason_for(row, reasons)} for row in rows if peer_leads(row)]
    return markdown(COLUMNS, led) if led else "Nowhere, in the rows above.\n"


def read_reasons(path: Path) -> list[Reason]:
    """The [[lead]]s of a TOML file: each is for the rows that agree with it; none where there is no file.

    Raises: SettingError for one without `reason` and `next`, or with what tells no rows apart.
    """
    if not path.is_file():
        return []
    try:
        found: list[Reason] = tomllib.loads(path.read_text(encoding="utf-8")).get("lead", [])
    except tomllib.TOMLDecodeError as error:
        raise SettingError("BENCH_REASONS", str(path), str(error), expected="a TOML file") from error
    for lead in found:
        if not isinstance(lead, dict) or not TEXTS <= lead.keys() <= {*TEXTS, *WHAT_IT_IS}:
            expected = f"a [[lead]] with reason, next, and of {', '.join(WHAT_IT_IS)} what its rows have in common"
            raise SettingError("BENCH_REASONS", str(path), f"{lead!r}", expected=expected)
    return found


def _reason_for(row: Row, reasons: Iterable[Reason]) -> Reason:
    for lead in reasons:
        if all(row[name] == value for name, value in lead.items() if name not in TEXTS):
            return lead
    return {"reason": UNWRITTEN, "next": ""}
