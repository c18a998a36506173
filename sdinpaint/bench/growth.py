"""The part `growth` of the suite: seconds and peak memory by image size, number of images, and steps."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sdinpaint.bench.cases import Case
from sdinpaint.bench.checkpoints import DEMO_FAMILY
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.loading import load
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.progress import progress_bar
from sdinpaint.training.scenes import captions, object_mask, random_scene, render

__all__ = ["GrowthOptions", "Work", "exponent", "free_bytes", "growth_rows", "measure_growth", "peak_bytes"]

Row = dict[str, object]
COSTS = ("seconds", "cpu_seconds", "bytes")
LIMITED = ("bytes", "seconds")
"""The costs that have a limit, `most_...` of the options."""
LONG = 10.0
"""Seconds after which a run is not repeated: the overhead of a first run is small beside them."""
FAR = 100.0
"""The factor beyond the last measured amount up to which a fitted power is extrapolated."""
SHARE = 0.8
"""The share of the free memory that a run may take."""
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one run: square images at once, of `size` pixels a side."""

    size: int = 128
    pictures: int = 1
    steps: int = 10

    @property
    def pixels(self) -> int:
        """Pixels of one image."""
        return self.size**2


@dataclass(frozen=True, kw_only=True)
class GrowthOptions:
    """The curves, the work at which they start, and the limits at which they end."""

    start: Work = Work(size=256, steps=2)
    sizes: tuple[int, ...] = (256, 384, 512, 768, 1024, 1536, 2048)
    pictures: tuple[int, ...] = (1, 2, 4, 8, 16)
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    rounds: int = 3
    most_seconds: float = 300.0
    """Limit of one run."""
    most_bytes: float | None = None
    """Limit of one run, beyond the memory before it; None: SHARE of the free memory, where the system tells it."""


QUICK = GrowthOptions(start=Work(size=64, steps=1), sizes=(64, 128), pictures=(1, 2), steps=(1, 2), rounds=1)
SMALL = GrowthOptions(start=Work(size=128, steps=10), sizes=(128, 192, 256, 384, 512, 768, 1024, 1536, 2048))
"""Options for the included checkpoint, whose images have 128 pixels a side."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one run."""

    seconds: float
    cpu_seconds: float
    """Processor time on all threads: other programs do not change it."""
    bytes: float | None
    """Peak memory; None where the operating system does not tell it."""


def growth_rows(case: Case, most_seconds: float, most_bytes: float | None, *, progress: bool = True) -> Iterator[Row]:
    """Measure the curves of a case's checkpoint.

    Args:
        case: checkpoint, dtype and device.
        most_seconds: as in `GrowthOptions`.
        most_bytes: as in `GrowthOptions`.
        progress: show a progress bar.

    Returns:
        Rows of the suite, each as soon as its curve is complete.
    """
    options = QUICK if case.quick else SMALL if case.family == DEMO_FAMILY else GrowthOptions()
    options = replace(options, most_seconds=most_seconds, most_bytes=most_bytes)
    pipe = load(case.checkpoint, device=case.device, dtype=case.dtype, progress=False)
    same = {name: getattr(case, name) for name in ("family", "dtype", "stored", "device", "quick")}
    start = {"size": options.start.size, "steps": options.start.steps}
    for row in measure_growth(pipe, options, progress=progress):
        yield {"part": "growth", "what": row["grows"], **same, **start, "system": OURS, **row}


def measure_growth(pipe: Pipeline, options: GrowthOptions, *, progress: bool = True) -> Iterator[Row]:
    """Measure the cost of runs of growing work, and fit a power law to each curve.

    Args:
        pipe: the pipeline.
        options: the curves and their limits.
        progress: show a progress bar.

    Returns:
        A row for each curve. `amount`: what grows. `seconds`, `cpu_seconds`: of the fastest round; `bytes`: peak memory
        beyond that before. `exponent`, `last_exponent`: of the fitted power of each cost, over all points and over the
        last two. `ended_by`: "seconds" or "bytes" where the next point would exceed that limit by the fitted power.
        `reaches`: the amounts at which the fitted powers meet the limits; None where that is FAR, or unknown.
    """
    curves = {
        "pixels": [replace(options.start, size=size) for size in options.sizes],
        "pictures": [replace(options.start, pictures=pictures) for pictures in options.pictures],
        "steps": [replace(options.start, steps=steps) for steps in options.steps],
    }
    _cost(pipe, options.start, rounds=1)  # the first run loads code, which would count as its memory
    free = free_bytes(pipe.device)
    limits = {"seconds": options.most_seconds, "bytes": options.most_bytes or (free and SHARE * free)}
    for grows, works in curves.items():
        yield _curve(pipe, grows, works, options, limits, progress)


def exponent(amounts: Sequence[float], costs: Sequence[float | None]) -> float | None:
    """Fit cost = c * amount ** k by least squares of the logarithms.

    Args:
        amounts: of the work.
        costs: one for each amount, None where it is unknown.

    Returns:
        k; None where nothing can be fitted.
    """
    known = [cost for cost in costs if cost]
    if len(known) < max(len(costs), 2):
        return None
    return float(np.polyfit(np.log(amounts), np.log(known), 1)[0])


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Measure the peak memory of a call beyond the memory before it.

    Args:
        run: is called once.
        device: on a GPU, the memory of tensors counts.

    Returns:
        Bytes; None on a CPU without /proc.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not CLEAR_REFS.exists():
        run()
        return None
    # memory that the allocator kept from earlier runs would not be seen to be taken again
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5", encoding="ascii")  # resets VmHWM. Source: proc_pid_clear_refs(5)
    before = _field(STATUS, "VmRSS")
    run()
    return _field(STATUS, "VmHWM") - before


def _curve(
    pipe: Pipeline,
    grows: str,
    works: Sequence[Work],
    options: GrowthOptions,
    limits: Mapping[str, float | None],
    progress: bool,
) -> Row:
    amounts: list[int] = []
    costs: list[Cost] = []
    ended_by = None
    with progress_bar(len(works), grows, show=progress, leave=False) as bar:
        for work in works:
            amount = getattr(work, grows)
            expected = _continued(amounts, costs, amount)
            ended_by = next((name for name, cost in expected.items() if cost > (limits[name] or math.inf)), None)
            if ended_by is not None:
                break
            amounts.append(amount)
            costs.append(_cost(pipe, work, options.rounds))
            bar.update()
    found = {name: [getattr(cost, name) for cost in costs] for name in COSTS}
    return {
        "grows": grows,
        "start": asdict(options.start),
        "amount": amounts,
        **found,
        "exponent": {name: exponent(amounts, values) for name, values in found.items()},
        "last_exponent": {name: exponent(amounts[-2:], values[-2:]) for name, values in found.items()},
        "ended_by": ended_by,
        "reaches": {name: _reached(amounts, found[name], limits[name]) for name in LIMITED},
        "limits": dict(limits),
        "rounds": options.rounds,
    }


def _cost(pipe: Pipeline, work: Work, rounds: int) -> Cost:
    """Measure the peak memory of a first run, and time later runs unless the first was long."""
    rng = np.random.default_rng(0)
    scene = random_scene(rng)
    thing = scene.things[0]
    image, hole = render(scene, work.size), object_mask(rng, scene, thing, work.size)
    prompts = [captions(rng, scene, thing) for _ in range(work.pictures)]
    seeds = list(range(work.pictures))

    def run() -> tuple[float, float]:
        started, worked = time.perf_counter(), time.process_time()
        pipe.inpaint(image, hole, prompts, steps=work.steps, seed=seeds, progress=False)
        return time.perf_counter() - started, time.process_time() - worked

    first: list[tuple[float, float]] = []
    peak = peak_bytes(lambda: first.append(run()), pipe.device)
    runs = first if first[0][0] > LONG else [run() for _ in range(rounds)]
    seconds, cpu_seconds = (min(values) for values in zip(*runs, strict=True))
    return Cost(seconds=seconds, cpu_seconds=cpu_seconds, bytes=peak)


def _continued(amounts: Sequence[int], costs: Sequence[Cost], amount: int) -> dict[str, float]:
    """Extrapolate the known costs to `amount` by the fitted power, at least proportionally."""
    expected = {}
    for name in LIMITED:
        values = [getattr(cost, name) for cost in costs]
        if values and values[-1] is not None:
            power = max(exponent(amounts, values) or 1, 1)
            expected[name] = values[-1] * (amount / amounts[-1]) ** power
    return expected


def _reached(amounts: Sequence[int], costs: Sequence[float | None], limit: float | None) -> float | None:
    """Return the amount that costs `limit` by the fitted power from the last point on; None where that is FAR."""
    power, last = exponent(amounts, costs), costs[-1]
    if power is None or last is None or limit is None or not 0 < math.log(limit / last) < power * math.log(FAR):
        return None
    return float(amounts[-1] * (limit / last) ** (1 / power))


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory.

    Args:
        device: whose memory.

    Returns:
        Bytes; None on a CPU without /proc.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not MEMORY.exists():
        return None
    return _field(MEMORY, "MemAvailable")


def _field(file: Path, name: str) -> int:
    """Read bytes from a file of /proc, such as "VmRSS"."""
    lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
