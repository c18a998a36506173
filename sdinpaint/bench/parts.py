"""The parts of the suite: each checks at the very shape that it measures, and then measures system by system."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdinpaint.bench.cases import Case
from sdinpaint.bench.child import Figures, in_child
from sdinpaint.bench.commands import COMMAND, Command
from sdinpaint.bench.quality import QualityOptions
from sdinpaint.bench.quality import measure_quality as measure_quality_of
from sdinpaint.bench.rows import spread
from sdinpaint.bench.systems import OURS, open_system
from sdinpaint.bench.timing import in_turns, ratio, timed
from sdinpaint.errors import NumericError
from sdinpaint.loading import load
from sdinpaint.metrics import psnr

__all__ = ["PARTS"]

Row = dict[str, Any]
Bytes = NDArray[np.uint8]

STEP_BOUNDS = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""Largest relative difference of a guided step from a peer's in the same dtype; both round, which guidance enlarges."""
LEAST_PSNR = 40.0
"""Of a float32 picture beside a peer's, in dB; where less precise steps add up it is shown, and bounds nothing."""
SUM_BOUND = 1e-9
"""Largest relative difference of the sum of all weights, which are the same but in another order."""
GB = 1e9


def measure_load(case: Case, commands: Sequence[Command]) -> list[Row]:
    """Seconds and peak memory of loading, every time in a new process; the first round fills the page cache."""
    found = {name: runs[1:] for name, runs in _children("load", case, rounds=case.rounds + 1).items()}
    checks = {name: _check_load(case, name, runs[0], found[OURS][0]) for name, runs in found.items()}
    rows = partial(_rows, "load", case, checks=checks)
    made = rows("load", "s", _column(found, "seconds"))
    made += rows("load, with the weights in memory", "s", _column(found, "touched"))
    if "peak" in found[OURS][0]:
        peaks = {name: [one["peak"] / one["weights"] for one in runs] for name, runs in found.items()}
        made += rows("load, peak memory over the weights", "", peaks)
    return made


def measure_memory(case: Case, commands: Sequence[Command]) -> list[Row]:
    """Peak memory of a step and of a picture, with the weights, every time in a new process; empty without /proc."""
    found = _children("memory", case, rounds=case.rounds)
    checks = {name: _check_memory(case, name, runs) for name, runs in found.items()}
    made: list[Row] = []
    for what in ("step", "picture"):
        if what in found[OURS][0]:
            peaks = _column(found, what, 1 / GB)
            made += _rows("memory", case, f"{what}, peak memory", "GB", peaks, checks=checks)
    return made


def measure_step(case: Case, commands: Sequence[Command]) -> list[Row]:
    """Seconds of one guided step, in turns in one process."""
    systems = {name: open_system(name, case) for name in (OURS, *case.peers)}
    made = {name: system.step() for name, system in systems.items()}
    checks = {name: _check_step(case, name, x0, made[OURS]) for name, x0 in made.items()}
    calls = {name: timed(system.step, case.device) for name, system in systems.items()}
    return _rows("step", case, "guided step", "s", in_turns(calls, case.rounds), checks=checks)


def measure_picture(case: Case, commands: Sequence[Command]) -> list[Row]:
    """Seconds of a whole inpainted picture, and pictures a minute, in turns; commands are processes of their own."""
    systems = {name: open_system(name, case) for name in (OURS, *case.peers)}
    made = {name: np.asarray(system.picture()) for name, system in systems.items()}
    checks = {name: _check_picture(case, name, picture, made[OURS]) for name, picture in made.items()}
    calls = {name: timed(system.picture, case.device) for name, system in systems.items()}
    with ExitStack() as files:
        for index, command in enumerate(commands, start=1):
            name = f"{COMMAND} {index}: {command.program}"
            calls[name] = partial(command.seconds, files.enter_context(command.inputs(case)))
            checks[name] = "by its own clock, unchecked"
        values = in_turns(calls, case.rounds)
    minute = {name: [60 / seconds for seconds in taken] for name, taken in values.items()}
    rows = partial(_rows, "picture", case, checks=checks)
    return rows("picture", "s", values) + rows("pictures a minute", "1/min", minute)


def measure_quality(case: Case, commands: Sequence[Command]) -> list[Row]:
    """What the seconds of a picture buy, by sampler and number of steps; of a model that learned the drawn scenes."""
    few = QualityOptions(scenes=4, batch=4, samplers=("ddim",), steps=(case.steps,))
    options = few if case.quick else QualityOptions()
    pipe = load(case.checkpoint, device=case.device, dtype=case.dtype, progress=False)
    ways: Sequence[Mapping[str, Any]] = measure_quality_of(pipe, options, progress=False)
    made: list[Row] = []
    for found in ways:
        checks = {OURS: f"colour {found['right_color']:.0%}, shape {found['right_shape']:.0%}"}
        way = f"a picture of a batch of {found['batch']}, {found['sampler']}"
        [row] = _rows("quality", case, way, "s", {OURS: [found["seconds"]]}, checks=checks)
        made.append({**row, **found})
    return made


PARTS: dict[str, Callable[[Case, Sequence[Command]], list[Row]]] = {
    "load": measure_load,
    "memory": measure_memory,
    "step": measure_step,
    "picture": measure_picture,
    "quality": measure_quality,
}


def _rows(
    part: str,
    case: Case,
    what: str,
    unit: str,
    values: Mapping[str, Sequence[float]],
    *,
    checks: Mapping[str, str],
) -> list[Row]:
    """A row for every system; `ratio`: what ours takes for each one of it, the median over rounds."""
    of_case = {name: value for name, value in asdict(case).items() if name not in ("peers", "checkpoint", "rounds")}
    return [
        {
            "part": part,
            "what": what,
            **of_case,
            "steps": case.steps if "picture" in what else None,
            "system": name,
            **spread(taken),
            "unit": unit,
            "values": list(taken),
            "ratio": None if name == OURS else ratio(values[OURS], taken),
            "check": checks[name],
        }
        for name, taken in values.items()
    ]


def _children(part: str, case: Case, rounds: int) -> dict[str, list[Figures]]:
    """The figures of every system by round."""
    found: dict[str, list[Figures]] = {name: [] for name in (OURS, *case.peers)}
    for _ in range(rounds):
        for name, runs in found.items():
            runs.append(in_child(part, name, case))
    return found


def _column(found: Mapping[str, Sequence[Figures]], what: str, factor: float = 1.0) -> dict[str, list[float]]:
    return {name: [factor * one[what] for one in runs] for name, runs in found.items()}


def _check_load(case: Case, name: str, found: Figures, ours: Figures) -> str:
    difference = abs(found["sum"] - ours["sum"]) / ours["sum"]
    if found["weights"] != ours["weights"] or not difference <= SUM_BOUND:
        what = f"{found['weights']:.0f} bytes of weights, whose sizes add up to {found['sum']!r}"
        raise _wrong("load", case, name, what, f"{ours['weights']:.0f} and {ours['sum']!r}, as ours")
    return f"{found['weights'] / GB:.3g} GB of weights"


def _check_memory(case: Case, name: str, runs: Sequence[Figures]) -> str:
    if not all(one["finite"] for one in runs):
        raise _wrong("memory", case, name, "a step with NaN or infinity", "finite numbers")
    return "finite"


def _check_step(case: Case, name: str, x0: Tensor, ours: Tensor) -> str:
    if not bool(x0.isfinite().all()):
        raise _wrong("step", case, name, "NaN or infinity", "finite numbers")
    if name == OURS:
        return "finite"
    difference = float((x0.double() - ours.double()).norm() / ours.double().norm())
    bound = STEP_BOUNDS[case.dtype]
    if not difference <= bound:
        raise _wrong("step", case, name, f"it differs from ours by {difference:.2g}", f"at most {bound:g}")
    return f"differs by {difference:.1e} (bound {bound:g})"


def _check_picture(case: Case, name: str, picture: Bytes, ours: Bytes) -> str:
    if picture.shape != (case.size, case.size, 3) or picture.min() == picture.max():
        raise _wrong("picture", case, name, f"shape {picture.shape}, {picture.min()} to {picture.max()}", "a picture")
    if name == OURS:
        return "finite"  # of anything else the pipeline makes no picture
    likeness = psnr(picture, ours)
    if case.dtype != "float32":
        return f"PSNR {likeness:.1f} dB"
    if likeness < LEAST_PSNR:
        raise _wrong("picture", case, name, f"a PSNR of {likeness:.1f} dB", f"at least {LEAST_PSNR:g} dB")
    return f"PSNR {likeness:.1f} dB (bound {LEAST_PSNR:g})"


def _wrong(part: str, case: Case, system: str, found: str, expected: str) -> NumericError:
    subject = f"{part}, {case.family} in {case.dtype} with {system}"
    return NumericError("BENCH_WRONG", subject, found, expected=expected, hint="nothing of it is recorded")
