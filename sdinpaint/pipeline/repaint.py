"""One run: jobs shown to the models as views, in batches, and what the models make of them joined to the pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from sdinpaint.checks import need
from sdinpaint.errors import SettingError
from sdinpaint.images.blending import Blend, compose
from sdinpaint.images.boxes import Box
from sdinpaint.images.crops import Crop, crop_box, regions, working_size
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.pipeline.patch_sampling import Batch, OnStep
from sdinpaint.pipeline.patches import View, look, of_one_size, whole
from sdinpaint.pipeline.requests import Job
from sdinpaint.pipeline.settings import Settings
from sdinpaint.sampling.noise import Draws

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]

REGION_GAP = 16
"""Pixels between two parts of a mask that are repainted one by one; nearer ones belong together."""


@dataclass
class Canvas:
    """A picture while it is repainted, region by region."""

    job: Job
    rgb: Bytes
    todo: list[Hole]
    boxes: list[Box] = field(default_factory=list)
    """The crops that were shown so far."""

    def replaced(self, *, whole: bool) -> Hole:
        """Where the canvas stands for the picture: in the hole or everywhere, and nowhere where nothing was painted."""
        if not self.boxes:
            return np.zeros_like(self.job.hole)
        return np.ones_like(self.job.hole) if whole else self.job.hole


@dataclass(frozen=True)
class Run:
    """The settings of a run on a pipeline; `masked` is whether the pictures' known pixels are shown and kept."""

    pipe: LatentDiffusion
    settings: Settings
    masked: bool
    progress: bool
    on_step: OnStep | None

    def __call__(self, jobs: Sequence[Job]) -> list[Canvas]:
        """Every job's canvas once it is done, those of one size in one batch; one with no hole is left as it is."""
        # what was loaded says in which dtype a run computes, and its manifest tells that
        with torch.autocast(self.pipe.device.type, enabled=False):
            return self._repainted(jobs)

    def _repainted(self, jobs: Sequence[Job]) -> list[Canvas]:
        canvases = [self._canvas(job) for job in jobs]
        draws = Draws((job.seed for job in jobs), self.pipe.device)
        while unfinished := {index: canvas for index, canvas in enumerate(canvases) if canvas.todo}:
            views = {index: self._view(canvas) for index, canvas in unfinished.items()}
            for batch in of_one_size(views, self.settings.batch_size):
                shown = Batch(self.pipe, self.settings, list(batch.values()), draws.of(list(batch)), masked=self.masked)
                for index, generated in zip(batch, shown.repaint(self.progress, self.on_step), strict=True):
                    self._join(canvases[index], views[index], generated)
        return canvases

    def check(self, jobs: Iterable[Job]) -> None:
        """Refuse what cannot be cropped or joined, before anything is computed.

        Raises: MaskError for a crop around nothing; SettingError for too large a crop, or where an extra is missing.
        """
        if self.settings.blend == "poisson":
            need("scipy.sparse", extra="mask", what='blend="poisson"')
        for job in jobs:
            self._crop(job.hole)

    def _crop(self, region: Hole) -> Crop:
        """What the model is shown around a region (H, W)."""
        if self.settings.crop is None:
            return whole((region.shape[0], region.shape[1]))
        size = self.pipe.family.size
        box = crop_box(region, self.settings.crop, size)
        return Crop(box, working_size(box.size, size))

    def _canvas(self, job: Job) -> Canvas:
        if self.settings.strength == 0 or not job.hole.any():
            return Canvas(job, job.picture.opaque(), [])
        todo = regions(job.hole, REGION_GAP) if self.settings.regions == "each" else [job.hole]
        if job.noise is not None and len(todo) > 1:
            found, hint = f'given for {len(todo)} regions with regions="each"', "give a seed, or repaint them together"
            raise SettingError("SETTING_NOISE", "noise", found, expected="a run of one region", hint=hint)
        return Canvas(job, job.picture.opaque(), todo)

    def _view(self, canvas: Canvas) -> View:
        """The next region with its surroundings; other regions that are still to come are holes in it too."""
        settings, crop = self.settings, self._crop(canvas.todo[0])
        hole = np.logical_or.reduce(canvas.todo)
        fill = settings.fill if settings.strength < 1 else "original"  # which then has no part in the start
        return look(canvas.job, canvas.rgb, hole, crop, fill=fill, soft=settings.soft)

    def _join(self, canvas: Canvas, view: View, generated: Bytes) -> None:
        """Put what was generated (8H, 8W, 3) for a view into the canvas, and take its region as done."""
        region, where = canvas.todo.pop(0), view.crop.box.slices
        height, width = view.crop.size
        rgb = view.crop.put_back(generated[:height, :width], canvas.rgb)
        if self.settings.paste_back:
            settings = self.settings
            rgb[where] = compose(
                canvas.rgb[where],
                rgb[where],
                region[where],
                blend=cast(Blend, settings.blend),
                match=settings.match_color,
            )
        canvas.rgb = rgb
        canvas.boxes.append(view.crop.box)
