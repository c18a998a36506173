"""What a benchmark found: rows of percentiles with the environment, kept as JSON lines."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sdinpaint.version import __version__

__all__ = ["Row", "append", "environment", "grouped", "latest", "spread"]

Row = Mapping[str, Any]

PACKAGES = ("diffusers", "openvino", "transformers", "triton")
"""Whose versions a row tells, where they are installed; none is imported for it."""
CPU = Path("/proc/cpuinfo")
WHAT_IT_IS = ("part", "what", "family", "dtype", "stored", "device", "size", "steps", "system")
"""Rows that agree in these are of the same thing, and the latest of them counts."""


@cache
def environment() -> dict[str, object]:
    """Where the figures come from: machine, versions, and the commit where this is a checkout."""
    found: dict[str, object] = {
        "sdinpaint": __version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def append(path: Path, row: Row) -> None:
    """Append a row as a JSON line, with the environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "environment": environment()}) + "\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, between neighbours in proportion."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def latest(paths: Iterable[Path]) -> list[Row]:
    """The rows in these files, of those of the same thing the last; lines of other benchmarks are passed over."""
    found: dict[tuple[object, ...], Row] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.keys() >= {*WHAT_IT_IS}:
                found[tuple(row[name] for name in WHAT_IT_IS)] = row
    return list(found.values())


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """The rows by their key, both in the order of their first appearance."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _commit() -> str | None:
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    if CPU.is_file():
        for line in CPU.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()
