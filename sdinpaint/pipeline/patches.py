"""What the models are shown of a picture: all of it or a crop, its hole filled, padded to what they take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdinpaint.errors import SettingError
from sdinpaint.images.boxes import Box
from sdinpaint.images.crops import Crop
from sdinpaint.images.fills import Fill, fill_hole
from sdinpaint.images.picture import pad_to_multiple, to_tensor
from sdinpaint.pipeline.requests import Job

__all__ = ["View", "look", "of_one_size", "whole"]


@dataclass(frozen=True, eq=False)
class View:
    """One picture as it is shown: pixels (1, C, 8H, 8W), those of pictures in [-1, 1]."""

    job: Job
    crop: Crop
    image: Tensor
    start: Tensor
    """The picture with its hole filled, from which a run of strength < 1 begins."""
    amount: Tensor
    """How much of each pixel is to change, in [0, 1]; 0 and 1 for a mask that is not soft."""
    hint: Tensor | None
    """RGB in [0, 1] that a ControlNet is shown in place of the picture."""


def look(
    job: Job, rgb: NDArray[np.uint8], hole: NDArray[np.bool_], crop: Crop, *, fill: str = "original", soft: bool = False
) -> View:
    """The view through `crop` of rgb (H, W, 3), which is the job's picture as it now is, and of its hole (H, W).

    Raises: SettingError where the given noise has another size, or a fill needs what is not installed.
    """
    pixels, inside = crop.cut(rgb), crop.cut_hole(hole)
    amount = np.where(inside, crop.cut_soft(job.mask.array), 0) if soft else inside
    image = _padded(to_tensor(pixels))
    start = image if fill == "original" else _padded(to_tensor(fill_hole(pixels, amount >= 0.5, cast(Fill, fill))))
    latent_size = image.shape[-2] // 8, image.shape[-1] // 8
    if job.noise is not None and job.noise.shape[-2:] != latent_size:
        found = f"{tuple(job.noise.shape[-2:])} latent rows and columns"
        raise SettingError("SETTING_NOISE", "noise", found, expected=f"{latent_size} for this picture")
    # reflected as the picture is: what is under the mask must not show in the padding
    amounts = _padded(torch.from_numpy(amount.astype(np.float32))[None, None])
    given = job.control_image
    hint = None if given is None else _padded(to_tensor(crop.cut(given.opaque()))) / 2 + 0.5
    return View(job, crop, image, start, amounts, hint)


def whole(size: tuple[int, int]) -> Crop:
    """All of a picture (H, W), as it is."""
    return Crop(Box(0, 0, size[1], size[0]), size)


def of_one_size(views: dict[int, View], at_most: int | None = None) -> Iterable[dict[int, View]]:
    """The views by padded size, `at_most` that many at a time: what can run as one batch."""
    groups: dict[torch.Size, list[int]] = {}
    for index, view in views.items():
        groups.setdefault(view.image.shape, []).append(index)
    for indices in groups.values():
        length = at_most or len(indices)
        for start in range(0, len(indices), length):
            yield {index: views[index] for index in indices[start : start + length]}


def _padded(image: Tensor) -> Tensor:
    padded, _ = pad_to_multiple(image)
    return padded
