"""The part `modes` of the suite: peak memory of an image by size and by the options of `load` that save memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdinpaint.bench.cases import Case
from sdinpaint.bench.child import Figures, in_child
from sdinpaint.bench.paintings import CELL, DEFAULT, INPAINT, MODES, OUTPAINT
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.rows import measured
from sdinpaint.bench.timing import rounds_of
from sdinpaint.errors import NumericError

__all__ = ["MODES_PART", "measure_modes"]

Row = dict[str, Any]

MODES_PART = "modes"
WORKS = (INPAINT, 512), (INPAINT, 1024), (OUTPAINT, 4096)
"""(what is made, height and width in pixels)."""
QUICK = (INPAINT, 128), (OUTPAINT, 512)
STEPS = 1
"""Sampling steps; peak memory does not depend on them."""
FIGURES = {"peak": "peak memory", "own": "anonymous memory"}
"""The name of each figure in `what`."""
GB = 1e9
ROUNDING = 0.5
"""Levels of 255 by which the mean of a part of an image may differ where rounding alone does."""


def measure_modes(case: Case, commands: Sequence[Command]) -> Iterator[Row]:
    """Measure peak memory by mode, from loading to the image, beyond a process with all code imported.

    Args:
        case: checkpoint, dtype and device.
        commands: unused.

    Returns:
        Rows; none on a CPU without /proc.

    Raises:
        NumericError: an offloaded model makes another image.
    """
    for work, size in rounds_of(QUICK if case.quick else WORKS):
        one = replace(case, size=size, steps=STEPS)
        found = {mode: in_child(MODES_PART, f"{work}: {mode}", one) for mode in MODES}
        for mode, figures in found.items():
            check = _check(one, work, mode, figures, found[DEFAULT])
            yield from _rows(one, f"{work}, {mode}", figures, check)


def _check(case: Case, work: str, mode: str, found: Figures, default: Figures) -> str:
    if found["digest"] == default["digest"]:
        return "finite" if mode == DEFAULT else "as by default, bit for bit"
    # which bits come out may depend on where weights lie in memory: what is asked is the same image but for rounding
    apart = max((abs(found[name] - default[name]) for name in default if name.startswith(CELL)), default=math.inf)
    if apart <= ROUNDING:
        return "within rounding"
    subject, hint = f"modes, {case.family} in {case.dtype}: {work}, {mode}", "no row of it is recorded"
    raise NumericError("BENCH_WRONG", subject, "another image", expected="the same but for rounding", hint=hint)


def _rows(case: Case, what: str, found: Mapping[str, float], check: str) -> list[Row]:
    return [
        measured(MODES_PART, f"{what}, {said}", case.fields, OURS, [found[name] / GB], "GB", check=check)
        for name, said in FIGURES.items()
        if name in found
    ]
