"""Scores that need no reference: how well repainted pixels match their surroundings, whatever they show.

A score is None where it cannot be measured: an empty or full hole has no edge, and an empty one has no pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sdinpaint.checks import check_whole
from sdinpaint.metrics.colour import Lab, delta_e, to_lab
from sdinpaint.metrics.inputs import check_hole, check_images
from sdinpaint.metrics.likeness import gaussian, smoothed

__all__ = ["Scores", "changed", "known_error", "ring_delta_e", "scores", "seam"]

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]

NOTICEABLE = 2.3
"""The just noticeable difference of two colours in CIELAB."""
MAX_WIDTH = 64
"""Pixels of a boundary band at most; time and memory grow by its square."""
ROWS = 256
"""Rows of an image that are measured at a time: intermediate values take about fifty times the image's memory."""
BESIDE = (0, 1, 3, 4)
"""Indices of the two steps before and the two after a step, which itself is at 2."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of a repainted image; each is defined in the function of the same name."""

    ring_delta_e: float | None
    seam: float | None
    changed: float | None
    known_error: int

    def __str__(self) -> str:
        values = {
            "ring delta E": "none" if self.ring_delta_e is None else f"{self.ring_delta_e:.2f}",
            "seam": "none" if self.seam is None else f"{self.seam:.2f}",
            "changed": "none" if self.changed is None else f"{self.changed:.1%}",
            "known error": str(self.known_error),
        }
        return ", ".join(f"{name} {value}" for name, value in values.items())

    def to_json(self) -> dict[str, float | None]:
        """Return the scores by name."""
        return asdict(self)


def scores(original: Bytes, image: Bytes, hole: Hole) -> Scores:
    """Compute all scores of a repainted image.

    Args:
        original: the image before, uint8 (H, W, 3).
        image: the image after, uint8 (H, W, 3).
        hole: bool (H, W), True = repainted.

    Returns:
        The scores.

    Raises:
        ImageError: the images are not uint8 (H, W, 3) of one size.
        MaskError: the hole is not bool (H, W) of that size.
    """
    return Scores(
        ring_delta_e=ring_delta_e(image, hole),
        seam=seam(image, hole),
        changed=changed(original, image, hole),
        known_error=known_error(original, image, hole),
    )


def ring_delta_e(image: Bytes, hole: Hole, width: int = 4) -> float | None:
    """Measure the colour shift across the hole's edge; a shift of all repainted pixels by d scores d.

    The boundary bands are the pixels up to `width` rows and columns from the other side of the edge, inside and
    outside. About each pixel that has a neighbour (left, right, above or below) on the other side, the
    Gaussian-weighted mean colours (sigma = width, cut at 2 * width) of both bands are compared. The score is the mean
    of their distances in CIELAB. A smooth slope across the edge counts by its change over about `width` pixels.

    Args:
        image: the image, uint8 (H, W, 3).
        hole: bool (H, W), True = repainted.
        width: width of the bands in pixels.

    Returns:
        The mean distance; None for an empty or full hole.

    Raises:
        ImageError: the image is not uint8 (H, W, 3).
        MaskError: the hole is not bool (H, W) of the size of the image.
        SettingError: `width` is not a whole number from 1 to 64.
    """
    _check(image, hole)
    width = check_whole("width", width, 1, MAX_WIDTH, of="ring_delta_e")
    edge = _edge(hole)
    if not edge.any():
        return None
    shifts = []
    for top in range(0, len(edge), ROWS):
        # windows reach 2 * width from the edge, and pixels up to width further decide what is in a band
        first, end = max(top - 3 * width, 0), top + ROWS + 3 * width
        counted = edge[first:end].copy()
        counted[: top - first] = counted[top - first + ROWS :] = False
        if counted.any():
            shifts.append(_shifts(image[first:end], hole[first:end], counted, width))
    return float(torch.cat(shifts).mean())


def seam(image: Bytes, hole: Hole) -> float | None:
    """Measure how much larger the colour steps across the hole's edge are than the steps beside it, in CIELAB.

    A step is the distance of two neighbouring pixels. From each step across the edge, along a row or a column, the mean
    of the two steps before and the two after it is subtracted, as far as they lie in the image and do not cross the
    edge themselves. The score is the mean of the differences: 0 for any even slope, about 0 for texture that continues
    across the edge, and below 0 where the edge is smoother than its surroundings.

    Args:
        image: the image, uint8 (H, W, 3).
        hole: bool (H, W), True = repainted.

    Returns:
        The mean difference; None where no step across the edge has a step beside it.

    Raises:
        ImageError: the image is not uint8 (H, W, 3).
        MaskError: the hole is not bool (H, W) of the size of the image.
    """
    _check(image, hole)
    edge = _edge(hole)
    if not edge.any():
        return None
    near = _near(edge, 2)
    lab, hole = to_lab(image[near]), hole[near]
    excess = np.concatenate([_excess(lab, hole), _excess(lab.swapaxes(0, 1), hole.T)])
    return float(excess.mean()) if excess.size else None


def changed(original: Bytes, image: Bytes, hole: Hole) -> float | None:
    """Measure the share of the hole's pixels whose colour changed noticeably, by more than 2.3 in CIELAB.

    Args:
        original: the image before, uint8 (H, W, 3).
        image: the image after, uint8 (H, W, 3).
        hole: bool (H, W), True = repainted.

    Returns:
        The share in 0..1; None for an empty hole.

    Raises:
        ImageError: the images are not uint8 (H, W, 3) of one size.
        MaskError: the hole is not bool (H, W) of that size.
    """
    check_images(original, image)
    _check(image, hole)
    if not hole.any():
        return None
    far = 0
    for band in (slice(top, top + ROWS) for top in range(0, len(hole), ROWS)):
        before, after = (to_lab(one[band][hole[band]]) for one in (original, image))
        far += int((delta_e(before, after) > NOTICEABLE).sum())
    return far / int(hole.sum())


def known_error(original: Bytes, image: Bytes, hole: Hole) -> int:
    """Measure the largest difference outside the hole; 0 means that all known pixels are the same bits.

    Args:
        original: the image before, uint8 (H, W, 3).
        image: the image after, uint8 (H, W, 3).
        hole: bool (H, W), True = repainted.

    Returns:
        The difference in levels, 0 to 255.

    Raises:
        ImageError: the images are not uint8 (H, W, 3) of one size.
        MaskError: the hole is not bool (H, W) of that size.
    """
    check_images(original, image)
    _check(image, hole)
    difference = np.abs(original.astype(np.int16) - image)
    return int(difference[~hole].max(initial=0))


def _shifts(image: Bytes, hole: Hole, edge: Hole, width: int) -> Tensor:
    """Return the distances of the mean colours of both bands about the pixels of the edge, as one tensor."""
    near = _near(edge, 3 * width)
    sides = torch.from_numpy(np.stack([hole[near], ~hole[near]])).float()
    bands = sides * _grown(sides.flip(0), width)
    lab = torch.from_numpy(to_lab(image[near])).float().permute(2, 0, 1)
    sums = torch.cat([bands[:, None] * lab, bands[:, None]], dim=1).flatten(0, 1)
    around = F.pad(sums, (2 * width,) * 4)
    inside, outside = smoothed(around, gaussian(width, 2 * width))[:, torch.from_numpy(edge[near])].chunk(2)
    return torch.linalg.vector_norm(inside[:3] / inside[3] - outside[:3] / outside[3], dim=0)


def _check(image: Bytes, hole: Hole) -> None:
    check_images(image)
    check_hole(hole, image, "hole")


def _grown(sides: Tensor, width: int) -> Tensor:
    """Grow both sides (2, H, W) by `width` rows and columns."""
    down = F.max_pool2d(sides, (2 * width + 1, 1), stride=1, padding=(width, 0))
    return F.max_pool2d(down, (1, 2 * width + 1), stride=1, padding=(0, width))


def _edge(hole: Hole) -> Hole:
    """Return the pixels (H, W) that have a neighbour on the other side."""
    edge = np.zeros_like(hole)
    across, down = hole[:, 1:] != hole[:, :-1], hole[1:] != hole[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _near(edge: Hole, margin: int) -> tuple[slice, slice]:
    """Return the rows and columns up to `margin` from the edge."""
    lines = (np.flatnonzero(edge.any(axis)) for axis in (1, 0))
    rows, columns = (slice(max(at[0] - margin, 0), at[-1] + 1 + margin) for at in lines)
    return rows, columns


def _excess(lab: Lab, hole: Hole) -> NDArray[np.float64]:
    """Return each step across the edge along the rows, minus the mean of the steps beside it."""
    across = hole[:, 1:] != hole[:, :-1]
    margin = ((0, 0), (2, 2))
    steps = np.pad(delta_e(lab[:, 1:], lab[:, :-1]), margin)
    usable = np.pad(~across, margin)
    row, column = (index[:, None] for index in np.nonzero(across))
    beside = row, column + np.array(BESIDE)
    count = usable[beside].sum(axis=1)
    mean = (steps[beside] * usable[beside]).sum(axis=1) / np.maximum(count, 1)
    return (steps[row, column + 2][:, 0] - mean)[count > 0]
