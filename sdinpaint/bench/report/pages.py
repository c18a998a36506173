"""The pages made of the rows: a summary with plots and tables, and the short table of the README."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdinpaint_weights.atomic import atomic_write

from sdinpaint.bench.parts import PARTS
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.bars import draw_bars, draw_modes, draw_roofline, draw_seams
from sdinpaint.bench.report.plots import draw_growth, draw_quality
from sdinpaint.bench.report.rows import Row, grouped, identity, latest, lines_of, machine, row_of
from sdinpaint.bench.report.slower import read_reasons, slower_rows, where_slower
from sdinpaint.bench.report.summary import summary
from sdinpaint.bench.report.tables import by_case, case_of, dtypes, markdown, number, ratio_cell, sections, table, title
from sdinpaint.errors import SettingError, warn

__all__ = [
    "BEGIN",
    "CHECKOUT",
    "END",
    "Places",
    "headline",
    "pages",
    "prune",
    "read_rows",
    "tables",
    "with_headline",
    "write_pages",
]

PAGE = "bench.md"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
"""The markers of the README's table."""
LONG = 40
"""Lines of a table from which on it is a file of its own."""
ABOUT = """\
The ratio to a baseline is what sdinpaint takes over what the baseline takes: the median over interleaved rounds. Below
1 sdinpaint is faster, or needs less memory; a ratio above 1 is bold. Several values in a cell belong to the dtypes of
the line. What the parts measure: [README.md](README.md). The rows are in `benchmarks/results`; `sdinpaint bench pages`
makes this page of them."""
HEADLINES = {
    ("step", "guided step"): "guided step",
    ("step", "VAE decode"): "VAE decode",
    ("picture", "picture"): "whole image",
    ("picture", "first picture, new process"): "first image of a new process",
    ("load", "load, with the weights in memory"): "load, weights in memory",
    ("memory", "step, peak memory"): "peak memory of a step",
}
"""The measurements in the README's table by part and `what`, and their names there."""
HEADLINE_OF = {"family": "sd15", "device": "cpu", "quick": False}
"""Fields of the rows in the README's table."""
DRAWN: Mapping[str, Callable[[Sequence[Row], Path], None]] = {
    "quality": draw_quality,
    "growth": draw_growth,
    "kernels": draw_roofline,
    "tuning": draw_roofline,
    "seams": draw_seams,
    "modes": draw_modes,
}
"""The functions that draw a part, where bars beside the baselines do not fit."""
UNDRAWN = ("defects",)
"""Parts without a plot."""


@dataclass(frozen=True)
class Places:
    """The folders of rows and of pages, and the README."""

    rows: Path
    pages: Path
    readme: Path | None = None

    @property
    def reasons(self) -> Path:
        """The file that says why a baseline is faster; it is written by hand."""
        return self.pages / "reasons.toml"


UNSHOWN = ("forms",)
"""Parts whose rows make a table of the kernels, and none for people."""
CHECKOUT = Places(Path("benchmarks/results"), Path("docs/benchmarks"), Path("README.md"))


def read_rows(places: Places) -> list[Row]:
    """Read the latest rows of all parts.

    Args:
        places: where they are.

    Returns:
        The rows by part, in the order in which each measurement first appears.
    """
    return latest(file for file in _files(places) if file.is_file() and file.stem not in UNSHOWN)


def write_pages(places: Places, refused: Sequence[str] = ()) -> None:
    """Write bench.md, the files of long tables, a plot for each section, and the README's table.

    Without matplotlib there are no plots, and a warning.

    Args:
        places: where the rows are, and where the pages go. Without rows nothing is written.
        refused: reasons why something was not measured, for the end of bench.md.

    Raises:
        SettingError: reasons.toml cannot be used.
        OSError: a file cannot be written.
    """
    rows = read_rows(places)
    if not rows:
        return
    for name, text in pages(rows, places, refused).items():
        _write(places.pages / name, text)
    if places.readme is not None:
        _write(places.readme, with_headline(places.readme.read_text(encoding="utf-8"), rows))
    try:
        for section, found in sections(rows).items():
            if section[0] not in UNDRAWN:
                DRAWN.get(section[0], draw_bars)(found, places.pages / f"{_file(*section)}.png")
    except SettingError as error:
        warn(f"{error}; the tables are written, without plots")


def pages(rows: Sequence[Row], places: Places, refused: Sequence[str] = ()) -> dict[str, str]:
    """Make the Markdown files of the latest rows.

    Args:
        rows: the latest rows.
        places: where the reasons are.
        refused: reasons why something was not measured.

    Returns:
        Texts by the name of the file: bench.md, and one for each long table.

    Raises:
        SettingError: reasons.toml cannot be used.
    """
    found = {name: (of_it, table(of_it)) for name, of_it in sections(rows).items()}
    texts = {
        f"{_file(*name)}.md": f"# {title(name)}\n\n[bench.md]({PAGE}) has the plot and the summary.\n\n{said}"
        for name, (_, said) in found.items()
        if said.count("\n") > LONG
    }
    said = ["# Benchmarks", ABOUT, "## Summary", _summary(rows), "## Where a baseline is faster"]
    said.append(where_slower(rows, read_reasons(places.reasons)).rstrip())
    for name, (of_it, lines) in found.items():
        said.append(f"## {title(name)}")
        said.append("; ".join(dict.fromkeys(filter(None, map(machine, of_it)))))
        if name[0] not in UNDRAWN:
            said.append(f"![{title(name)}]({_file(*name)}.png)")
        linked = f"{_file(*name)}.md"
        said.append(f"All {len(of_it)} rows: [{linked}]({linked})." if linked in texts else lines.rstrip())
    said += ["## Environments", _environments(rows)]
    said += [f"Refused: {reason}" for reason in refused]
    return {PAGE: "\n\n".join(filter(None, said)) + "\n", **texts}


def prune(places: Places) -> dict[str, int]:
    """Remove rows that a later row of the same measurement on the same machine supersedes.

    Lines that are no rows of the suite stay.

    Args:
        places: where the rows are.

    Returns:
        By file name, how many rows were removed.

    Raises:
        OSError: a file cannot be written.
    """
    removed = {}
    for file in _files(places):
        if not file.is_file():
            continue
        lines = lines_of(file)
        known = [identity(row_of(line)) for line in lines]
        last = {one: index for index, one in enumerate(known)}
        kept = [line for index, line in enumerate(lines) if known[index] is None or last[known[index]] == index]
        if len(kept) < len(lines):
            _write(file, "".join(f"{line}\n" for line in kept))
            removed[file.name] = len(lines) - len(kept)
    return removed


def _files(places: Places) -> list[Path]:
    return [places.rows / f"{part}.jsonl" for part in (*PARTS, "growth")]


def tables(rows: Iterable[Row]) -> str:
    """Write a table for every part, family and device, each under its heading.

    Args:
        rows: rows of the suite.

    Returns:
        Text with Markdown tables.
    """
    return "\n".join(f"{title(name)}\n{table(found)}" for name, found in sections(rows).items())


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
    """Write the README's table: SD 1.5 on the CPU, with the ratio to each baseline.

    Args:
        rows: rows of the suite; those of the machine that comes last are shown.

    Returns:
        Markdown; "" without such rows.
    """
    shown = [row for row in rows if _headed(row) in HEADLINES and HEADLINE_OF.items() <= row.items()]
    shown = [row for row in shown if machine(row) == machine(shown[-1])]
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


def _summary(rows: Sequence[Row]) -> str:
    """Write what was measured in one sentence, and the ratios."""
    machines = "; ".join(dict.fromkeys(filter(None, map(machine, rows))))
    compared = sum(row.get("ratio") is not None for row in rows)
    slower = len(slower_rows(rows))
    dates = sorted({row["environment"]["date"] for row in rows if "date" in row.get("environment", {})})
    when = f", {dates[0]} to {dates[-1]}" if len(dates) > 1 else f", {dates[0]}" if dates else ""
    said = f"{len(rows)} rows{when}. Of the {compared} with a ratio to a baseline, the baseline is faster in {slower}. "
    said += f"Machines: {machines or 'unknown'}."
    return "\n\n".join(filter(None, (said, summary(rows).rstrip())))


def _environments(rows: Iterable[Row]) -> str:
    found = grouped(rows, lambda row: ", ".join(f"{name} {value}" for name, value in row["environment"].items()))
    return "\n".join(f"- {', '.join({row['part']: None for row in part})}: {said}" for said, part in found.items())


def _file(*name: str) -> str:
    """Return the name of a section's files without their ending; a checkpoint may have any name."""
    return re.sub(r"[^\w.-]", "_", "-".join(name))


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
