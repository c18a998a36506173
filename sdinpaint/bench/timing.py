"""Seconds of calls, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["in_turns", "ratio", "timed"]


def timed(call: Callable[[], object], device: str) -> Callable[[], float]:
    """A call that is waited for and returns its seconds."""

    def run() -> float:
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        return time.perf_counter() - started

    return run


def in_turns(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each call returned, each called once a round, so that a slow minute of the machine is shared."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median, over the rounds that both had, of what ours takes for each one of theirs."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=False))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
