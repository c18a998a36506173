"""The rows of the benchmarks as curves. Needs matplotlib (the `train` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sdinpaint_weights.atomic import atomic_write

from sdinpaint.extras import need

__all__ = ["draw_growth", "draw_quality"]

Row = Mapping[str, Any]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by colour-blind readers too. Source: Okabe and Ito, 2008."""
MARKERS = "osD^vP"
GREY = "#666666"
SCORES = {
    "right_color": ("asked colour is in the hole", "% of scenes", 100),
    "right_shape": ("asked shape is in the hole", "% of scenes", 100),
    "seam": ("seam (lower is better)", "delta E", 1),
    "ring_delta_e": ("shift of colour across the edge (lower is better)", "ring delta E", 1),
}
"""Title, unit, and how many of the unit are 1 in a row."""
COSTS = {
    "seconds": ("time, seconds", 1.0),
    "cpu_seconds": ("processor time, seconds", 1.0),
    "bytes": ("peak memory, MiB", 2.0**-20),
}
"""Title with the unit, and how many of the unit are 1 in a row."""
WORK = {
    "pixels": "side of the picture, pixels; {pictures} picture, {steps} steps",
    "pictures": "pictures at once; {size} x {size} pixels, {steps} steps",
    "steps": "steps; {pictures} picture, {size} x {size} pixels",
}


def draw_quality(rows: Sequence[Row], target: Path, clock: str = "seconds") -> None:
    """Write the rows of `measure_quality` as a PNG: each score against the time of a picture, a line per sampler.

    clock: "seconds" or "cpu_seconds", whichever is to be shown.
    Raises: SettingError where matplotlib is missing; OSError.
    """
    figure = _figure(10, 7)
    axes = figure.subplots(2, 2).flat
    for axis, name in zip(axes, SCORES, strict=True):
        _draw_score(axis, rows, name, clock)
    axis.legend(fontsize=9)
    scenes, batch = rows[0]["scenes"], rows[0]["batch"]
    figure.suptitle(f"Quality against time: {scenes} held-out scenes, {batch} at once; numbers at the points are steps")
    _save(figure, target)


def draw_growth(rows: Sequence[Row], target: Path, clock: str = "seconds") -> None:
    """Write the rows of `measure_growth` as a PNG: time and memory against what grows, with the fitted powers.

    clock: "seconds" or "cpu_seconds", whichever is to be shown.
    Raises: SettingError where matplotlib is missing; OSError.
    """
    figure = _figure(4 * len(rows), 7)
    grid = figure.subplots(2, len(rows), squeeze=False, sharey="row")
    for column, row in zip(grid.T, rows, strict=True):
        sides = [amount**0.5 if row["grows"] == "pixels" else amount for amount in row["amount"]]
        for axis, name in zip(column, (clock, "bytes"), strict=True):
            if None not in row[name]:
                _draw_power(axis, row, sides, name)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel(WORK[row["grows"]].format(**row["start"]), fontsize=9)
            axis.set_ylabel(COSTS[name][0])
            axis.yaxis.set_tick_params(labelleft=True)
            axis.xaxis.set_ticks(sides, labels=[f"{side:g}" for side in sides])
            axis.xaxis.set_ticks([], minor=True)
            _plain(axis.yaxis)
            axis.grid(alpha=0.3)
        if row["ended_by"] is not None:
            column[0].set_title(f"ended by the limit of {row['ended_by']}", fontsize=9)
    figure.suptitle("Cost as the work grows")
    _save(figure, target)


def _draw_score(axis: Any, rows: Sequence[Row], name: str, clock: str) -> None:
    title, unit, scale = SCORES[name]
    samplers = dict.fromkeys(row["sampler"] for row in rows)
    for sampler, color, marker in zip(samplers, COLORS, MARKERS, strict=False):
        found = sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: row["steps"])
        times, values = [row[clock] for row in found], [row[name] * scale for row in found]
        axis.plot(times, values, color=color, marker=marker, ms=5, label=sampler)
    if name in rows[0]["background"]:
        axis.axhline(rows[0]["background"][name], color=GREY, ls="--", lw=1, label="true background")
    for steps in {row["steps"] for row in rows}:
        shown = [row for row in rows if row["steps"] == steps]
        place = float(np.median([row[clock] for row in shown])), max(row[name] for row in shown) * scale
        axis.annotate(f"{steps}", place, (0, 7), textcoords="offset points", ha="center", color=GREY, fontsize=9)
    axis.margins(y=0.14)
    axis.set_xscale("log")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(f"{COSTS[clock][0]} a picture")
    axis.set_ylabel(unit)
    _plain(axis.xaxis)
    axis.grid(alpha=0.3)


def _draw_power(axis: Any, row: Row, sides: Sequence[float], name: str) -> None:
    """The measured points, and the power law that was fitted to them."""
    costs = np.array(row[name]) * COSTS[name][1]
    axis.plot(sides, costs, color=COLORS[0], marker=MARKERS[0], ms=5, label="measured")
    power = row["exponent"][name]
    if power is not None:
        logs = np.log(row["amount"])
        fitted = np.exp(np.log(costs).mean() + power * (logs - logs.mean()))
        said = f"{row['grows']} ** {power:.2f}; between the last two {row['last_exponent'][name]:.2f}"
        axis.plot(sides, fitted, color=COLORS[1], ls="--", lw=1, label=said)
    axis.legend(fontsize=8, loc="upper left")
    axis.margins(y=0.3)


def _figure(width: float, height: float) -> Any:
    # not pyplot's, which would choose a window system and keep every figure
    return _matplotlib("figure").Figure(figsize=(width, height), layout="constrained")


def _plain(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, which would show powers of ten."""
    axis.set_major_locator(_matplotlib("ticker").LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(_matplotlib("ticker").NullLocator())


def _matplotlib(module: str) -> Any:
    return need(f"matplotlib.{module}", extra="train", what="drawing the benchmarks")


def _save(figure: Any, target: Path) -> None:
    with atomic_write(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
