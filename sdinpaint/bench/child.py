"""Measurements in new processes, in which nothing was loaded before: `python -m sdinpaint.bench.child`."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdinpaint.bench.cases import Case
from sdinpaint.bench.growth import peak_bytes
from sdinpaint.bench.lora_files import write_lora
from sdinpaint.bench.paintings import paint
from sdinpaint.bench.peers.systems import PEERS, System, open_system
from sdinpaint.errors import SdInpaintError

__all__ = ["Figures", "first_picture", "import_seconds", "in_child"]

RESIDENT = Path("/proc/self/statm")
TAIL = 600
IMPORT = "import time; started = time.perf_counter(); {}; print(time.perf_counter() - started)"
FIRST = "first"

Figures = dict[str, float]


def in_child(part: str, system: str, case: Case) -> Figures:
    """Measure one system in a new process.

    Args:
        part: a name in MEASURES.
        system: the system; for "modes" what is inpainted, and the mode.
        case: the case.

    Returns:
        The figures by name.

    Raises:
        SdInpaintError: the process failed; its last output is in the error.
    """
    what = f"{part} of {case.family} with {system}"
    found: Figures = json.loads(_said(what, "-m", __name__, part, system, json.dumps(asdict(case))))
    return found


def import_seconds(statement: str) -> float:
    """Time an import statement in a new process, without the interpreter's own start.

    Args:
        statement: Python code.

    Returns:
        Seconds.

    Raises:
        SdInpaintError: the process failed.
    """
    return float(_said(statement, "-c", IMPORT.format(statement)))


def first_picture(system: str, case: Case) -> float:
    """Time a new process from its start to its first image.

    Every system's process imports sdinpaint too; beside torch, which all need, that is 0.1 to 0.2 s.

    Args:
        system: OURS, or a name in PEERS.
        case: the case.

    Returns:
        Seconds.

    Raises:
        SdInpaintError: the process failed.
    """
    started = time.time()  # a clock that both processes share
    return in_child(FIRST, system, case)["done"] - started


def _said(what: str, *arguments: str) -> str:
    """Run Python with these arguments, and return the last line that it writes."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise SdInpaintError("BENCH_CHILD", what, f"ended with code {done.returncode}: {done.stderr[-TAIL:].strip()}")
    return done.stdout.splitlines()[-1]


def load(name: str, case: Case) -> Figures:
    """Load a system.

    Args:
        name: the system.
        case: the case.

    Returns:
        `seconds` until it is loaded; `touched`, the seconds until one value of every page was read; `peak` memory in
        bytes, where the operating system tells it; bytes of the `weights`, and the `sum` of their absolute values.
    """
    found: Figures = {}
    weights: list[Tensor] = []

    def run() -> None:
        started = time.perf_counter()
        system = open_system(name, case)
        system.ready()
        found["seconds"] = time.perf_counter() - started
        weights.extend(system.parameters())
        touch(weights)
        found["touched"] = time.perf_counter() - started

    peak = peak_bytes(run, torch.device(case.device))
    found["weights"] = sum(weight.numel() * weight.element_size() for weight in weights)
    if peak is not None:
        found["peak"] = peak
    found["sum"] = sum(float(weight.abs().sum(dtype=torch.float64)) for weight in weights)
    return found


def step_memory(name: str, case: Case) -> Figures:
    """Measure the peak memory of the first and of the second guided step, with the loaded system.

    Args:
        name: the system.
        case: the case.

    Returns:
        Bytes of `step` and `second step`, where the operating system tells them; `finite`, whether a step is.
    """
    before, system = _loaded(name, case)
    found = {what: _peak(system.step, before, case) for what in ("step", "second step")}
    return _known(found) | {"finite": bool(system.step().isfinite().all())}


def picture_memory(name: str, case: Case) -> Figures:
    """Measure the peak memory of a whole image, with the loaded system.

    Args:
        name: the system.
        case: the case.

    Returns:
        Bytes of `picture`, where the operating system tells them; `finite`, whether the image is more than one colour.
    """
    before, system = _loaded(name, case)
    made: list[Image.Image] = []
    found = {"picture": _peak(lambda: made.append(system.picture()), before, case)}
    return _known(found) | {"finite": float(np.asarray(made[0]).std() > 0)}


def adapter(name: str, case: Case) -> Figures:
    """Add a LoRA to a system that has run once, step with it, and take it off.

    Args:
        name: the system.
        case: the case.

    Returns:
        Seconds to `add` and to `remove` it, and of a `step` with it beside one without (`plain`); bytes of the `peak`
        memory of adding, with the loaded system, where the operating system tells it; `finite`, whether the step with
        it is, and another one; `exact`, whether a step after it is the one from before.
    """
    before, system = _loaded(name, case)
    with TemporaryDirectory(prefix="sdinpaint-bench-") as folder:
        path = Path(folder) / "lora.safetensors"
        write_lora(path, case.checkpoint)
        first = system.step()
        found: dict[str, float | None] = {"plain": _seconds(system.step)}
        found["peak"] = _peak(lambda: found.update(add=_seconds(lambda: system.add_lora(path))), before, case)
        changed = system.step()
        found["step"] = _seconds(system.step)
        found["remove"] = _seconds(system.remove_lora)
        last = system.step()
    finite = bool(changed.isfinite().all()) and not torch.equal(changed, first)
    return _known(found) | {"finite": finite, "exact": torch.equal(first, last)}


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _loaded(name: str, case: Case) -> tuple[int, System]:
    """Return the resident memory before a system, and the system with its weights in memory."""
    before = resident(torch.device(case.device))
    system = open_system(name, case)
    system.ready()
    touch(system.parameters())
    return before, system


def _peak(run: Callable[[], object], before: int, case: Case) -> float | None:
    """Return the peak memory of a call beyond `before`; None where the operating system does not tell it."""
    device = torch.device(case.device)
    kept, peak = resident(device) - before, peak_bytes(run, device)
    return None if peak is None else kept + peak


def _known(found: Mapping[str, float | None]) -> Figures:
    return {what: figure for what, figure in found.items() if figure is not None}


def first(name: str, case: Case) -> Figures:
    """Make one image.

    Args:
        name: the system.
        case: the case.

    Returns:
        `done`, the time at which the image is complete.
    """
    open_system(name, case).picture()
    return {"done": time.time()}


def touch(weights: list[Tensor]) -> None:
    """Read one value of every memory page, so that memory-mapped weights are loaded.

    Args:
        weights: the tensors.
    """
    for weight in weights:
        weight.detach().flatten()[:: mmap.PAGESIZE // weight.element_size()].sum()


def resident(device: torch.device) -> int:
    """Return the bytes of resident memory.

    Args:
        device: on a GPU, the memory of tensors counts.

    Returns:
        Bytes; 0 where the operating system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(RESIDENT.read_text(encoding="utf-8").split()[1]) * mmap.PAGESIZE if RESIDENT.exists() else 0


MEASURES = {
    "load": load,
    "step memory": step_memory,
    "picture memory": picture_memory,
    "adapters": adapter,
    "modes": paint,
    FIRST: first,
}


def main(part: str, system: str, case: str) -> None:
    """Measure, and write the figures as a line of JSON. The packages of a baseline are imported before.

    Args:
        part: a name in MEASURES.
        system: as for `in_child`.
        case: the case as JSON.
    """
    if system in PEERS:
        PEERS[system].library()
    values = json.loads(case)
    sys.stdout.write(json.dumps(MEASURES[part](system, Case(**values | {"peers": tuple(values["peers"])}))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
