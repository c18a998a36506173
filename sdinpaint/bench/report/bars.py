"""Plots of a section as horizontal bars: sdinpaint beside the baselines, or each one's share of the roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.figures import COLORS, GREY, new_figure, save
from sdinpaint.bench.report.rows import Row, grouped, machines
from sdinpaint.bench.report.tables import by_case, case_of, dtypes, more_is_better, number

__all__ = ["draw_bars", "draw_modes", "draw_roofline", "draw_seams"]

BAR, GAP, AROUND = 0.21, 0.5, 0.85
"""Inches of a bar; the gap between two cases in bars; inches of title and axis of a panel."""
MOST_CALLS = 12
"""The number of calls that are drawn for each dtype; more could not be read."""


@dataclass(frozen=True)
class Bars:
    """The texts and numbers of a plot."""

    unit: Callable[[Row], str]
    spread: Callable[[Row], tuple[float, float, float]]
    """p20, p50 and p80."""
    case: Callable[[Row], str]
    """The label before the bars of one case."""
    said: Callable[[Row], str]
    """The label behind a bar."""


MEASURED = Bars(
    unit=lambda row: f"{row['unit']} ({'higher' if more_is_better(row) else 'lower'} is better)".strip(),
    spread=lambda row: (row["p20"], row["p50"], row["p80"]),
    case=dtypes,
    said=lambda row: number(row["p50"]) + ("" if row["ratio"] is None else f", ratio {number(row['ratio'])}"),
)


def draw_bars(rows: Sequence[Row], target: Path) -> None:
    """Plot a panel for each measurement, with a bar for each system and dtype, and whiskers from p20 to p80.

    Args:
        rows: of one section.
        target: the PNG.

    Raises:
        SettingError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    panels = grouped(rows, lambda row: ", ".join(filter(None, (case_of(row), _size(row)))))
    _draw(panels, target, MEASURED)


def _size(row: Row) -> str:
    return "" if row["size"] is None else f"{row['size']} x {row['size']}"


def draw_modes(rows: Sequence[Row], target: Path) -> None:
    """Plot a panel for each size, with a bar for each measurement.

    Args:
        rows: of one section.
        target: the PNG.

    Raises:
        SettingError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    panels = grouped(rows, _size)
    bars = replace(MEASURED, case=lambda row: f"{case_of(row)}, {dtypes(row)}")
    _draw(panels, target, bars)


def draw_roofline(rows: Sequence[Row], target: Path) -> None:
    """Plot the percentage of the roofline of each system, in the calls that take most of a dtype's time.

    Args:
        rows: of the part "kernels".
        target: the PNG.

    Raises:
        SettingError: matplotlib is missing.
        OSError: the file cannot be written.
    """

    def percents(row: Row) -> tuple[float, float, float]:
        shortest = row["percent_of_floor"] * row["p50"]
        return shortest / row["p80"], row["percent_of_floor"], shortest / row["p20"]

    panels = {}
    for dtype, found in grouped(rows, lambda row: row["dtype"]).items():
        cases = sorted(by_case(found), key=lambda case: case[0]["count"] * case[0]["p50"], reverse=True)
        title = f"{dtype}: the {min(len(cases), MOST_CALLS)} calls, of {len(cases)}, that take most of the time"
        panels[title] = [row for case in cases[:MOST_CALLS] for row in case]
    bars = Bars(
        unit=lambda row: "% of roofline (higher is better)",
        spread=percents,
        case=lambda row: f"{row['what']}, {row['count']} times",
        said=lambda row: f"{row['percent_of_floor']:.0f}%",
    )
    _draw(panels, target, bars)


def draw_seams(rows: Sequence[Row], target: Path) -> None:
    """Plot the seam and the ring delta E of every way of joining.

    Args:
        rows: of the part "seams".
        target: the PNG.

    Raises:
        SettingError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    panels = {}
    for name, title in {"seam": "seam", "ring_delta_e": "ring delta E: shift of colour across the edge"}.items():
        panels[title] = [{**row, **dict.fromkeys(("p20", "p50", "p80"), row[name])} for row in rows]
    _draw(panels, target, replace(MEASURED, case=lambda row: row["what"]))


def _draw(panels: Mapping[str, Sequence[Row]], target: Path, bars: Bars) -> None:
    systems = dict.fromkeys([OURS, *(row["system"] for rows in panels.values() for row in rows)])
    colors = dict(zip(systems, COLORS, strict=False))
    heights = [BAR * (len(rows) + GAP * len(by_case(rows))) for rows in panels.values()]
    figure = new_figure(9, sum(heights) + AROUND * len(panels))
    figure.suptitle(machines(row for rows in panels.values() for row in rows), fontsize=10)
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        _draw_panel(axis, rows, colors, bars)
        axis.set_title(title, fontsize=10, loc="left")
    save(figure, target)


def _draw_panel(axis: Any, rows: Sequence[Row], colors: Mapping[str, str], bars: Bars) -> None:
    place, ticks = 0.0, {}
    for case in by_case(rows):
        ticks[place + (len(case) - 1) / 2] = bars.case(case[0])
        for row in case:
            low, middle, high = bars.spread(row)
            axis.barh(place, middle, color=colors.get(row["system"], GREY), height=0.85)
            axis.plot([low, high], [place, place], color="black", lw=1, marker="|", ms=5)
            said = f"{row['system']} {bars.said(row)}"
            axis.annotate(said, (high, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
            place += 1
        place += GAP
    axis.set_yticks([*ticks], labels=[*ticks.values()], fontsize=8)
    axis.set_ylim(place - GAP, -1 + GAP / 2)
    axis.set_xlim(0, 1.5 * max(bars.spread(row)[2] for row in rows))
    axis.set_xlabel(bars.unit(rows[0]), fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
