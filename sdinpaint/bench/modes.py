"""The part `modes` of the suite: peak memory of a picture by size and mode, for machines that have little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sdinpaint.bench.cases import Case
from sdinpaint.bench.child import Figures, in_child
from sdinpaint.bench.paintings import DEFAULT, INPAINT, MODES, OUTPAINT
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.rows import spread
from sdinpaint.errors import NumericError

__all__ = ["MODES_PART", "measure_modes"]

Row = dict[str, Any]

MODES_PART = "modes"
WORKS = (INPAINT, 512), (INPAINT, 1024), (OUTPAINT, 4096)
"""What is painted, and the picture's side in pixels."""
QUICK = (INPAINT, 128), (OUTPAINT, 512)
STEPS = 1
"""Peak memory does not grow with them."""
FIGURES = {"peak": "peak memory", "own": "of which no file holds"}
GB = 1e9


def measure_modes(case: Case, commands: Sequence[Command]) -> Iterator[Row]:
    """Peak memory by mode, from loading to the picture, beyond a process with all code imported; empty without /proc.

    Raises: NumericError where an offloaded model makes another picture.
    """
    for work, size in QUICK if case.quick else WORKS:
        one = replace(case, size=size, steps=STEPS)
        found = {mode: in_child(MODES_PART, f"{work}: {mode}", one) for mode in MODES}
        for mode, figures in found.items():
            check = _check(one, work, mode, figures, found[DEFAULT])
            yield from _rows(one, f"{work}, {mode}", figures, check)


def _check(case: Case, work: str, mode: str, found: Figures, default: Figures) -> str:
    if found["digest"] == default["digest"]:
        return "finite" if mode == DEFAULT else "as by default, bit for bit"
    if "tile" in MODES[mode]:
        return "within rounding"
    subject, hint = f"modes, {case.family} in {case.dtype}: {work}, {mode}", "nothing of it is recorded"
    raise NumericError("BENCH_WRONG", subject, "another picture", expected="the same, bit for bit", hint=hint)


def _rows(case: Case, what: str, found: Mapping[str, float], check: str) -> list[Row]:
    of_case = {name: value for name, value in asdict(case).items() if name not in ("peers", "checkpoint", "rounds")}
    return [
        {
            "part": MODES_PART,
            "what": f"{what}, {said}",
            **of_case,
            "system": OURS,
            **spread([found[name] / GB]),
            "unit": "GB",
            "values": [found[name] / GB],
            "ratio": None,
            "check": check,
        }
        for name, said in FIGURES.items()
        if name in found
    ]
