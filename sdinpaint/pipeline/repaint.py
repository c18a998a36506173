"""One run: items cut into patches, sampled in batches, and what the models make of them joined to the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdinpaint.checks import require_extra
from sdinpaint.errors import SdInpaintError, SettingError, warn
from sdinpaint.images.blending import compose
from sdinpaint.images.boxes import Box
from sdinpaint.images.crops import Crop, crop_box, regions, working_size
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.pipeline.events import Listener, Reporter, Stage
from sdinpaint.pipeline.memory import require_memory
from sdinpaint.pipeline.patch_sampling import PatchSampling
from sdinpaint.pipeline.patches import Patch, cut_patch, of_one_size, whole
from sdinpaint.pipeline.requests import Item, Request, image_name, require_noise
from sdinpaint.pipeline.settings import Settings
from sdinpaint.sampling import schedules
from sdinpaint.sampling.noise import Draws
from sdinpaint.sampling.samplers import OnStep

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]

REGION_GAP = 16
"""Pixels between two parts of a mask that are repainted one by one; nearer ones belong together."""


@dataclass
class Canvas:
    """An image while it is repainted, region by region."""

    item: Item
    rgb: Bytes
    todo: list[Hole]
    boxes: list[Box] = field(default_factory=list)
    """The crops that were shown so far."""

    def replaced(self, *, whole: bool) -> Hole:
        """Return the pixels at which the canvas takes the place of the image; none where nothing was repainted.

        Args:
            whole: whether it does everywhere, in place of the hole alone.

        Returns:
            The pixels (H, W).
        """
        if not self.boxes:
            return np.zeros_like(self.item.hole)
        return np.ones_like(self.item.hole) if whole else self.item.hole


class Repaint:
    """A run of a request on a model.

    Args:
        pipe: the models.
        request: the request; images that turn out to be unusable are refused in it.
        settings: settings of the request, resolved.
        listeners: told of every event.
        on_step: the caller's function for every step.
    """

    def __init__(
        self,
        pipe: LatentDiffusion,
        request: Request,
        settings: Settings,
        listeners: Sequence[Listener] = (),
        on_step: OnStep | None = None,
    ) -> None:
        self.pipe, self.request, self.settings, self.on_step = pipe, request, settings, on_step
        if settings.blend == "poisson":
            require_extra("scipy.sparse", extra="mask", what='blend="poisson"')
        self.canvases: dict[int, Canvas] = {}
        for index, item in enumerate(request.items):
            if item is not None:
                try:
                    self.canvases[index] = self._canvas(item)
                except SdInpaintError as error:
                    request.refuse(index, error)
        shown = [self._crop(region).size for canvas in self.canvases.values() for region in canvas.todo[:1]]
        require_memory(pipe, shown, settings)
        units = schedules.steps_run(settings.steps, settings.strength) + 1
        self._report = Reporter(listeners, units * sum(len(canvas.todo) for canvas in self.canvases.values()))

    def __call__(self) -> dict[int, Canvas]:
        """Repaint all regions of all images, in batches of patches of one size.

        Returns:
            The canvases by the index of the image; one without a hole is left as it is.
        """
        # the dtype of a run is the one that its manifest names, whatever autocast says
        with torch.autocast(self.pipe.device.type, enabled=False):
            draws = Draws((canvas.item.seed for canvas in self.canvases.values()), self.pipe.device)
            place = {index: number for number, index in enumerate(self.canvases)}
            region = 0
            while todo := {index: canvas for index, canvas in self.canvases.items() if canvas.todo}:
                patches = {index: self._patch(canvas) for index, canvas in todo.items()}
                for batch in of_one_size(patches, self.settings.batch_size):
                    self._sample(batch, draws.of([place[index] for index in batch]), region)
                region += 1
        return self.canvases

    def _sample(self, batch: dict[int, Patch], draws: Draws, region: int) -> None:
        report = partial(self._report, index=tuple(batch), region=region)

        def watch(stage: Stage, done: int, total: int, x0: Tensor | None = None) -> None:
            report(stage, done, total, x0=x0)

        patches = list(batch.values())
        masked = self.request.masked
        sampling = PatchSampling(
            self.pipe, self.settings, patches, draws, masked=masked, watch=watch, on_step=self.on_step
        )
        for index, generated in zip(batch, sampling(), strict=True):
            self._join(self.canvases[index], batch[index], generated)
        for index, doubt in zip(batch, sampling.doubts, strict=True):
            if doubt:
                warn(image_name(index, len(self.request)) + doubt, index)

    def _crop(self, region: Hole) -> Crop:
        """Return the part of an image that the model sees around a region (H, W)."""
        if self.settings.crop is None:
            return whole((region.shape[0], region.shape[1]))
        size = self.pipe.family.size
        box = crop_box(region, self.settings.crop, size)
        return Crop(box, working_size(box.size, size))

    def _canvas(self, item: Item) -> Canvas:
        if self.settings.strength == 0 or not item.hole.any():
            return Canvas(item, item.image.opaque(), [])
        todo = regions(item.hole, REGION_GAP) if self.settings.regions == "each" else [item.hole]
        if item.noise is not None and len(todo) > 1:
            found, hint = f'given for {len(todo)} regions with regions="each"', "give a seed, or repaint them together"
            raise SettingError("SETTING_NOISE", "noise", found, expected="a run of one region", hint=hint)
        crops = [self._crop(region) for region in todo]
        if item.noise is not None:
            require_noise(item.noise, crops[0].size)
        return Canvas(item, item.image.opaque(), todo)

    def _patch(self, canvas: Canvas) -> Patch:
        """Cut the next region out with its surroundings; regions that are still to come are holes in it too."""
        settings, crop = self.settings, self._crop(canvas.todo[0])
        hole = np.logical_or.reduce(canvas.todo)
        fill = settings.fill if settings.strength < 1 else "original"  # which then has no part in the start
        return cut_patch(canvas.item, canvas.rgb, hole, crop, fill=fill, soft=settings.soft)

    def _join(self, canvas: Canvas, patch: Patch, generated: Bytes) -> None:
        """Put what was generated (8H, 8W, 3) for a patch into the canvas, and take its region as done."""
        region, where = canvas.todo.pop(0), patch.crop.box.slices
        height, width = patch.crop.size
        rgb = patch.crop.put_back(generated[:height, :width], canvas.rgb)
        if self.settings.paste_back:
            settings = self.settings
            rgb[where] = compose(
                canvas.rgb[where], rgb[where], region[where], blend=settings.blend, match=settings.match_color
            )
        canvas.rgb = rgb
        canvas.boxes.append(patch.crop.box)
