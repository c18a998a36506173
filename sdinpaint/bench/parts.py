"""The parts of the suite: each checks at the very shape that it measures, and then measures system by system."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdinpaint.bench import checks
from sdinpaint.bench.arithmetic import float32_bytes, flops_of
from sdinpaint.bench.cases import Case
from sdinpaint.bench.child import Figures, first_picture, import_seconds, in_child
from sdinpaint.bench.floors import Floor
from sdinpaint.bench.growth import free_bytes
from sdinpaint.bench.kernels import measure_kernels
from sdinpaint.bench.modes import measure_modes
from sdinpaint.bench.peers.commands import COMMAND, Command
from sdinpaint.bench.peers.systems import IMPORTS, OURS, PEERS, System, open_system
from sdinpaint.bench.quality import QualityOptions
from sdinpaint.bench.quality import measure_quality as measure_quality_of
from sdinpaint.bench.report.rows import spread
from sdinpaint.bench.timing import in_turns, ratio, timed
from sdinpaint.errors import NumericError, SdInpaintError
from sdinpaint.loading import load

__all__ = ["PARTS"]

Row = dict[str, Any]
Found = Row | str
"""A row, or why there is none of a peer."""
T = TypeVar("T")

TORCH = "torch"
RUNS: dict[str, Callable[[System], Any]] = {
    "guided step": lambda system: system.step(),
    "VAE decode": lambda system: system.decode(),
    "VAE encode": lambda system: system.encode(),
    "text encoders, 2 prompts": lambda system: system.encode_text(),
}
GB = 1e9
SLOW = 30.0
"""Seconds of loading: of a system that converts and compiles first."""


def measure_load(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """Seconds of importing, and seconds and peak memory of loading, every time in a new process.

    The first round fills the page cache; who takes longer than SLOW for it has no other one.
    """
    yield from _imports(case)
    found = yield from _children("load", case, rounds=case.rounds + 1)
    ours = found[OURS][0]
    passed = yield from _checked("load", case, found, lambda name: checks.check_load(case, name, found[name][0], ours))
    kept = {name: found[name][1:] or found[name] for name in passed}
    rows = partial(_rows, "load", case, checks=passed)
    yield from rows("load", "s", _column(kept, "seconds"))
    yield from rows("load, with the weights in memory", "s", _column(kept, "touched"))
    if "peak" in ours:
        yield from rows("load, peak memory over the weights", "", _column(kept, "peak", 1 / ours["weights"]))


def measure_memory(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """Peak memory of a step and of a picture, with the weights, in a new process; empty without /proc.

    Once, and for a picture of one step: more of either would find the same.
    """
    case = replace(case, steps=1)
    found = yield from _children("memory", case, rounds=1)
    passed = yield from _checked("memory", case, found, lambda name: checks.check_memory(case, name, found[name]))
    kept = {name: found[name] for name in passed}
    for what in ("step", "picture"):
        if what in found[OURS][0]:
            yield from _rows("memory", case, f"{what}, peak memory", "GB", _column(kept, what, 1 / GB), checks=passed)


def measure_step(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """Seconds of a guided step and of the networks before and after it, one after the other; systems in turns."""
    exact, flops = _exact(case), flops_of(case)
    systems = yield from _opened("step", case)
    for what, run in RUNS.items():
        check = partial(checks.check_tensor, what, exact.get(what))
        passed = yield from _compared("step", case, systems, run, check)
        calls = {name: timed(partial(run, systems[name]), case.device) for name in passed}
        values = in_turns(calls, case.rounds)
        for row in _rows("step", case, what, "s", values, checks=passed):
            yield {**row, **_of_floor(case, flops.get(what), row["p50"])}


def measure_picture(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """Seconds of a whole inpainted picture, and pictures a minute, in turns; commands are processes of their own.

    Then from nothing to the first picture, which takes longer and has half of the rounds.
    """
    passed = yield from _pictures(case, commands)
    gc.collect()  # of its systems, before there are processes that load one
    calls = {name: partial(first_picture, name, case) for name in passed}
    values = in_turns(calls, (case.rounds + 1) // 2)
    yield from _rows("picture", case, "first picture, new process", "s", values, checks=passed)


def measure_quality(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """What the seconds of a picture buy, by sampler and number of steps; of a model that learned the drawn scenes."""
    few = QualityOptions(scenes=4, batch=4, samplers=("ddim",), steps=(case.steps,))
    options = few if case.quick else QualityOptions()
    pipe = load(case.checkpoint, device=case.device, dtype=case.dtype, progress=False)
    ways: Sequence[Mapping[str, Any]] = measure_quality_of(pipe, options, progress=False)
    for found in ways:
        judged = {OURS: f"colour {found['right_color']:.0%}, shape {found['right_shape']:.0%}"}
        way = f"a picture of a batch of {found['batch']}, {found['sampler']}"
        [row] = _rows("quality", case, way, "s", {OURS: [found["seconds"]]}, checks=judged)
        yield {**row, **found}


PARTS: dict[str, Callable[[Case, Sequence[Command]], Iterable[Found]]] = {
    "load": measure_load,
    "memory": measure_memory,
    "kernels": measure_kernels,
    "step": measure_step,
    "picture": measure_picture,
    "quality": measure_quality,
    "modes": measure_modes,
}


def _imports(case: Case) -> Iterator[Row]:
    """Of this library, of each peer's, and of torch alone, which is the floor of all."""
    statements = {OURS: IMPORTS, **{name: PEERS[name].imports for name in case.peers}, TORCH: "import torch"}
    calls = {name: partial(import_seconds, statement) for name, statement in statements.items()}
    values = in_turns(calls, case.rounds + 1)
    kept = {name: taken[1:] for name, taken in values.items()}
    floor = spread(kept[TORCH])["p50"]
    for row in _rows("load", case, "import", "s", kept, checks=statements):
        yield {**row, "percent_of_floor": 100 * floor / row["p50"]}


def _exact(case: Case) -> dict[str, Tensor]:
    """What ours makes in float32; nothing where that is the dtype, or would take more than half of the free memory."""
    wide, free = replace(case, dtype="float32"), free_bytes(torch.device(case.device))
    if case.dtype == wide.dtype or (free is not None and float32_bytes(case) > free / 2):
        return {}
    ours = open_system(OURS, wide)
    return {what: run(ours) for what, run in RUNS.items()}


def _pictures(case: Case, commands: Sequence[Command]) -> Generator[Found, None, dict[str, str]]:
    systems = yield from _opened("picture", case)
    passed = yield from _compared(
        "picture", case, systems, lambda system: np.asarray(system.picture()), checks.check_picture
    )
    calls = {name: timed(systems[name].picture, case.device) for name in passed}
    shown = dict(passed)
    with ExitStack() as files:
        for index, command in enumerate(commands, start=1):
            name = f"{COMMAND} {index}: {command.program}"
            calls[name] = partial(command.seconds, files.enter_context(command.inputs(case)))
            shown[name] = "by its own clock, unchecked"
        values = in_turns(calls, case.rounds)
    minute = {name: [60 / seconds for seconds in taken] for name, taken in values.items()}
    yield from _rows("picture", case, "picture", "s", values, checks=shown)
    yield from _rows("picture", case, "pictures a minute", "1/min", minute, checks=shown)
    return passed


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
            "ratio": None if name in (OURS, TORCH) else ratio(values[OURS], taken),
            "check": checks[name],
        }
        for name, taken in values.items()
    ]


def _of_floor(case: Case, flops: int | None, seconds: float) -> dict[str, float]:
    """The same arithmetic for every system, that of the plain networks: who finds a way to do less is nearer."""
    if flops is None:
        return {}
    floor = Floor(flops=flops, bytes=0, dtype=case.torch_dtype, device=case.device)
    return {"tflop": flops / 1e12, "percent_of_floor": floor.percent(seconds)}


def _opened(part: str, case: Case) -> Generator[str, None, dict[str, System]]:
    gc.collect()  # pipelines that were open before may refer to themselves
    return (yield from _tried(part, case, (OURS, *case.peers), lambda name: open_system(name, case)))


def _children(part: str, case: Case, rounds: int) -> Generator[str, None, dict[str, list[Figures]]]:
    """The figures of every system by round; of the slow ones of the first alone."""
    names: Iterable[str] = (OURS, *case.peers)
    found: dict[str, list[Figures]] = {}
    for _ in range(rounds):
        figures = yield from _tried(part, case, names, lambda name: in_child(part, name, case))
        for name, values in figures.items():
            found.setdefault(name, []).append(values)
        names = [name for name, values in figures.items() if values.get("seconds", 0.0) < SLOW]
    return found


def _compared(
    part: str,
    case: Case,
    systems: Mapping[str, System],
    run: Callable[[System], T],
    check: Callable[[Case, str, T, T], str],
) -> Generator[str, None, dict[str, str]]:
    """`_checked` of what each system makes beside what ours does."""
    ours = run(systems[OURS])

    def checked(name: str) -> str:
        return check(case, name, ours if name == OURS else run(systems[name]), ours)

    return (yield from _checked(part, case, systems, checked))


def _checked(
    part: str, case: Case, names: Iterable[str], check: Callable[[str], str]
) -> Generator[str, None, dict[str, str]]:
    """The verdicts of those who pass; of nobody where no peer agrees with ours, which may be the one that is wrong."""
    passed = yield from _tried(part, case, names, check)
    return {} if len(passed) == 1 < len(list(names)) else passed


def _tried(part: str, case: Case, names: Iterable[str], do: Callable[[str], T]) -> Generator[str, None, dict[str, T]]:
    """What `do` makes of each name; a peer that cannot is left out, and why is yielded."""
    made = {}
    for name in names:
        try:
            made[name] = do(name)
        except (SdInpaintError, RuntimeError) as error:  # torch's and OpenVINO's are of the latter kind
            if name == OURS:
                raise
            wrong = isinstance(error, NumericError)
            yield str(error) if wrong else f"{checks.subject(part, case, name)}: {error}"
    return made


def _column(found: Mapping[str, Sequence[Figures]], what: str, factor: float = 1.0) -> dict[str, list[float]]:
    return {name: [factor * one[what] for one in runs] for name, runs in found.items()}
