"""Events of a run: how far it is, for progress bars, previews and servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sdinpaint.progress import Bar, progress_bar

__all__ = ["Event", "Listener", "Reporter", "Stage", "event_bars"]

Stage = Literal["load", "encode", "denoise", "decode"]


@dataclass(frozen=True, eq=False)
class Event:
    """One moment of a run, or of loading a model.

    Args:
        stage: "load" counts tensors, "denoise" sampling steps, "encode" and "decode" are one unit each.
        done: units of the stage that are done; 0 where the stage begins.
        total: units of the stage.
        share: how much of all is done, from 0 to 1.
        index: indices of the images of the request that it is about; a batch has several.
        region: number of the region of the mask, from 0, where regions are repainted one after the other.
        x0: predicted clean latents (B, 4, H, W) of a step; `pipe.decode(event.x0)` makes preview images of them.
        seconds_left: estimated time until the run is done; None before the first step.
    """

    stage: Stage
    done: int
    total: int
    share: float
    index: tuple[int, ...] = ()
    region: int = 0
    x0: Tensor | None = None
    seconds_left: float | None = None


Listener = Callable[[Event], object]
"""A function that is called with every event; it may raise `sdinpaint.errors.Cancelled`."""


class Reporter:
    """Tells listeners of a run's events, and estimates how long it still takes.

    Args:
        listeners: called with every event, in their order.
        units: steps of the run and a decoding, which takes about as long as a step, counted for each image.
    """

    def __init__(self, listeners: Sequence[Listener], units: int) -> None:
        self._listeners, self._units, self._done = listeners, units, 0
        self._began = time.monotonic()

    def __call__(
        self, stage: Stage, done: int, total: int, index: Sequence[int], region: int = 0, x0: Tensor | None = None
    ) -> None:
        """Tell of one event.

        Args:
            stage: stage of the run.
            done: units of the stage that are done.
            total: units of the stage.
            index: indices of the images.
            region: number of the region.
            x0: predicted clean latents (B, 4, H, W), after a step.
        """
        if x0 is not None or (stage == "decode" and done == total):
            self._done += len(index)
        share = self._done / max(self._units, 1)
        left = None if self._done == 0 else (time.monotonic() - self._began) * (1 / share - 1)
        event = Event(stage, done, total, share, tuple(index), region, x0, left)
        for listen in self._listeners:
            listen(event)


@contextmanager
def event_bars(title: str, unit: str = "it", *, show: bool = True) -> Iterator[Listener]:
    """Draw a progress bar for each stage that counts steps or tensors, in a terminal or a notebook.

    Args:
        title: text before the bar.
        unit: what is counted.
        show: False draws nothing.

    Yields:
        A listener.
    """
    with ExitStack() as drawn:
        bar: Bar | None = None

        def draw(event: Event) -> None:
            nonlocal bar
            if event.stage in ("encode", "decode"):
                return
            if event.done == 0:
                bar = drawn.enter_context(progress_bar(event.total, title, unit, show=show))
            elif bar is not None:
                bar.update()
            if event.done == event.total:
                drawn.close()

        yield draw
