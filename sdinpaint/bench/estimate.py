"""Estimates of the time of a run, by the number of runs and the times in rows of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdinpaint.bench.kernels import SHORTEST
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.rows import Row, environment, machine

__all__ = ["Planned", "announcement", "duration", "estimated_seconds"]

SECONDS = {"s": 1.0, "ms": 1e-3}
"""Units of time, and their seconds; other units of rows are no times."""
BASELINES = ("torch", "torch-flash", "torch-cudnn", "torch-efficient")
"""Systems that are measured whatever baselines are chosen."""
UNKNOWN = "unknown, the first round tells"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One part of the suite for one checkpoint and dtype."""

    part: str
    family: str
    dtype: str
    stored: str | None
    device: str
    quick: bool
    rounds: int
    steps: int
    size: int | None = None
    """Height and width of images in pixels; None where it is not known before the model is opened."""
    peers: tuple[str, ...] = ()


def _every_round(row: Row, plan: Planned) -> float:
    return plan.rounds + 1  # and once for the check, or to fill the page cache


def _of_kernel(row: Row, plan: Planned) -> float:
    """Count the calls that are timed in rounds of at least SHORTEST, and those of the check."""
    return (plan.rounds + 2) * max(1.0, SHORTEST / (SECONDS["ms"] * row["p50"]))


def _of_picture(row: Row, plan: Planned) -> float:
    rounds = (plan.rounds + 1) // 2 if row["what"].startswith("first") else plan.rounds + 1
    return rounds * plan.steps / row["steps"]


def _of_scenes(row: Row, plan: Planned) -> float:
    return float(row["scenes"])


RUNS: Mapping[str, Callable[[Row, Planned], float]] = {
    "load": _every_round,
    "step": _every_round,
    "startup": _every_round,
    "kernels": _of_kernel,
    "tuning": _of_kernel,
    "picture": _of_picture,
    "quality": _of_scenes,
}
"""The number of runs that a row of each part stands for; rows of other parts hold no time of their own."""


def estimated_seconds(plan: Planned, rows: Iterable[Row]) -> float | None:
    """Estimate a part from earlier rows of the same checkpoint, dtype and machine.

    Args:
        plan: what will run.
        rows: the latest rows.

    Returns:
        Seconds; None where no row tells.
    """
    here = {"device": plan.device, "environment": environment()}
    systems = {OURS, *BASELINES, *plan.peers}
    same = ("part", "family", "dtype", "stored", "device", "quick")
    alike = [
        row
        for row in rows
        if all(row[name] == getattr(plan, name) for name in same)
        and plan.size in (None, row["size"])
        and row.get("unit") in SECONDS
        and row["system"] in systems
        and machine(row) == machine(here)
    ]
    if plan.part not in RUNS or {OURS, *plan.peers} - {row["system"] for row in alike}:
        return None
    return sum(RUNS[plan.part](row, plan) * row["p50"] * SECONDS[row["unit"]] for row in alike)


def announcement(plans: Sequence[Planned], rows: Sequence[Row]) -> str:
    """Say which machine measures, and roughly for how long.

    Args:
        plans: what will run.
        rows: the latest rows of earlier runs.

    Returns:
        Two lines.
    """
    found = environment()
    device = plans[0].device if plans else "cpu"
    name = machine({"device": device, "environment": found})
    threads = "" if device.startswith("cuda") else f", {_count(found['threads'], 'thread')}"
    seconds = {plan: estimated_seconds(plan, rows) for plan in plans}
    known = [taken for taken in seconds.values() if taken is not None]
    unknown = dict.fromkeys(f"{plan.part} ({plan.family})" for plan, taken in seconds.items() if taken is None)
    said = UNKNOWN
    if known:
        said = f"about {duration(sum(known))}, by earlier rows of this machine"
        said += f"; besides {', '.join(unknown)}: {UNKNOWN}" if unknown else ""
    return f"Machine: {name}{threads}, device {device}, torch {found['torch']}\nTime: {said}"


def _count(number: object, name: str) -> str:
    return f"{number} {name}" + "s" * (number != 1)


def duration(seconds: float) -> str:
    """Round a time as a person says it.

    Args:
        seconds: the time.

    Returns:
        A text such as "40 s", "12 min" or "1.5 h".
    """
    if seconds < 100:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
