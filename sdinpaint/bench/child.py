"""What is measured in a process of its own, in which nothing was loaded before: `python -m sdinpaint.bench.child`."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sdinpaint.bench.cases import Case
from sdinpaint.bench.growth import peak_bytes
from sdinpaint.bench.paintings import paint
from sdinpaint.bench.peers.systems import PEERS, open_system
from sdinpaint.errors import SdInpaintError

__all__ = ["Figures", "first_picture", "import_seconds", "in_child"]

RESIDENT = Path("/proc/self/statm")
TAIL = 600
IMPORT = "import time; started = time.perf_counter(); {}; print(time.perf_counter() - started)"
FIRST = "first"

Figures = dict[str, float]


def in_child(part: str, system: str, case: Case) -> Figures:
    """The figures of a part. Raises: SdInpaintError with the end of what the process said."""
    what = f"{part} of {case.family} with {system}"
    found: Figures = json.loads(_said(what, "-m", __name__, part, system, json.dumps(asdict(case))))
    return found


def import_seconds(statement: str) -> float:
    """Of this statement in a new process. Raises: SdInpaintError."""
    return float(_said(statement, "-c", IMPORT.format(statement)))


def first_picture(system: str, case: Case) -> float:
    """Seconds from the start of a new process to its first picture. Raises: SdInpaintError.

    Every system's process imports this library too: with torch there for all, a tenth of a second or two.
    """
    started = time.time()  # of the machine, not of a process
    return in_child(FIRST, system, case)["done"] - started


def _said(what: str, *arguments: str) -> str:
    """The last line that Python writes, asked in this way."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise SdInpaintError("BENCH_CHILD", what, f"ended with code {done.returncode}: {done.stderr[-TAIL:].strip()}")
    return done.stdout.splitlines()[-1]


def load(name: str, case: Case) -> Figures:
    """Seconds until the system is loaded, and until all its weights are in memory; peak memory over the weights.

    `weights` and `sum` are bytes, and the sum of the weights' absolute values, by which systems are compared.
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


def memory(name: str, case: Case) -> Figures:
    """Peak bytes of a guided step and of a whole picture, with what the system takes before them."""
    device = torch.device(case.device)
    before = resident(device)
    system = open_system(name, case)
    system.ready()
    touch(system.parameters())
    found: Figures = {}
    runs: dict[str, Callable[[], object]] = {"step": system.step, "picture": system.picture}
    for what, run in runs.items():
        kept = resident(device) - before
        peak = peak_bytes(run, device)
        if peak is not None:
            found[what] = kept + peak
    found["finite"] = bool(system.step().isfinite().all())
    return found


def first(name: str, case: Case) -> Figures:
    """`done`: the time at which there is a picture."""
    open_system(name, case).picture()
    return {"done": time.time()}


def touch(weights: list[Tensor]) -> None:
    """Read one value of every page, which a memory map would put off."""
    for weight in weights:
        weight.detach().flatten()[:: mmap.PAGESIZE // weight.element_size()].sum()


def resident(device: torch.device) -> int:
    """Bytes in memory now, on a GPU those that tensors take; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(RESIDENT.read_text(encoding="utf-8").split()[1]) * mmap.PAGESIZE if RESIDENT.exists() else 0


MEASURES = {"load": load, "memory": memory, "modes": paint, FIRST: first}


def main(part: str, system: str, case: str) -> None:
    """Measure, and write the figures as a line of JSON. What has to be imported is imported before."""
    if system in PEERS:
        PEERS[system].library()
    values = json.loads(case)
    sys.stdout.write(json.dumps(MEASURES[part](system, Case(**values | {"peers": tuple(values["peers"])}))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
