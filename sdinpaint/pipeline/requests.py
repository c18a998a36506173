"""What a caller gave, read and checked before anything is computed: one job per picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdinpaint.checks import as_list, check_prompt
from sdinpaint.errors import ImageError, SettingError
from sdinpaint.images.picture import Picture, read_picture
from sdinpaint.masks import Mask, read_mask
from sdinpaint.pipeline.settings import check_seed, common_length

__all__ = ["GivenMask", "Job", "read_jobs", "unbatched"]


@dataclass(frozen=True, eq=False)
class Job:
    """One picture to repaint, as it was given."""

    picture: Picture
    mask: Mask
    hole: NDArray[np.bool_]
    """(H, W): what is repainted of it at all."""
    prompt: str
    negative_prompt: str | None
    seed: int
    noise: Tensor | None
    control_image: Picture | None
    """What a ControlNet is shown in place of the picture."""
    mask_path: str | None
    """The file that the mask was read from."""

    def __getstate__(self) -> dict[str, Any]:
        # torch hands a tensor to another process by a file that is gone when the first one ends
        noise = None if self.noise is None else self.noise.numpy()
        return {**vars(self), "noise": noise}

    def __setstate__(self, state: dict[str, Any]) -> None:
        noise = state["noise"]
        vars(self).update({**state, "noise": None if noise is None else torch.from_numpy(noise)})


@dataclass(frozen=True, eq=False)
class GivenMask:
    """A mask that an earlier run has read, and the file it was in."""

    mask: Mask
    path: str | None


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
    least: float = 0.5,
) -> list[Job]:
    """One job per picture, from lists of one length; one of anything stands for all.

    channels: of the latents. keep_none: whether no negative prompt is something else than the empty one. least: how
    white the mask is where anything is repainted.
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
    return [_job(*row, least=least) for row in zip(*columns, _noises(noise, count, channels), strict=True)]


def unbatched(value: Any) -> list[Any]:
    """A list; a batch (B, C, H, W) in one tensor is B of them."""
    return list(value) if isinstance(value, Tensor) and value.ndim == 4 else as_list(value)


def _job(
    picture: Picture,
    mask: Any,
    prompt: str,
    negative_prompt: str | None,
    seed: int | None,
    control_image: Any,
    noise: Tensor | None,
    *,
    least: float,
) -> Job:
    given = (
        mask if isinstance(mask, GivenMask) else GivenMask(mask, str(mask) if isinstance(mask, str | Path) else None)
    )
    read = Mask(read_mask(given.mask, picture.size))
    hole = read.array >= least
    control = None if control_image is None else _control_picture(control_image, picture.size)
    return Job(picture, read, hole, prompt, negative_prompt, check_seed(seed), noise, control, given.path)


def _control_picture(control_image: Any, size: tuple[int, int]) -> Picture:
    picture = read_picture(control_image, "control_image")
    if picture.size != size:
        found, expected = (f"{height} rows, {width} columns" for height, width in (picture.size, size))
        hint = "scale it to the size of the picture"
        raise ImageError("IMAGE_CONTROL_SIZE", "control_image", found, expected=expected, hint=hint)
    return picture


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
    # a copy, which does not change with what was given, and of which none holds the others' memory
    return [one.clone() for one in noise.detach().to("cpu", torch.float32).split(1)]
