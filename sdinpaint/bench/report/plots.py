"""Plots of the parts `quality` and `growth` as curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdinpaint.bench.report.figures import COLORS, GREY, LINES, MARKERS, new_figure, plain_numbers, save
from sdinpaint.bench.report.rows import Row, grouped, machines
from sdinpaint.bench.report.tables import limits_reached

__all__ = ["draw_growth", "draw_quality"]

SCORES = {
    "right_color": ("colour of the prompt in the hole (higher is better)", "% of scenes", 100),
    "right_shape": ("shape of the prompt in the hole (higher is better)", "% of scenes", 100),
    "seam": ("seam (lower is better)", "delta E", 1),
    "ring_delta_e": ("shift of colour across the edge (lower is better)", "ring delta E", 1),
}
"""(title, unit, factor from the row's value to the unit)."""
COSTS = {
    "seconds": ("time, seconds", 1.0),
    "cpu_seconds": ("processor time, seconds", 1.0),
    "bytes": ("peak memory, MB", 1e-6),
}
"""(title with the unit, factor from the row's value to the unit)."""
WORK = {
    "pixels": "side of the image, pixels; {pictures} image, {steps} steps",
    "pictures": "images at once; {size} x {size} pixels, {steps} steps",
    "steps": "steps; {pictures} image, {size} x {size} pixels",
}
BUSY = 0.8
"""Processor seconds per second of the clock below which other programs must have had the processor."""


def draw_quality(rows: Sequence[Row], target: Path) -> None:
    """Plot each score against the time of an image, with a line for each sampler.

    Args:
        rows: of the part "quality".
        target: the PNG.

    Raises:
        SettingError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    figure = new_figure(10, 7)
    axes = figure.subplots(2, 2).flat
    clock = _clock(rows)
    for axis, name in zip(axes, SCORES, strict=True):
        _draw_score(axis, rows, name, clock)
    axis.legend(fontsize=9)
    scenes, batch = rows[0]["scenes"], rows[0]["batch"]
    said = f"Quality against time: {scenes} held-out scenes, {batch} at once; numbers at the points are steps"
    figure.suptitle(f"{said}\n{machines(rows)}", fontsize=11)
    save(figure, target)


def draw_growth(rows: Sequence[Row], target: Path) -> None:
    """Plot time and memory against the amount of work, with the fitted power laws.

    Args:
        rows: of the part "growth".
        target: the PNG.

    Raises:
        SettingError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    columns = grouped(rows, lambda row: row["grows"])
    figure = new_figure(4 * len(columns), 7)
    grid = figure.subplots(2, len(columns), squeeze=False, sharey="row")
    clock = _clock(rows)
    for column, (grows, found) in zip(grid.T, columns.items(), strict=True):
        for axis, name in zip(column, (clock, "bytes"), strict=True):
            for row, color, marker in zip(found, COLORS, MARKERS, strict=False):
                _draw_power(axis, row, name, color, marker)
            axis.set_xlabel(WORK[grows].format(**found[0]["start"]), fontsize=9)
            axis.set_ylabel(f"{COSTS[name][0]} (lower is better)")
            axis.yaxis.set_tick_params(labelleft=True)
            _ticks(axis, max((_sides(row) for row in found), key=len))
    figure.suptitle(f"Cost as the work grows: measured, and the best power law (dashed)\n{machines(rows)}", fontsize=11)
    save(figure, target)


def _draw_score(axis: Any, rows: Sequence[Row], name: str, clock: str) -> None:
    title, unit, scale = SCORES[name]
    dtypes = grouped(rows, lambda row: row["dtype"])
    for line, of_dtype in zip(LINES, dtypes.values(), strict=False):
        samplers = grouped(of_dtype, lambda row: row["sampler"])
        for (sampler, found), color, marker in zip(samplers.items(), COLORS, MARKERS, strict=False):
            found.sort(key=lambda row: row["steps"])
            times, values = [row[clock] for row in found], [row[name] * scale for row in found]
            label = sampler if len(dtypes) == 1 else f"{sampler}, {found[0]['dtype']}"
            axis.plot(times, values, color=color, marker=marker, ls=line, ms=5, label=label)
    if name in rows[0]["background"]:
        axis.axhline(rows[0]["background"][name], color=GREY, ls="--", lw=1, label="true background")
    for steps, shown in grouped(next(iter(dtypes.values())), lambda row: row["steps"]).items():
        place = float(np.median([row[clock] for row in shown])), max(row[name] for row in shown) * scale
        axis.annotate(f"{steps}", place, (0, 7), textcoords="offset points", ha="center", color=GREY, fontsize=9)
    axis.margins(y=0.14)
    axis.set_xscale("log")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(f"{COSTS[clock][0]} per image (lower is better)")
    axis.set_ylabel(unit)
    plain_numbers(axis.xaxis)
    axis.grid(alpha=0.3)


def _draw_power(axis: Any, row: Row, name: str, color: str, marker: str) -> None:
    """Draw the measured points and their fitted power law; nothing where they are unknown."""
    if None in row[name]:
        return
    costs = np.array(row[name]) * COSTS[name][1]
    power, last = row["exponent"][name], row["last_exponent"][name]
    said = row["dtype"]
    if power is not None:
        logs = np.log(row["amount"])
        fitted = np.exp(np.log(costs).mean() + power * (logs - logs.mean()))
        axis.plot(_sides(row), fitted, color=color, ls="--", lw=1)
        said += f": {row['grows']} ** {power:.2f}, last two {last:.2f}"
    if limit := limits_reached(row).get(name):
        said += f"\n{limit}" + " (ended)" * (row["ended_by"] == name)
    axis.plot(_sides(row), costs, color=color, marker=marker, ms=5, label=said)
    axis.legend(fontsize=8, loc="upper left")
    axis.margins(y=0.3)


def _ticks(axis: Any, sides: Sequence[float]) -> None:
    """Make both axes logarithmic, with plain numbers, and ticks at the measured amounts."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_ticks(sides, labels=[f"{side:g}" for side in sides])
    axis.xaxis.set_ticks([], minor=True)
    plain_numbers(axis.yaxis)
    axis.grid(alpha=0.3)


def _sides(row: Row) -> list[float]:
    """Return the values along the axis."""
    return [amount**0.5 if row["grows"] == "pixels" else amount for amount in row["amount"]]


def _clock(rows: Sequence[Row]) -> str:
    """Choose the clock's time, or on a busy machine processor time, which other programs do not change."""
    seconds, worked = (sum(float(np.sum(row[name])) for row in rows) for name in ("seconds", "cpu_seconds"))
    return "cpu_seconds" if worked < BUSY * seconds else "seconds"
