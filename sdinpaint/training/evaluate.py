"""How well a checkpoint does what it is asked: objects masked out of held-out scenes, and others asked for."""

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
"""Training draws its scenes from other seeds."""


@dataclass(frozen=True)
class Case:
    """A scene with a hole where an object was, and what is asked for instead."""

    image: NDArray[np.uint8]
    hole: NDArray[np.bool_]
    background: NDArray[np.uint8]
    """The scene without the object."""
    color: str
    shape: str

    @property
    def prompt(self) -> str:
        """What is asked for."""
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.color} {self.shape}"


@dataclass(frozen=True)
class Score:
    """Shares of the cases with the right colour and with the right shape."""

    color: float
    shape: float


def held_out(count: int) -> list[Case]:
    """The first `count` held-out cases; colour and shape are drawn without regard to what the scene showed."""
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
    """Repaint every case and judge it, with the prompt dropped where `prompted` is False -> score and pictures."""
    pictures: list[Image.Image] = []
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
        pictures += result.images
    verdicts = [
        judge(np.asarray(picture), case.hole, case.background) for picture, case in zip(pictures, cases, strict=True)
    ]
    pairs = list(zip(verdicts, cases, strict=True))
    return Score(
        color=sum(verdict.color == case.color for verdict, case in pairs) / len(pairs),
        shape=sum(verdict.shape == case.shape for verdict, case in pairs) / len(pairs),
    ), pictures
