"""What the seconds of a picture buy: held-out scenes, judged and scored, by sampler and number of steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from sdinpaint.metrics import ring_delta_e, seam
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.progress import progress_bar
from sdinpaint.sampling import SAMPLERS
from sdinpaint.training.evaluate import Case, held_out
from sdinpaint.training.judge import judge

__all__ = ["QualityOptions", "measure_quality"]

Bytes = NDArray[np.uint8]
Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """How many held-out scenes are repainted, how many at a time, and in which ways."""

    scenes: int = 64
    batch: int = 32
    samplers: tuple[str, ...] = tuple(SAMPLERS)
    steps: tuple[int, ...] = (2, 5, 10, 20, 30, 50)
    guidance_scale: float = 7.5


def measure_quality(pipe: Pipeline, options: QualityOptions, *, progress: bool = True) -> list[Row]:
    """A row per number of steps and sampler; `pipe` has learned the scenes of `sdinpaint.training`, as "demo" has.

    right_color, right_shape: shares of the scenes where the judge finds what was asked for. seam, ring_delta_e: means
    of `sdinpaint.metrics`, and the same of the true background in the hole: what a perfect repaint of it would have.
    seconds: per picture, in a batch, from the picture and its mask to the repainted one. cpu_seconds: what the
    processor worked in them, on all threads, which on a busy machine is less, and says more.
    """
    cases = held_out(options.scenes)
    backgrounds = [case.background for case in cases]
    background = {"seam": _mean(seam, backgrounds, cases), "ring_delta_e": _mean(ring_delta_e, backgrounds, cases)}
    _repaint(pipe, cases[: options.batch], options, options.samplers[0], steps=1)  # the first run of a shape is slower
    rows = []
    ways = list(product(options.steps, options.samplers))
    with progress_bar(len(ways), "quality", show=progress) as bar:
        for steps, sampler in ways:
            started, worked = time.perf_counter(), time.process_time()
            pictures = _repaint(pipe, cases, options, sampler, steps)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
            rows.append(
                {
                    "sampler": sampler,
                    "steps": steps,
                    "scenes": options.scenes,
                    "batch": options.batch,
                    "guidance_scale": options.guidance_scale,
                    "seconds": seconds / len(cases),
                    "cpu_seconds": cpu_seconds / len(cases),
                    **_scores(pictures, cases),
                    "background": background,
                }
            )
            bar.update()
    return rows


def _repaint(pipe: Pipeline, cases: Sequence[Case], options: QualityOptions, sampler: str, steps: int) -> list[Bytes]:
    """Every case's picture (S, S, 3); a case's seed is its place in the list, so that all ways start alike."""
    result = pipe.inpaint(
        [case.image for case in cases],
        [case.hole for case in cases],
        [case.prompt for case in cases],
        steps=steps,
        guidance_scale=options.guidance_scale,
        sampler=sampler,
        seed=list(range(len(cases))),
        batch_size=options.batch,
        progress=False,
    )
    return [np.asarray(image) for image in result.images]


def _scores(pictures: Sequence[Bytes], cases: Sequence[Case]) -> dict[str, float]:
    pairs = list(zip(pictures, cases, strict=True))
    verdicts = [(judge(picture, case.hole, case.background), case) for picture, case in pairs]
    return {
        "right_color": statistics.fmean(verdict.color == case.color for verdict, case in verdicts),
        "right_shape": statistics.fmean(verdict.shape == case.shape for verdict, case in verdicts),
        "seam": _mean(seam, pictures, cases),
        "ring_delta_e": _mean(ring_delta_e, pictures, cases),
    }


def _mean(
    metric: Callable[[Bytes, NDArray[np.bool_]], float | None], pictures: Sequence[Bytes], cases: Sequence[Case]
) -> float:
    """The mean over the pictures whose hole has an edge."""
    values = [metric(picture, case.hole) for picture, case in zip(pictures, cases, strict=True)]
    return statistics.fmean(value for value in values if value is not None)
