"""Rows of measurements: percentiles and ratios with the environment, kept as JSON lines."""

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

from sdinpaint.bench.report.kinds import kind_of, kind_rank, measured_kind
from sdinpaint.version import __version__

__all__ = ["Row", "append", "by_kind", "environment", "grouped", "identity", "latest", "lines_of", "machine"]
__all__ += ["machines", "measured", "row_of", "spread"]

Row = Mapping[str, Any]

PACKAGES = ("diffusers", "openvino", "transformers", "triton")
"""Packages whose versions a row holds where they are installed; none is imported for it."""
CPU = Path("/proc/cpuinfo")
WHAT_IT_IS = ("part", "what", "family", "dtype", "stored", "device", "size", "steps", "system")
"""Fields that identify a measurement: of the rows of one machine that agree in them, the latest counts."""


@cache
def environment() -> dict[str, object]:
    """Describe the machine, the versions, and the commit where this is a checkout."""
    found: dict[str, object] = {
        "sdinpaint": __version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        **measured_kind(),
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


def append(path: Path, row: Row) -> Row:
    """Append a row as a JSON line, with the environment; a line that was cut off before stays alone.

    Args:
        path: the file; missing folders are made.
        row: the fields of the row.

    Returns:
        The row with the environment.

    Raises:
        OSError: the file cannot be written.
    """
    row = {**row, "environment": environment()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        cut_off = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_off + json.dumps(row).encode() + b"\n")
    return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """Compute the 20th, 50th and 80th percentile by linear interpolation.

    Args:
        values: at least one.

    Returns:
        The fields p20, p50 and p80.
    """
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def measured(
    part: str,
    what: str,
    fields: Row,
    system: str,
    values: Sequence[float],
    unit: str,
    *,
    check: str,
    ratio: float | None = None,
    **more: object,
) -> dict[str, Any]:
    """Make the row of one measurement.

    Args:
        part: the part of the suite.
        what: the name of what is measured.
        fields: those of the case.
        system: the system that was measured.
        values: a value for each round.
        unit: of the values.
        check: what was checked before, in words.
        ratio: the ratio to this system, where it is a baseline: ours / its, the median over rounds.
        more: other fields, which may replace those of the case.

    Returns:
        The row, without the environment.
    """
    numbers = {**spread(values), "unit": unit, "values": list(values), "ratio": ratio, "check": check}
    return {"part": part, "what": what, **fields, "system": system, **numbers, **more}


def latest(paths: Iterable[Path]) -> list[Row]:
    """Read the latest row of each measurement on each machine; lines that are no rows of the suite are ignored.

    Args:
        paths: files of JSON lines.

    Returns:
        The rows, in the order in which each measurement first appears.
    """
    found: dict[tuple[object, ...], Row] = {}
    for path in paths:
        for line in lines_of(path):
            row = row_of(line)
            if (known := identity(row)) is not None:
                found[known] = row
    return list(found.values())


def lines_of(path: Path) -> list[str]:
    """Read the lines of a file of results.

    Args:
        path: the file.

    Returns:
        The lines, as far as they are text.
    """
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def row_of(line: str) -> Row:
    """Read a line of a file of results.

    Args:
        line: the line.

    Returns:
        The row; an empty one for a line that is none, as one that was cut off.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def identity(row: Row) -> tuple[object, ...] | None:
    """Tell what a row measures, and on which machine.

    Args:
        row: a line of a file of results.

    Returns:
        A key that is equal for rows of which only the latest counts; None for a line that is no row of the suite.
    """
    return (*(row[name] for name in WHAT_IT_IS), machine(row)) if row.keys() >= {*WHAT_IT_IS} else None


def machine(row: Row) -> str:
    """Name the machine of a row: its GPU, or its processor with the number of cores and the kind.

    Args:
        row: a row of the suite.

    Returns:
        A name such as "NVIDIA H200" or "AMD EPYC, 2 cores, avx2 (pretended)"; "" for a row without an environment.
    """
    found = row.get("environment", {})
    if str(row["device"]).startswith("cuda"):
        return str(found.get("gpu", ""))
    name = found.get("processor") or found.get("machine", "")
    cores = f"{found['cores']} cores" if "cores" in found else ""
    return ", ".join(filter(None, (str(name), cores, kind_of(row))))


def machines(rows: Iterable[Row]) -> str:
    """Name the machines of rows.

    Args:
        rows: rows of the suite.

    Returns:
        Their names with semicolons between, each once.
    """
    return "; ".join(dict.fromkeys(filter(None, map(machine, rows))))


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Group rows by a key, both in the order of their first appearance.

    Args:
        rows: rows of the suite.
        key: returns the key of a row.

    Returns:
        The rows by key.
    """
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by processor kind, those of machines that had it first, then the widest instructions first.

    Args:
        rows: rows of the suite.

    Returns:
        The rows by `kind_of`.
    """
    found = grouped(rows, kind_of)
    return {kind: found[kind] for kind in sorted(found, key=kind_rank)}


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
