"""The pages made of the rows: a summary, where a baseline is faster and why, plots and tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdinpaint_weights.atomic import atomic_write

from sdinpaint.bench.parts import PARTS
from sdinpaint.bench.report.bars import draw_bars, draw_modes, draw_roofline, draw_seams
from sdinpaint.bench.report.headline import with_headline
from sdinpaint.bench.report.layouts import faster_layouts
from sdinpaint.bench.report.plots import draw_growth, draw_quality
from sdinpaint.bench.report.rows import Row, grouped, identity, latest, lines_of, machines, row_of
from sdinpaint.bench.report.slower import read_reasons, slower_rows, where_slower
from sdinpaint.bench.report.summary import summary
from sdinpaint.bench.report.tables import sections, table, title
from sdinpaint.errors import SettingError, warn

__all__ = ["CHECKOUT", "Places", "pages", "prune", "read_rows", "tables", "write_pages"]

PAGE = "bench.md"
LONG = 40
"""Lines of a table from which on it is a file of its own."""
ABOUT = """\
The ratio to a baseline is what sdinpaint takes over what the baseline takes: the median over interleaved rounds. Below
1 sdinpaint is faster, or needs less memory; a ratio above 1 is bold. Several values in a cell belong to the dtypes of
the line. The summary compares with diffusers in the faster of its two layouts of memory, the default one or
(channels-last). Machines are told apart by processor, cores and kind, which is the widest instructions that may be
used; a kind is (pretended) where the processor has wider ones. What the parts measure: [README.md](README.md). The rows
are in `benchmarks/results`; `sdinpaint bench pages` makes this page of them."""
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
        said.append(machines(of_it))
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
    """Write a table for every part, family, device and processor kind, each under its heading.

    Args:
        rows: rows of the suite.

    Returns:
        Text with Markdown tables.
    """
    return "\n".join(f"{title(name)}\n{table(found)}" for name, found in sections(rows).items())


def _summary(rows: Sequence[Row]) -> str:
    """Write what was measured in one sentence, and the ratios."""
    compared = sum(row.get("ratio") is not None for row in faster_layouts(rows))
    slower = len(slower_rows(rows))
    dates = sorted({row["environment"]["date"] for row in rows if "date" in row.get("environment", {})})
    when = f", {dates[0]} to {dates[-1]}" if len(dates) > 1 else f", {dates[0]}" if dates else ""
    said = f"{len(rows)} rows{when}. Of the {compared} with a ratio to a baseline, the baseline is faster in {slower}. "
    said += f"Machines: {machines(rows) or 'unknown'}."
    return "\n\n".join(filter(None, (said, summary(rows).rstrip())))


def _environments(rows: Iterable[Row]) -> str:
    found = grouped(rows, lambda row: ", ".join(f"{name} {value}" for name, value in row["environment"].items()))
    return "\n".join(f"- {', '.join({row['part']: None for row in part})}: {said}" for said, part in found.items())


def _file(part: str, family: str, device: str, kind: str) -> str:
    """Return the name of a section's files without their ending; a checkpoint may have any name."""
    known = "-".join(re.sub(r"[^\w.-]", "_", name) for name in (part, family, device))
    return "-".join((known, *re.findall(r"\w+", kind)))


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
