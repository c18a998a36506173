"""The parts of the suite: each checks the output at the measured shape, and then measures every system."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdinpaint.bench import checks
from sdinpaint.bench.arithmetic import float32_bytes, flops_of
from sdinpaint.bench.cases import STEP, Case
from sdinpaint.bench.child import Figures, first_picture, import_seconds, in_child
from sdinpaint.bench.defects import measure_defects
from sdinpaint.bench.forms import measure_forms
from sdinpaint.bench.growth import free_bytes
from sdinpaint.bench.kernels import measure_kernels
from sdinpaint.bench.modes import measure_modes
from sdinpaint.bench.peers.commands import COMMAND, Command
from sdinpaint.bench.peers.systems import IMPORTS, OURS, PEERS, System, open_system
from sdinpaint.bench.quality import QualityOptions
from sdinpaint.bench.quality import measure_quality as measure_quality_of
from sdinpaint.bench.report.rows import measured, spread
from sdinpaint.bench.roofline import Roofline
from sdinpaint.bench.seams import measure_seams
from sdinpaint.bench.startup import measure_startup
from sdinpaint.bench.timing import interleaved, median_ratio, rounds_of, timed
from sdinpaint.bench.tuning import measure_tuning
from sdinpaint.errors import NumericError, SdInpaintError
from sdinpaint.loading import load

__all__ = ["PARTS"]

Row = dict[str, Any]
Found = Row | str
"""A row, or a text that says why a baseline has none."""
T = TypeVar("T")

TORCH = "torch"
RUNS: dict[str, Callable[[System], Any]] = {
    STEP: lambda system: system.step(),
    "VAE decode": lambda system: system.decode(),
    "VAE encode": lambda system: system.encode(),
    "text encoders, 2 prompts": lambda system: system.encode_text(),
}
MEMORY = {"step memory": ("step", "second step"), "picture memory": ("picture",)}
"""The figures of each process in which memory is measured."""
ADAPTERS = "adapters"
ADAPTED = {
    "add a LoRA": ("add", "s", 1.0),
    "add a LoRA, peak memory": ("peak", "GB", 1e-9),
    "guided step with a LoRA": ("step", "s", 1.0),
    "guided step without": ("plain", "s", 1.0),
    "remove a LoRA": ("remove", "s", 1.0),
}
"""Rows of that part -> figure of the process, unit, and factor."""
GB = 1e9
SLOW = 30.0
"""Seconds of loading after which a system, one that converts and compiles first, is loaded only once."""


def measure_load(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """Measure the seconds of importing, and the seconds and peak memory of loading, each time in a new process.

    The first round fills the page cache and does not count, except for a system that takes longer than SLOW.

    Args:
        case: checkpoint, dtype, device, rounds and baselines.
        commands: unused.

    Returns:
        Rows, and texts for baselines that have none.
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
    """Measure the peak memory of two steps, and in another process that of an image, weights included.

    It is measured once and with one step, since more of either give the same.

    Args:
        case: checkpoint, size, dtype, device and baselines.
        commands: unused.

    Returns:
        Rows, and texts for baselines that have none; no rows on a CPU without /proc.
    """
    case = replace(case, steps=1)
    for measure, whats in MEMORY.items():
        found = yield from _children(measure, case, rounds=1)
        passed = yield from _checked("memory", case, found, partial(_check_memory, case, found))
        kept = {name: found[name] for name in passed}
        for what in whats:
            if what in found[OURS][0]:
                yield from _rows(
                    "memory", case, f"{what}, peak memory", "GB", _column(kept, what, 1 / GB), checks=passed
                )


def measure_adapters(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """Measure adding a LoRA of rank 64 to the weights, steps with it, and taking it off, each time in a new process.

    Args:
        case: checkpoint, size, dtype, device, rounds and baselines.
        commands: unused.

    Returns:
        Rows, and texts for baselines that have none.
    """
    found = yield from _children(ADAPTERS, case, rounds=case.rounds)
    passed = yield from _checked(ADAPTERS, case, found, lambda name: checks.check_adapter(case, name, found[name][0]))
    kept = {name: found[name] for name in passed}
    for what, (name, unit, factor) in ADAPTED.items():
        if name in found[OURS][0]:
            yield from _rows(ADAPTERS, case, what, unit, _column(kept, name, factor), checks=passed)


def measure_step(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """Measure the seconds of a guided step and of the networks before and after it, systems interleaved.

    Several images at once make a difference to the step alone, so that nothing else is measured then.

    Args:
        case: checkpoint, size, images, dtype, device, rounds and baselines.
        commands: unused.

    Returns:
        Rows, and texts for baselines that have none.
    """
    runs = RUNS if case.images == 1 else {STEP: RUNS[STEP]}
    exact, flops = _exact(case, runs), flops_of(case)
    systems = yield from _opened("step", case)
    for name, run in runs.items():
        what = name if case.images == 1 else f"{name}, {case.images} images"
        check = partial(checks.check_tensor, what, exact.get(name))
        passed = yield from _compared("step", case, systems, run, check)
        calls = {system: timed(partial(run, systems[system]), case.device) for system in passed}
        values = interleaved(calls, case.rounds)
        for row in _rows("step", case, what, "s", values, checks=passed):
            yield {**row, **_of_roofline(case, flops.get(name), row["p50"])}


def measure_picture(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """Measure the seconds of a whole inpainted image, and images a minute, systems interleaved.

    Then the seconds from the start of a process to its first image, in half as many rounds.

    Args:
        case: checkpoint, size, steps, dtype, device, rounds and baselines.
        commands: other programs, which print their seconds.

    Returns:
        Rows, and texts for baselines that have none.
    """
    passed = yield from _pictures(case, commands)
    gc.collect()  # memory of its systems, before processes load one each
    calls = {name: partial(first_picture, name, case) for name in passed}
    values = interleaved(calls, (case.rounds + 1) // 2)
    yield from _rows("picture", case, "first picture, new process", "s", values, checks=passed)


def measure_quality(case: Case, commands: Sequence[Command]) -> Iterator[Found]:
    """Score held-out scenes against the seconds of an image, by sampler and number of steps.

    Args:
        case: the included checkpoint, which has learned the drawn scenes; dtype and device.
        commands: unused.

    Returns:
        A row for each sampler and number of steps.
    """
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
    "startup": measure_startup,
    "modes": measure_modes,
    "seams": measure_seams,
    "defects": measure_defects,
    "tuning": measure_tuning,
    "forms": measure_forms,
    ADAPTERS: measure_adapters,
}
"""Functions by part: (case, commands of other programs) -> rows."""


def _check_memory(case: Case, found: Mapping[str, Sequence[Figures]], name: str) -> str:
    return checks.check_memory(case, name, found[name])


def _imports(case: Case) -> Iterator[Row]:
    """Yield rows of importing sdinpaint, each baseline, and torch alone, which all need."""
    statements = {OURS: IMPORTS, **{name: PEERS[name].imports for name in case.peers}, TORCH: "import torch"}
    calls = {name: partial(import_seconds, statement) for name, statement in statements.items()}
    values = interleaved(calls, case.rounds + 1)
    kept = {name: taken[1:] for name, taken in values.items()}
    torch_alone = spread(kept[TORCH])["p50"]
    for row in _rows("load", case, "import", "s", kept, checks=statements):
        yield {**row, "percent_of_floor": 100 * torch_alone / row["p50"]}


def _exact(case: Case, runs: Mapping[str, Callable[[System], Tensor]]) -> dict[str, Tensor]:
    """Return our outputs in float32; none where that is the dtype, or needs more than half of the free memory."""
    wide, free = replace(case, dtype="float32"), free_bytes(torch.device(case.device))
    if case.dtype == wide.dtype or (free is not None and float32_bytes(case) > free / 2):
        return {}
    ours = open_system(OURS, wide)
    return {what: run(ours) for what, run in runs.items()}


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
        values = interleaved(calls, case.rounds)
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
    """Make a row for every system, with the ratio to each baseline."""
    return [
        measured(
            part,
            what,
            case.fields,
            name,
            taken,
            unit,
            ratio=None if name == OURS else median_ratio(values[OURS], taken),
            check=checks[name],
            steps=case.steps if "picture" in what else None,
        )
        for name, taken in values.items()
    ]


def _of_roofline(case: Case, flops: int | None, seconds: float) -> dict[str, float]:
    """Return the share of the roofline, by the arithmetic of the plain networks for every system."""
    if flops is None:
        return {}
    roofline = Roofline(flops=flops, bytes=0, dtype=case.torch_dtype, device=case.device)
    return {"tflop": flops / 1e12, "percent_of_floor": roofline.percent(seconds)}


def _opened(part: str, case: Case) -> Generator[str, None, dict[str, System]]:
    gc.collect()  # earlier pipelines may be in reference cycles
    return (yield from _tried(part, case, (OURS, *case.peers), lambda name: open_system(name, case)))


def _children(part: str, case: Case, rounds: int) -> Generator[str, None, dict[str, list[Figures]]]:
    """Return the figures of every system by round; of slow ones for the first round alone."""
    names: Iterable[str] = (OURS, *case.peers)
    found: dict[str, list[Figures]] = {}
    for _ in rounds_of(range(rounds)):
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
    """Run every system, and check its output beside ours."""
    ours = run(systems[OURS])

    def checked(name: str) -> str:
        return check(case, name, ours if name == OURS else run(systems[name]), ours)

    return (yield from _checked(part, case, systems, checked))


def _checked(
    part: str, case: Case, names: Iterable[str], check: Callable[[str], str]
) -> Generator[str, None, dict[str, str]]:
    """Return the checks of the systems that pass; none where no baseline agrees with ours."""
    passed = yield from _tried(part, case, names, check)
    return {} if len(passed) == 1 < len(list(names)) else passed


def _tried(part: str, case: Case, names: Iterable[str], do: Callable[[str], T]) -> Generator[str, None, dict[str, T]]:
    """Call `do` for each name; a baseline that fails is left out, and the reason is yielded."""
    made = {}
    for name in names:
        try:
            made[name] = do(name)
        except (SdInpaintError, RuntimeError) as error:  # the latter from torch and OpenVINO
            if name == OURS:
                raise
            wrong = isinstance(error, NumericError)
            yield str(error) if wrong else f"{checks.subject(part, case, name)}: {error}"
    return made


def _column(found: Mapping[str, Sequence[Figures]], what: str, factor: float = 1.0) -> dict[str, list[float]]:
    return {name: [factor * one[what] for one in runs] for name, runs in found.items()}
