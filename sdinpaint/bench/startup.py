"""The part `startup` of the suite: how long the command line takes to start, beside importing torch alone."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from sdinpaint.bench.cases import Case
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.rows import measured
from sdinpaint.bench.timing import interleaved
from sdinpaint.errors import SdInpaintError

__all__ = ["COMMANDS", "measure_startup", "process_seconds"]

Row = dict[str, Any]

COMMANDS = ("--help", "mask --help", "inspect --help", "inspect demo", "samplers")
"""Command lines of sdinpaint, of which `what` names each."""
TORCH = "torch"
"""The baseline: a process that imports torch and ends."""
TAIL = 600
"""The number of characters of a failed process' output that an error shows."""


def measure_startup(case: Case, commands: Sequence[Command]) -> Iterator[Row]:
    """Measure the seconds of whole processes, interleaved; the first round fills the page cache and is not counted.

    Args:
        case: gives the number of rounds; no checkpoint is opened.
        commands: unused.

    Returns:
        For each of COMMANDS a row of sdinpaint, and one of torch with the ratio of the medians.

    Raises:
        SdInpaintError: a command fails.
    """
    calls = {TORCH: partial(process_seconds, "-c", "import torch")}
    calls |= {line: partial(process_seconds, "-m", "sdinpaint.cli", *line.split()) for line in COMMANDS}
    values = {name: taken[1:] for name, taken in interleaved(calls, case.rounds + 1).items()}
    for line in COMMANDS:
        ratio = statistics.median(values[line]) / statistics.median(values[TORCH])
        row = partial(measured, "startup", line, case.fields, unit="s", size=None, steps=None)
        yield row(system=OURS, values=values[line], check="exit code 0")
        yield row(system=TORCH, values=values[TORCH], check="import torch", ratio=ratio)


def process_seconds(*arguments: str) -> float:
    """Time a new Python process from its start to its end.

    Args:
        arguments: those of the interpreter.

    Returns:
        Seconds.

    Raises:
        SdInpaintError: the process ends with another exit code than 0.
    """
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, errors="replace", check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        found = f"ended with code {done.returncode}: {done.stderr[-TAIL:].strip()}"
        raise SdInpaintError("BENCH_CHILD", f"python {' '.join(arguments)}", found)
    return seconds
