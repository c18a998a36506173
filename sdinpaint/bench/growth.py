"""How cost grows with the work: seconds and peak memory by size of the picture, number of pictures, and steps."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sdinpaint.pipeline import Pipeline
from sdinpaint.training.scenes import captions, object_mask, random_scene, render

__all__ = ["GrowthOptions", "Work", "exponent", "measure_growth", "peak_bytes"]

Row = dict[str, object]
COSTS = ("seconds", "cpu_seconds", "bytes")
LIMITED = ("bytes", "seconds")
"""Those of them with a limit, `most_...` of the options."""
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One run: so many square pictures at once, `size` pixels a side."""

    size: int = 128
    pictures: int = 1
    steps: int = 10

    @property
    def pixels(self) -> int:
        """Of one picture."""
        return self.size**2


@dataclass(frozen=True, kw_only=True)
class GrowthOptions:
    """What grows, from which work on, and where a curve ends because the next point would take too much."""

    start: Work = Work()
    sizes: tuple[int, ...] = (128, 192, 256, 384, 512, 768, 1024)
    pictures: tuple[int, ...] = (1, 2, 4, 8, 16)
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    rounds: int = 3
    most_seconds: float = 60.0
    """Of one run."""
    most_bytes: int = 4 * 2**30
    """Of one run, beyond what was there before it."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run takes."""

    seconds: float
    cpu_seconds: float
    """Of the processor, on all threads: on a busy machine less than `seconds`, and steadier."""
    bytes: float | None
    """None where the system does not tell."""


def measure_growth(pipe: Pipeline, options: GrowthOptions, *, progress: bool = True) -> list[Row]:
    """A row per curve: `amount` of what grows, and of each cost (as in `Cost`) its values and how it grows.

    seconds, cpu_seconds: of the fastest of the rounds. bytes: the peak beyond what was there before. Their exponents
    are 1 where twice the work costs twice as much: of all points, and of the last two. ended_by: "seconds" or "bytes"
    where the next point, as the fitted power goes on, would have been beyond that limit.
    """
    curves = {
        "pixels": [replace(options.start, size=size) for size in options.sizes],
        "pictures": [replace(options.start, pictures=pictures) for pictures in options.pictures],
        "steps": [replace(options.start, steps=steps) for steps in options.steps],
    }
    _cost(pipe, options.start, rounds=1)  # the very first run loads code, which would count as its memory
    return [_curve(pipe, grows, works, options, progress) for grows, works in curves.items()]


def exponent(amounts: Sequence[float], costs: Sequence[float | None]) -> float | None:
    """k of cost = c * amount ** k, by least squares of the logarithms; None where nothing can be fitted."""
    known = [cost for cost in costs if cost]
    if len(known) < max(len(costs), 2):
        return None
    return float(np.polyfit(np.log(amounts), np.log(known), 1)[0])


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that `run` takes at a time beyond what was there before; None on a CPU without Linux' /proc."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not CLEAR_REFS.exists():
        run()
        return None
    # what earlier runs freed but the allocator kept would not be seen to be taken again
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5", encoding="ascii")  # resets VmHWM. Source: proc_pid_clear_refs(5)
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _curve(pipe: Pipeline, grows: str, works: Sequence[Work], options: GrowthOptions, progress: bool) -> Row:
    amounts: list[int] = []
    costs: list[Cost] = []
    ended_by = None
    for work in tqdm(works, desc=grows, disable=None if progress else True):
        amount = getattr(work, grows)
        expected = _continued(amounts, costs, amount)
        ended_by = next((name for name, cost in expected.items() if cost > getattr(options, f"most_{name}")), None)
        if ended_by is not None:
            break
        amounts.append(amount)
        costs.append(_cost(pipe, work, options.rounds))
    found = {name: [getattr(cost, name) for cost in costs] for name in COSTS}
    return {
        "grows": grows,
        "start": asdict(options.start),
        "amount": amounts,
        **found,
        "exponent": {name: exponent(amounts, values) for name, values in found.items()},
        "last_exponent": {name: exponent(amounts[-2:], values[-2:]) for name, values in found.items()},
        "ended_by": ended_by,
        "most_seconds": options.most_seconds,
        "most_bytes": options.most_bytes,
        "rounds": options.rounds,
    }


def _cost(pipe: Pipeline, work: Work, rounds: int) -> Cost:
    """The peak of a first run, which is slower than those that are timed."""
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

    peak = peak_bytes(run, pipe.device)
    seconds, cpu_seconds = (min(values) for values in zip(*(run() for _ in range(rounds)), strict=True))
    return Cost(seconds=seconds, cpu_seconds=cpu_seconds, bytes=peak)


def _continued(amounts: Sequence[int], costs: Sequence[Cost], amount: int) -> dict[str, float]:
    """What `amount` would cost as the fitted power goes on, at least in proportion; of costs that are known."""
    expected = {}
    for name in LIMITED:
        values = [getattr(cost, name) for cost in costs]
        if values and values[-1] is not None:
            power = max(exponent(amounts, values) or 1, 1)
            expected[name] = values[-1] * (amount / amounts[-1]) ** power
    return expected


def _status(field: str) -> int:
    """Bytes of this process, e.g. "VmRSS"."""
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
