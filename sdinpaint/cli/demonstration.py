"""The demonstration: the included checkpoint repaints drawn scenes, which are shown on one contact sheet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdinpaint.cli.common import replacing
from sdinpaint.images.files import check_output_path, save_png
from sdinpaint.images.sheets import Cell, Row, contact_sheet, tinted
from sdinpaint.loading import load
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.training.scenes import MOODS, Background, Scene, Thing, object_mask, render

__all__ = ["Demonstration", "Task", "demonstrate", "repaint", "tasks"]

SHEET_NAME = "sdinpaint-demo.png"
TITLE = "Repainted where the hole is; everything else is kept bit for bit"
SEEDS = {"ddim": 2, "euler": 3}
"""Sampler -> seed; they differ, so that each sampler shows an image of its own."""
STEPS = 20
GUIDANCE = 4.0  # small models need less of it than large ones: above, shapes and shadows grow coarse


@dataclass(frozen=True)
class Task:
    """One row of the sheet: a scene, its hole (S, S), and prompts for it."""

    title: str
    scene: Scene
    hole: NDArray[np.bool_]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Demonstration:
    """The files that a demonstration wrote, with the number of images and the duration of the repainting."""

    path: Path
    """The contact sheet."""
    photo: Path
    """The first scene."""
    mask: Path
    """The mask of the first scene."""
    images: int
    seconds: float


def demonstrate(folder: Path, pipe: Pipeline | None = None) -> Demonstration:
    """Repaint every task and write the sheet.

    Args:
        folder: where the files are written.
        pipe: pipeline that repaints; the included checkpoint by default.

    Returns:
        The files, and the duration.

    Raises:
        ImageError: nothing can be written there.
    """
    path, photo, mask = (check_output_path(folder / name) for name in (SHEET_NAME, "scene.png", "scene-mask.png"))
    started = time.perf_counter()
    if pipe is None:
        pipe = load("demo", progress=False)
    todo = tasks(pipe.family.size)
    rows = repaint(pipe, todo)
    sheet = contact_sheet(rows, title=TITLE)
    how = {"model": pipe.source, "steps": STEPS, "guidance_scale": GUIDANCE, "seeds": SEEDS}
    scene, hole = Image.fromarray(render(todo[0].scene, pipe.family.size)), Image.fromarray(todo[0].hole)
    for image, target, settings in ((scene, photo, {}), (hole, mask, {}), (sheet, path, how)):
        with replacing(target):
            save_png(image, target, settings)
    return Demonstration(path, photo, mask, sum(len(row) - 2 for row in rows), time.perf_counter() - started)


def tasks(size: int) -> list[Task]:
    """Return the tasks of the demonstration, of which no scene was seen in training.

    Args:
        size: pixels a side.

    Returns:
        The tasks.
    """
    rng = np.random.default_rng(11)

    def room(mood: int, light: float) -> Background:
        return Background(*MOODS[mood], horizon=0.55, light=light)

    ball = Thing("ball", "red", x=0.42, y=0.66, radius=0.21)
    cube, cone = Thing("cube", "purple", 0.29, 0.68, 0.18), Thing("cone", "yellow", 0.74, 0.66, 0.18)
    place = Thing("ball", "black", x=0.55, y=0.68, radius=0.20)
    ring = Thing("ring", "green", x=0.25, y=0.66, radius=0.18)
    one, two = Scene(room(0, 1.0), (ball,)), Scene(room(1, -1.0), (cube, cone))
    empty, left = Scene(room(2, 1.0), ()), Scene(room(4, -1.0), (ring,))
    right_part = np.zeros((size, size), dtype=np.bool_)
    right_part[:, size // 2 :] = True
    return [
        Task("replace", one, object_mask(rng, one, ball, size), ("a blue star", "a green cube")),
        Task("recolour, remove", two, object_mask(rng, two, cube, size), ("an orange cube", "remove the object")),
        Task("add", empty, object_mask(rng, empty, place, size), ("a pink cone", "a red ball")),
        Task("extend to the side", left, right_part, ("a blue ball on the right", "empty scene")),
    ]


def repaint(pipe: Pipeline, todo: Sequence[Task]) -> list[Row]:
    """Repaint the tasks with every prompt and every sampler, as one batch per sampler.

    Args:
        pipe: pipeline that repaints.
        todo: the tasks.

    Returns:
        A row for each task: the image, its hole, and the repainted images.
    """
    size = pipe.family.size
    scenes = [render(task.scene, size) for task in todo]
    wishes = [(index, prompt) for index, task in enumerate(todo) for prompt in task.prompts]
    images, holes = [scenes[index] for index, _ in wishes], [todo[index].hole for index, _ in wishes]
    painted: dict[tuple[int, str, str], Image.Image] = {}
    for sampler, seed in SEEDS.items():
        result = pipe.inpaint(
            images,
            holes,
            [prompt for _, prompt in wishes],
            steps=STEPS,
            guidance_scale=GUIDANCE,
            sampler=sampler,
            seed=[seed] * len(wishes),
            blend="feather",
        )
        painted.update(((*wish, sampler), image) for wish, image in zip(wishes, result.images, strict=True))
    rows: list[Row] = []
    for index, (task, scene) in enumerate(zip(todo, scenes, strict=True)):
        given: list[Cell] = [
            (Image.fromarray(scene), f"{task.title}\nthe picture that is given"),
            (tinted(scene, task.hole), "the hole\nwhat may be repainted"),
        ]
        made: list[Cell] = [
            (painted[index, prompt, sampler], f"{prompt}\n{sampler}, {STEPS} steps, seed {SEEDS[sampler]}")
            for prompt, sampler in product(task.prompts, SEEDS)
        ]
        rows.append(given + made)
    return rows
