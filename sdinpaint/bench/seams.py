"""The part `seams` of the suite: how each way of joining image and repainted hole leaves the edge between them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sdinpaint import metrics
from sdinpaint.bench.cases import GUIDANCE
from sdinpaint.bench.cases import Case as Measured
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.report.rows import measured
from sdinpaint.bench.timing import rounds_of
from sdinpaint.errors import NumericError
from sdinpaint.images.blending import BLENDS, Blend, compose
from sdinpaint.loading import load
from sdinpaint.masks import Cover
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.training.evaluate import Case, held_out
from sdinpaint.training.judge import judge

__all__ = ["COVERS", "measure_seams", "seams_of"]

Bytes = NDArray[np.uint8]
Row = dict[str, Any]

COVERS: tuple[Cover, ...] = get_args(Cover)
"""Ways of mask downsampling."""
SCENES, STEPS, BATCH = 64, 25, 16
QUICK_SCENES, QUICK_STEPS = 4, 2


def measure_seams(case: Measured, commands: Sequence[Command]) -> Iterator[Row]:
    """Repaint held-out scenes of the included checkpoint once, and join them to their images in every way.

    Args:
        case: the included checkpoint, its dtype and device.
        commands: unused.

    Returns:
        A row for each mask downsampling, blend and colour matching: p50 is the mean seam.

    Raises:
        NumericError: a known pixel was changed.
    """
    scenes, steps = (QUICK_SCENES, QUICK_STEPS) if case.quick else (SCENES, STEPS)
    pipe = load(case.checkpoint, device=case.device, dtype=case.dtype, progress=False)
    cases = held_out(scenes)
    for cover in rounds_of(COVERS):
        images = _repainted(pipe, cases, cover, steps)
        for blend, match in product(BLENDS, (False, True)):
            what = f"blend {blend}, cover {cover}" + ", match_color" * match
            found = seams_of(cases, images, blend, match)
            if found["known_error"]:
                changed = f"known pixels are changed by up to {found['known_error']}"
                raise NumericError("BENCH_WRONG", f"seams, {what}", changed, hint="no row of it is recorded")
            way: Row = {
                "cover": cover,
                "blend": blend,
                "match_color": match,
                "scenes": scenes,
                "guidance_scale": GUIDANCE,
            }
            check = "known pixels unchanged"
            yield measured(
                "seams", what, case.fields, OURS, [found["seam"]], "delta E", check=check, steps=steps, **way, **found
            )


def seams_of(cases: Sequence[Case], images: Sequence[Bytes], blend: Blend, match: bool) -> dict[str, float]:
    """Join repainted scenes to their images in one way, and score them.

    Args:
        cases: the scenes.
        images: what the model made of them (S, S, 3), known pixels too.
        blend: one of BLENDS.
        match: whether colours are matched.

    Returns:
        Means of `seam` and `ring_delta_e`; shares of scenes with the `right_color` and `right_shape`; `known_error`,
        the largest change of a known pixel.
    """
    joined = [
        compose(case.image, image, case.hole, blend=blend, match=match)
        for case, image in zip(cases, images, strict=True)
    ]
    scores = [metrics.scores(case.image, after, case.hole) for case, after in zip(cases, joined, strict=True)]
    verdicts = [(judge(after, case.hole, case.background), case) for case, after in zip(cases, joined, strict=True)]
    return {
        "seam": statistics.fmean(score.seam or 0 for score in scores),
        "ring_delta_e": statistics.fmean(score.ring_delta_e or 0 for score in scores),
        "right_color": statistics.fmean(verdict.color == case.color for verdict, case in verdicts),
        "right_shape": statistics.fmean(verdict.shape == case.shape for verdict, case in verdicts),
        "known_error": max(score.known_error for score in scores),
    }


def _repainted(pipe: Pipeline, cases: Sequence[Case], cover: Cover, steps: int) -> list[Bytes]:
    """Return the model's own image of every scene, without pasting known pixels back."""
    result = pipe.inpaint(
        [case.image for case in cases],
        [case.hole for case in cases],
        [case.prompt for case in cases],
        steps=steps,
        guidance_scale=GUIDANCE,
        seed=list(range(len(cases))),
        batch_size=BATCH,
        cover=cover,
        paste_back=False,
        progress=False,
    )
    return [np.asarray(image) for image in result.images]
