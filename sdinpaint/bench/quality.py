"""Quality against time: scores of repainted held-out scenes by sampler and number of steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from sdinpaint.bench.timing import rounds_of
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
    """The scenes that are repainted, and the settings that are compared."""

    scenes: int = 64
    """Number of held-out scenes."""
    batch: int = 32
    """Scenes that the model sees at once."""
    samplers: tuple[str, ...] = tuple(SAMPLERS)
    steps: tuple[int, ...] = (2, 5, 10, 20, 30, 50)
    guidance_scale: float = 7.5


def measure_quality(pipe: Pipeline, options: QualityOptions, *, progress: bool = True) -> list[Row]:
    """Repaint held-out scenes with every sampler and number of steps, and score them.

    Args:
        pipe: a pipeline that has learned the scenes of `sdinpaint.training`, as the included checkpoint has.
        options: scenes, samplers and steps.
        progress: show a progress bar.

    Returns:
        A row for each number of steps and sampler. `right_color`, `right_shape`: shares of the scenes with the colour
        and shape of the prompt. `seam`, `ring_delta_e`: means of `sdinpaint.metrics`; `background`: the same of the
        true background in the hole. `seconds`: per image, in a batch. `cpu_seconds`: processor time per image on all
        threads, which other programs do not change.
    """
    cases = held_out(options.scenes)
    backgrounds = [case.background for case in cases]
    background = {"seam": _mean(seam, backgrounds, cases), "ring_delta_e": _mean(ring_delta_e, backgrounds, cases)}
    _repaint(pipe, cases[: options.batch], options, options.samplers[0], steps=1)  # the first run of a shape is slower
    rows = []
    ways = list(product(options.steps, options.samplers))
    with progress_bar(len(ways), "quality", show=progress) as bar:
        for steps, sampler in rounds_of(ways):
            started, worked = time.perf_counter(), time.process_time()
            images = _repaint(pipe, cases, options, sampler, steps)
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
                    **_scores(images, cases),
                    "background": background,
                }
            )
            bar.update()
    return rows


def _repaint(pipe: Pipeline, cases: Sequence[Case], options: QualityOptions, sampler: str, steps: int) -> list[Bytes]:
    """Repaint every scene to (S, S, 3), with its index as seed, so that all settings start from the same noise."""
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


def _scores(images: Sequence[Bytes], cases: Sequence[Case]) -> dict[str, float]:
    pairs = list(zip(images, cases, strict=True))
    verdicts = [(judge(image, case.hole, case.background), case) for image, case in pairs]
    return {
        "right_color": statistics.fmean(verdict.color == case.color for verdict, case in verdicts),
        "right_shape": statistics.fmean(verdict.shape == case.shape for verdict, case in verdicts),
        "seam": _mean(seam, images, cases),
        "ring_delta_e": _mean(ring_delta_e, images, cases),
    }


def _mean(
    metric: Callable[[Bytes, NDArray[np.bool_]], float | None], images: Sequence[Bytes], cases: Sequence[Case]
) -> float:
    """Return the mean over the images whose hole has an edge."""
    values = [metric(image, case.hole) for image, case in zip(images, cases, strict=True)]
    return statistics.fmean(value for value in values if value is not None)
