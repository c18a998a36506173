"""What a person reads of the rows: the page of all tables with its pictures, and the README's short version."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdinpaint_weights.atomic import atomic_write

from sdinpaint.bench.parts import PARTS
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.bars import draw_bars, draw_floors, draw_modes
from sdinpaint.bench.report.leads import leads, read_reasons
from sdinpaint.bench.report.plots import draw_growth, draw_quality
from sdinpaint.bench.report.rows import Row, grouped, latest
from sdinpaint.bench.report.tables import by_case, case_of, dtypes, markdown, number, ratio_cell, sections, table, title
from sdinpaint.errors import SettingError, warn

__all__ = ["BEGIN", "CHECKOUT", "END", "Places", "headline", "tables", "with_headline", "write_pages"]

PAGE = "bench.md"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
"""What the README's short version stands between."""
ABOUT = """\
Of the latest rows in `benchmarks/results`; what the parts are and how a ratio is formed: [README.md](README.md).
sdinpaint / it: the median over rounds of what sdinpaint takes for each one of what the system takes; bold where it
takes more."""
HEADLINES = {
    ("step", "guided step"): "guided step",
    ("step", "VAE decode"): "VAE decode",
    ("picture", "picture"): "whole picture",
    ("picture", "first picture, new process"): "first picture of a new process",
    ("load", "load, with the weights in memory"): "load, weights in memory",
    ("memory", "step, peak memory"): "peak memory of a step",
}
"""What the README shows, by part and what, in its words."""
HEADLINE_OF = {"family": "sd15", "device": "cpu", "quick": False}
"""What its rows are of."""
DRAWN: Mapping[str, Callable[[Sequence[Row], Path], None]] = {
    "quality": draw_quality,
    "growth": draw_growth,
    "kernels": draw_floors,
    "modes": draw_modes,
}
"""How the rows of a part are drawn, where not as bars."""


@dataclass(frozen=True)
class Places:
    """The folder of the rows, that of the page and its pictures, and the README."""

    rows: Path
    pages: Path
    readme: Path | None = None

    @property
    def reasons(self) -> Path:
        """Why a peer leads; written by hand."""
        return self.pages / "leads.toml"


CHECKOUT = Places(Path("benchmarks/results"), Path("docs/benchmarks"), Path("README.md"))


def write_pages(places: Places, refused: Sequence[str] = ()) -> None:
    """Write bench.md, a picture for every section of it, and the README's table, from the latest rows.

    What was refused is told at the end of bench.md. Without matplotlib there are no pictures, and a warning.
    Raises: SettingError for a leads.toml that cannot be used; OSError.
    """
    files = [places.rows / f"{part}.jsonl" for part in (*PARTS, "growth")]
    rows = latest(file for file in files if file.is_file())
    if not rows:
        return
    told = "".join(f"\nRefused: {reason}\n" for reason in refused)
    _write(places.pages / PAGE, _page(rows, places.reasons) + told)
    if places.readme is not None:
        _write(places.readme, with_headline(places.readme.read_text(encoding="utf-8"), rows))
    try:
        for name, found in sections(rows).items():
            DRAWN.get(name[0], draw_bars)(found, places.pages / _picture(*name))
    except SettingError as error:
        warn(f"{error}; the tables are written, without pictures")


def tables(rows: Iterable[Row]) -> str:
    """A table for every part and family, each under its heading."""
    return "\n".join(f"{title(name)}\n{table(found)}" for name, found in sections(rows).items())


def with_headline(readme: str, rows: Iterable[Row]) -> str:
    """The README with `headline` between its markers; as it is without them, or where there are no such rows."""
    said = headline(rows)
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{said}{end}{after}" if said and end else readme


def headline(rows: Iterable[Row]) -> str:
    """Of SD 1.5 on the CPU: what ours takes, and that for each one of what a peer takes; "" without such rows."""
    shown = [row for row in rows if _headed(row) in HEADLINES and HEADLINE_OF.items() <= row.items()]
    shown.sort(key=lambda row: [*HEADLINES].index(_headed(row)))
    cases = [{row["system"]: row for row in case} for case in by_case(shown)]
    peers = {row["system"]: None for row in shown if row["system"] != OURS}

    def of_peer(peer: str) -> Callable[[Mapping[str, Row]], str]:
        return lambda case: ratio_cell(case[peer]) if peer in case else ""

    columns: dict[str, Callable[[Mapping[str, Row]], str]] = {
        "": lambda case: case_of({**case[OURS], "what": HEADLINES[_headed(case[OURS])]}),
        "dtype": lambda case: dtypes(case[OURS]),
        OURS: lambda case: f"{number(case[OURS]['p50'])} {case[OURS]['unit']}",
        **{f"/ {peer}": of_peer(peer) for peer in peers},
    }
    compared = [case for case in cases if OURS in case]
    return markdown(columns, compared) if compared else ""


def _headed(row: Row) -> tuple[str, str]:
    return row["part"], row["what"]


def _page(rows: Sequence[Row], reasons: Path) -> str:
    """All rows, section by section, where they come from, and where a peer leads."""
    said = ["# Benchmarks", ABOUT]
    for name, found in sections(rows).items():
        said += [f"## {title(name)}", f"![{title(name)}]({_picture(*name)})", table(found).rstrip()]
    said += ["## Where a peer leads", leads(rows, read_reasons(reasons)).rstrip()]
    said += ["## Where the rows come from", _environments(rows)]
    return "\n\n".join(said) + "\n"


def _environments(rows: Iterable[Row]) -> str:
    found = grouped(rows, lambda row: ", ".join(f"{name} {value}" for name, value in row["environment"].items()))
    return "\n".join(f"- {', '.join({row['part']: None for row in part})}: {said}" for said, part in found.items())


def _picture(*name: str) -> str:
    """The name of a section's file: a checkpoint of the user's may have any name."""
    return re.sub(r"[^\w.-]", "_", "-".join(name)) + ".png"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
