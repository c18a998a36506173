"""Evaluate a checkpoint on held-out scenes: an object is masked out, and the prompt asks for another one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.training.judge import judge
from sdinpaint.training.scenes import COLORS, SHAPES, object_mask, random_scene, render, without

__all__ = ["Case", "Score", "held_out", "score"]

SIZE = 128
HELD_OUT_SEED = 20_000_000
"""Seed of the held-out scenes, which training does not use."""


@dataclass(frozen=True)
class Case:
    """A scene with a hole over an object, and the object to generate there."""

    image: NDArray[np.uint8]
    """The scene, (S, S, 3)."""
    hole: NDArray[np.bool_]
    """The mask, (S, S), True = repaint."""
    background: NDArray[np.uint8]
    """The scene without the object, (S, S, 3)."""
    color: str
    """Colour of the object to generate."""
    shape: str
    """Shape of the object to generate."""

    @property
    def prompt(self) -> str:
        """Return the prompt, such as "a red ball"."""
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.color} {self.shape}"


@dataclass(frozen=True)
class Score:
    """Fractions of the cases with the right colour and with the right shape."""

    color: float
    shape: float


def held_out(count: int) -> list[Case]:
    """Make held-out cases; colour and shape to generate do not depend on the scene.

    Args:
        count: number of cases; fewer cases are a prefix of more.

    Returns:
        The cases.
    """
    cases = []
    for index in range(count):
        rng = np.random.default_rng((HELD_OUT_SEED, index))
        scene = random_scene(rng)
        thing = scene.things[0]
        hole = object_mask(rng, scene, thing, SIZE)
        color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
        cases.append(Case(render(scene, SIZE), hole, render(without(scene, thing), SIZE), color, shape))
    return cases


def score(
    pipe: Pipeline, cases: list[Case], *, sampler: str, steps: int = 25, prompted: bool = True, batch: int = 32
) -> tuple[Score, list[Image.Image]]:
    """Inpaint every case and judge the results.

    Args:
        pipe: the pipeline.
        cases: the cases.
        sampler: name of the sampler.
        steps: number of sampling steps.
        prompted: use the prompts; False inpaints with empty ones.
        batch: cases that are inpainted at once.

    Returns:
        The score, and the images.
    """
    images: list[Image.Image] = []
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        result = pipe.inpaint(
            [case.image for case in part],
            [case.hole for case in part],
            [case.prompt if prompted else "" for case in part],
            steps=steps,
            sampler=sampler,
            seed=[start + index for index in range(len(part))],
            progress=False,
        )
        images += result.images
    verdicts = [judge(np.asarray(image), case.hole, case.background) for image, case in zip(images, cases, strict=True)]
    pairs = list(zip(verdicts, cases, strict=True))
    return Score(
        color=sum(verdict.color == case.color for verdict, case in pairs) / len(pairs),
        shape=sum(verdict.shape == case.shape for verdict, case in pairs) / len(pairs),
    ), images
