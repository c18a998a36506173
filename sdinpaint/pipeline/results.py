"""What a run made: the pictures, how they join, and ways to look at them, to change them and to make them again."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Never, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sdinpaint.checks import check_name
from sdinpaint.errors import SettingError
from sdinpaint.images.boxes import Box
from sdinpaint.images.files import check_output_path, save_png
from sdinpaint.images.sheets import Row, contact_sheet, review_row
from sdinpaint.masks import Cover, MaskReport
from sdinpaint.metrics import Scores, scores
from sdinpaint.pipeline.requests import GivenMask, Job
from sdinpaint.pipeline.settings import MAX_SEED
from sdinpaint.provenance.manifest import as_given, record

__all__ = ["Painting", "Result"]

Judge = Callable[[Image.Image], float]
"""A picture -> how good it is: the higher, the better."""
MAX_TRIES = 64
SCORES = ("seam", "ring_delta_e")
EACH = ("prompt", "negative_prompt", "seed", "manifest")
"""Settings that are lists where there are several pictures."""


@dataclass(frozen=True, eq=False)
class Painting:
    """One picture that was made, and the job that it does."""

    image: Image.Image
    job: Job
    cover: Cover
    boxes: tuple[Box, ...]
    """The parts of the picture that the model was shown, in their order; none where nothing was to be repainted."""

    @cached_property
    def scores(self) -> Scores:
        """What the edge of the hole looks like, and what was changed on both of its sides."""
        return scores(self.job.picture.rgb, self._rgb, self.job.hole)

    @cached_property
    def report(self) -> MaskReport:
        """What there is to say of the mask."""
        return self.job.mask.report(self.cover)

    def manifest(self, made_with: Mapping[str, Any], kind: str, also: Sequence[str]) -> dict[str, Any]:
        """What the picture was made of and with, see `provenance.manifest.record`."""
        job = self.job
        results: dict[str, Any] = {
            "size": "x".join(map(str, self.image.size)),
            "crops": [list(box) for box in self.boxes],
            "scores": self.scores.to_json(),
        }
        return record(made_with, kind, also, image=job.picture, mask=job.mask, mask_path=job.mask_path, **results)

    def row(self) -> Row:
        """The pictures of a review: before, the hole, after, and the difference."""
        caption = f"seed {self.job.seed}"
        return review_row(self.job.picture.rgb, self.job.hole, self._rgb, boxes=self.boxes, caption=caption)

    @property
    def _rgb(self) -> NDArray[np.uint8]:
        return np.asarray(self.image.convert("RGB"))


@dataclass(frozen=True)
class Recipe:
    """How a result is made again, `make(**inputs, **settings)`, and `record(painting)`, the manifest of a picture."""

    make: Callable[..., Result]
    inputs: Mapping[str, Any]
    settings: Mapping[str, Any]
    record: Callable[[Painting], dict[str, Any]]

    def having_read(self, jobs: Sequence[Job]) -> Recipe:
        """The same with what the run has read in place of files and arrays, which may change or go away."""
        read: dict[str, Any] = {
            # a run without a mask extended what it was given itself
            "image": [job.picture if "mask" in self.inputs else as_given(job.picture) for job in jobs],
            "mask": [GivenMask(job.mask, job.mask_path) for job in jobs],
            "control_image": [job.control_image for job in jobs],
            "noise": torch.cat([job.noise for job in jobs if job.noise is not None])
            if jobs[0].noise is not None
            else None,
        }
        given = {name: value for name, value in self.inputs.items() if value is not None}
        return replace(self, inputs={name: read.get(name, value) for name, value in given.items()})


class Result:
    """The new images in the order of the inputs, and what they were made with.

    `len(result)`, `for image in result` and `result[i]` are of the images.
    `settings` holds all of it: `pipe.inpaint(image, mask, **result.settings)` makes the same pictures again, and so do
    `pipe.vary(image, ...)` and `pipe.outpaint(image, ...)`; noise and a `control_image` are given again too.
    A pickled result holds pictures and settings, and no model: `again` and `best_of` need the pipeline that made it.
    """

    def __init__(self, paintings: Sequence[Painting], recipe: Recipe) -> None:
        self.paintings = list(paintings)
        self.recipe = recipe.having_read([painting.job for painting in self.paintings])

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.seeds[:4])) + ", ..." * (len(self) > 4)
        sizes = {image.size for image in self.images}
        size = "{}x{}".format(*sizes.pop()) if len(sizes) == 1 else "several sizes"
        count, s = len(self), "s" * (len(self) > 1)
        return f"Result({count} image{s}, {size}, seed{s} {shown})"

    def __len__(self) -> int:
        return len(self.paintings)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...

    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        return self.images[index]

    def __getstate__(self) -> dict[str, Any]:
        settings = self.settings  # which says what the pipeline was, as long as there is one
        return {**vars(self), "settings": settings, "recipe": Recipe(_needs_pipeline, {}, settings, _needs_pipeline)}

    def __copy__(self) -> Result:
        other = object.__new__(Result)
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Result:
        """A result of its own that the same pipeline makes again."""
        other = copy.copy(self)
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "recipe"})
        return other

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]

    @property
    def images(self) -> list[Image.Image]:
        """All pictures."""
        return [painting.image for painting in self.paintings]

    @property
    def seeds(self) -> list[int]:
        """The seed of each."""
        return [painting.job.seed for painting in self.paintings]

    @property
    def scores(self) -> list[Scores]:
        """How well each picture's hole joins the rest of it, and how much was changed."""
        return [painting.scores for painting in self.paintings]

    @property
    def reports(self) -> list[MaskReport]:
        """What there was to say of each mask before the run."""
        return [painting.report for painting in self.paintings]

    @property
    def crops(self) -> list[tuple[Box, ...]]:
        """For each picture, the parts of it that the model was shown."""
        return [painting.boxes for painting in self.paintings]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The arguments that make these pictures again, and under "manifest" what they were made of and with."""
        manifests = [self.recipe.record(painting) for painting in self.paintings]
        return {**self.recipe.settings, "manifest": manifests if len(manifests) > 1 else manifests[0]}

    def again(self, **changes: Any) -> Result:
        """The same run with other arguments, e.g. `again(prompt="a blue fox", strength=0.6)`; seeds stay the same."""
        return self.recipe.make(**{**self.recipe.inputs, **self.recipe.settings, **changes})

    def best_of(self, n: int, score: str | Judge = "seam") -> Result:
        """For each picture the best of this one and n - 1 more, with the seeds that follow.

        score: a function of the picture, the higher the better; or the name of a score, the lower the better.
        Raises: SettingError for another n or name.
        """
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_TRIES:
            raise SettingError("SETTING_BEST_OF", "n", f"{n!r}", expected=f"a whole number from 1 to {MAX_TRIES}")
        cost = _cost(score)
        if self.recipe.make is _needs_pipeline:
            _needs_pipeline(**self.recipe.settings)
        tries = [self]
        for more in range(1, n):
            seeds = [(seed + more) % (MAX_SEED + 1) for seed in self.seeds]
            tries.append(self.again(seed=seeds if len(seeds) > 1 else seeds[0]))
        best = [min(rivals, key=cost) for rivals in zip(*(one.paintings for one in tries), strict=True)]
        seeds = [painting.job.seed for painting in best]
        settings = {**self.recipe.settings, "seed": seeds if len(seeds) > 1 else seeds[0]}
        return Result(best, replace(self.recipe, settings=settings))

    def sheet(self) -> Image.Image:
        """A row for each picture: the original, the hole, the result, what differs, and what a crop showed."""
        return contact_sheet([painting.row() for painting in self.paintings], scale=1)

    def save(self, path: Path | str) -> list[Path]:
        """Write the picture with its settings inside, and several as NAME-1, NAME-2, ...; -> the files.

        Raises: ImageError where one cannot be written; those before it are whole.
        """
        first, count = check_output_path(path), len(self.paintings)
        targets = [first] if count == 1 else [first.with_stem(f"{first.stem}-{index + 1}") for index in range(count)]
        for index, target in enumerate(targets):
            save_png(self.images[index], target, self.settings_of(index))
        return targets

    def settings_of(self, index: int) -> dict[str, Any]:
        """The arguments that make one of the pictures alone, and its manifest."""
        if len(self.paintings) == 1:
            return self.settings
        return {name: value[index] if name in EACH else value for name, value in self.settings.items()}

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.sheet().save(buffer, "PNG")
        return buffer.getvalue()


def _needs_pipeline(*_: object, manifest: Any = None, **__: object) -> Never:
    """Raise the error of a result that was pickled, and so has no pipeline to make images again."""
    kind = (manifest if isinstance(manifest, Mapping) else manifest[0])["kind"]
    given = "image, mask" if kind == "inpaint" else "image"
    found, expected = "the result was pickled, without its pipeline", "a result of this process"
    hint = f"pipe.{kind}({given}, **result.settings) makes the same pictures again, with a pipeline of the same weights"
    raise SettingError("SETTING_NO_PIPELINE", "again", found, expected=expected, hint=hint)


def _cost(score: str | Judge) -> Callable[[Painting], float]:
    """What is to be as low as possible."""
    if callable(score):
        return lambda painting: -score(painting.image)
    check_name("SETTING_SCORE", "score", score, SCORES)

    def cost(painting: Painting) -> float:
        value = getattr(painting.scores, score)
        return math.inf if value is None else float(value)

    return cost
