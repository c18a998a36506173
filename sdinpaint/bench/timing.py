"""Timing of calls: interleaved in rounds, so that a slow minute of the machine hits every system alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = ["FirstRound", "first_round_told", "interleaved", "median_ratio", "rounds_of", "timed"]

T = TypeVar("T")
FirstRound = Callable[[float, int], None]
"""A function tell(seconds of the first round, number of rounds left)."""


@dataclass
class _Listener:
    tell: FirstRound
    busy: bool = False
    """True within a measurement, whose inner rounds are not told."""


_listener: ContextVar[_Listener | None] = ContextVar("listener", default=None)


def timed(call: Callable[[], object], device: str) -> Callable[[], float]:
    """Wrap a call so that it returns the seconds that it takes, until the device has finished.

    Args:
        call: what is timed.
        device: where it runs; a CUDA device is synchronized before and after.

    Returns:
        A function that runs `call` once and returns its seconds.
    """

    def run() -> float:
        _synchronize(device)
        started = time.perf_counter()
        call()
        _synchronize(device)
        return time.perf_counter() - started

    return run


def interleaved(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every call once in each round.

    Args:
        calls: by name, a function that returns a measured value.
        rounds: how often each is called.

    Returns:
        By name, the values in the order of the rounds.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in rounds_of(range(rounds)):
        for name, call in calls.items():
            found[name].append(call())
    return found


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Compute the median over rounds of ours / theirs; rounds that only one of them had are left out.

    Args:
        ours: a value for each round.
        theirs: the same of the baseline.

    Returns:
        The ratio to the baseline.
    """
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=False))


def rounds_of(items: Sequence[T]) -> Iterator[T]:
    """Iterate over the rounds of a measurement, and tell the listener how long the first one took.

    Args:
        items: a value for each round. Rounds within a round are not told.

    Returns:
        An iterator over `items`.
    """
    listener = _listener.get()
    if listener is None or listener.busy:
        yield from items
        return
    listener.busy = True
    started = time.perf_counter()
    try:
        for index, item in enumerate(items):
            yield item
            if index == 0:
                listener.tell(time.perf_counter() - started, len(items) - 1)
    finally:
        listener.busy = False


@contextmanager
def first_round_told(tell: FirstRound) -> Iterator[None]:
    """Call `tell` after the first round of each measurement within this block.

    Args:
        tell: takes the seconds of the round and the number of rounds left.
    """
    token = _listener.set(_Listener(tell))
    try:
        yield
    finally:
        _listener.reset(token)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
