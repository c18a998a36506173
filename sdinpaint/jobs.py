"""What a caller gave, read and checked before anything is computed: one job per picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdinpaint.errors import ImageError, SettingError
from sdinpaint.images import Picture, pad_to_multiple, read_picture, to_tensor
from sdinpaint.masks import binarize, read_mask
from sdinpaint.settings import as_list, check_prompt, check_seed, common_length

__all__ = ["Job", "of_one_size", "read_jobs", "unbatched"]


@dataclass(frozen=True)
class Job:
    """One picture to repaint: what was given, and its pixels, hole and hint padded to what the models take."""

    picture: Picture
    mask: NDArray[np.bool_]
    image: Tensor
    hole: Tensor
    prompt: str
    negative_prompt: str | None
    seed: int
    noise: Tensor | None
    hint: Tensor | None
    """RGB in [0, 1] that a ControlNet is shown in place of the picture."""


def read_jobs(
    image: Any,
    mask: Any,
    prompt: Any = "",
    negative_prompt: Any = "",
    seed: Any = 0,
    noise: Any = None,
    control_image: Any = None,
    *,
    channels: int,
    keep_none: bool,
) -> list[Job]:
    """One job per picture, from lists of one length; one of anything stands for all.

    channels: of the latents. keep_none: whether no negative prompt is something else than the empty one.
    Raises: ImageError, MaskError, SettingError naming the argument.
    """
    negatives = as_list(negative_prompt)
    given = {
        "images": unbatched(image),
        "masks": unbatched(mask),
        "prompts": [check_prompt("prompt", text) for text in as_list(prompt)],
        "negative prompts": [
            None if text is None and keep_none else check_prompt("negative_prompt", text) for text in negatives
        ],
        "seeds": as_list(seed),
        "control images": unbatched(control_image),
    }
    count = common_length(**given)
    pictures = [read_picture(one) for one in given["images"]]
    columns = [values * (count // len(values)) for values in [pictures, *list(given.values())[1:]]]
    return [_job(*row) for row in zip(*columns, _noises(noise, count, channels), strict=True)]


def unbatched(value: Any) -> list[Any]:
    """A list; a batch (B, C, H, W) in one tensor is B of them."""
    return list(value) if isinstance(value, Tensor) and value.ndim == 4 else as_list(value)


def of_one_size(jobs: dict[int, Job]) -> Iterable[dict[int, Job]]:
    """The jobs by padded size: what can run as one batch."""
    groups: dict[torch.Size, dict[int, Job]] = {}
    for index, job in jobs.items():
        groups.setdefault(job.image.shape, {})[index] = job
    return groups.values()


def _job(
    picture: Picture,
    mask: Any,
    prompt: str,
    negative_prompt: str | None,
    seed: int | None,
    control_image: Any,
    noise: Tensor | None,
) -> Job:
    soft = read_mask(mask, picture.size)
    where = binarize(soft)
    image, _ = pad_to_multiple(to_tensor(picture.opaque()))
    # reflected as the picture is: what is under the mask must not show in the padding
    hole, _ = pad_to_multiple(torch.from_numpy(where.astype(np.float32))[None, None])
    latent_size = (image.shape[-2] // 8, image.shape[-1] // 8)
    if noise is not None and noise.shape[-2:] != latent_size:
        found, expected = f"{tuple(noise.shape[-2:])} latent rows and columns", f"{latent_size} for this picture"
        raise SettingError("SETTING_NOISE", "noise", found, expected=expected)
    hint = None if control_image is None else _hint(control_image, picture.size)
    return Job(picture, where, image, hole, prompt, negative_prompt, check_seed(seed), noise, hint)


def _hint(control_image: Any, size: tuple[int, int]) -> Tensor:
    """The given picture as a ControlNet is shown it: (1, 3, 8H, 8W) in [0, 1]."""
    picture = read_picture(control_image, "control_image")
    if picture.size != size:
        found, expected = (f"{height} rows, {width} columns" for height, width in (picture.size, size))
        hint = "scale it to the size of the picture"
        raise ImageError("IMAGE_CONTROL_SIZE", "control_image", found, expected=expected, hint=hint)
    padded, _ = pad_to_multiple(to_tensor(picture.opaque()))
    return padded / 2 + 0.5


def _noises(noise: Tensor | None, count: int, channels: int) -> list[Tensor | None]:
    """The given starting noise, one (1, channels, H, W) per item."""
    if noise is None:
        return [None] * count
    expected = f"a tensor ({count}, {channels}, rows / 8, columns / 8) of finite values with unit variance"
    if not isinstance(noise, Tensor):
        raise SettingError("SETTING_NOISE", "noise", f"a {type(noise).__name__}", expected=expected)
    if noise.ndim != 4 or noise.shape[:2] != (count, channels):
        raise SettingError("SETTING_NOISE", "noise", f"shape {tuple(noise.shape)}", expected=expected)
    if not bool(noise.isfinite().all()):
        found = f"{int((~noise.isfinite()).sum())} of {noise.numel()} values are NaN or infinite"
        raise SettingError("SETTING_NOISE", "noise", found, expected=expected)
    return list(noise.float().split(1))
