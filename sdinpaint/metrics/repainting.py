"""How well what was repainted sits in its surroundings, whatever it shows: no reference is needed.

A hole that is empty or full has no edge, and one that is empty no pixels: what cannot be measured is None.
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
from sdinpaint.metrics.inputs import check_hole, check_pictures
from sdinpaint.metrics.likeness import gaussian, smoothed

__all__ = ["Scores", "changed", "known_error", "ring_delta_e", "scores", "seam"]

Bytes = NDArray[np.uint8]
Hole = NDArray[np.bool_]

NOTICEABLE = 2.3
"""The just noticeable difference of two colours in CIELAB."""
ROWS = 256
"""Of a picture that are looked at at a time: what rings take is some fifty times the picture."""
BESIDE = (0, 1, 3, 4)
"""The steps two before, one before, one after and two after a step, which itself is at 2."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What `scores` measured; the functions of the same names say how."""

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
        """Every score by name."""
        return asdict(self)


def scores(original: Bytes, picture: Bytes, hole: Hole) -> Scores:
    """All scores of a picture (H, W, 3) whose hole (H, W) was repainted. Raises: ImageError, MaskError."""
    return Scores(
        ring_delta_e=ring_delta_e(picture, hole),
        seam=seam(picture, hole),
        changed=changed(original, picture, hole),
        known_error=known_error(original, picture, hole),
    )


def ring_delta_e(picture: Bytes, hole: Hole, width: int = 4) -> float | None:
    """The colour shift across the hole's edge: 0 where there is none, d where all that was repainted is off by d.

    The rings are the pixels up to `width` rows and columns from the other side of the edge, inside and outside. About
    each pixel that has a neighbour (left, right, above or below) on the other side, the Gaussian-weighted mean colours
    (sigma = width, cut at 2 * width) of both rings are compared; the score is the mean of their distances in CIELAB.
    Inside and outside count alike. A smooth slope across the edge counts by its change over about `width` pixels.
    """
    _check(picture, hole)
    check_whole("width", width, 1, of="ring_delta_e")
    edge = _edge(hole)
    if not edge.any():
        return None
    shifts = []
    for top in range(0, len(edge), ROWS):
        # the rings reach so far from a pixel of the edge, and what is in them by the other side so much further
        first, end = max(top - 3 * width, 0), top + ROWS + 3 * width
        counted = edge[first:end].copy()
        counted[: top - first] = counted[top - first + ROWS :] = False
        if counted.any():
            shifts.append(_shifts(picture[first:end], hole[first:end], counted, width))
    return float(torch.cat(shifts).mean())


def seam(picture: Bytes, hole: Hole) -> float | None:
    """How much larger the steps of colour across the hole's edge are than those beside it, in CIELAB.

    A step is the distance of two neighbouring pixels. From each step across the edge, along a row or a column, the mean
    of the two steps before and the two after it in that row or column is taken away, as far as they lie in the picture
    and do not cross the edge themselves; the score is the mean of the differences. 0 for any even slope, about 0 for
    texture that goes on across the edge, below 0 where the edge is smoother than its surroundings.
    """
    _check(picture, hole)
    edge = _edge(hole)
    if not edge.any():
        return None
    near = _near(edge, 2)
    lab, hole = to_lab(picture[near]), hole[near]
    excess = np.concatenate([_excess(lab, hole), _excess(lab.swapaxes(0, 1), hole.T)])
    return float(excess.mean()) if excess.size else None


def changed(original: Bytes, picture: Bytes, hole: Hole) -> float | None:
    """The share of the hole's pixels whose colour changed noticeably: by more than 2.3 in CIELAB."""
    check_pictures(original, picture)
    _check(picture, hole)
    if not hole.any():
        return None
    far = 0
    for band in (slice(top, top + ROWS) for top in range(0, len(hole), ROWS)):
        before, after = (to_lab(one[band][hole[band]]) for one in (original, picture))
        far += int((delta_e(before, after) > NOTICEABLE).sum())
    return far / int(hole.sum())


def known_error(original: Bytes, picture: Bytes, hole: Hole) -> int:
    """The largest difference outside the hole, in levels of 255; 0 says that all known pixels are the same bits."""
    check_pictures(original, picture)
    _check(picture, hole)
    difference = np.abs(original.astype(np.int16) - picture)
    return int(difference[~hole].max(initial=0))


def _shifts(picture: Bytes, hole: Hole, edge: Hole, width: int) -> Tensor:
    """The distance of both rings' mean colours about each of these pixels of the edge, all in one."""
    near = _near(edge, 3 * width)
    sides = torch.from_numpy(np.stack([hole[near], ~hole[near]])).float()
    ring = sides * _grown(sides.flip(0), width)
    lab = torch.from_numpy(to_lab(picture[near])).float().permute(2, 0, 1)
    sums = torch.cat([ring[:, None] * lab, ring[:, None]], dim=1).flatten(0, 1)
    around = F.pad(sums, (2 * width,) * 4)
    inside, outside = smoothed(around, gaussian(width, 2 * width))[:, torch.from_numpy(edge[near])].chunk(2)
    return torch.linalg.vector_norm(inside[:3] / inside[3] - outside[:3] / outside[3], dim=0)


def _check(picture: Bytes, hole: Hole) -> None:
    check_pictures(picture)
    check_hole(hole, picture, "hole")


def _grown(sides: Tensor, width: int) -> Tensor:
    """sides (2, H, W), each with all pixels up to `width` rows and columns away."""
    down = F.max_pool2d(sides, (2 * width + 1, 1), stride=1, padding=(width, 0))
    return F.max_pool2d(down, (1, 2 * width + 1), stride=1, padding=(0, width))


def _edge(hole: Hole) -> Hole:
    """The pixels (H, W) that have a neighbour on the other side."""
    edge = np.zeros_like(hole)
    across, down = hole[:, 1:] != hole[:, :-1], hole[1:] != hole[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _near(edge: Hole, margin: int) -> tuple[slice, slice]:
    """The rows and columns up to `margin` from the edge: nothing farther away counts."""
    lines = (np.flatnonzero(edge.any(axis)) for axis in (1, 0))
    rows, columns = (slice(max(at[0] - margin, 0), at[-1] + 1 + margin) for at in lines)
    return rows, columns


def _excess(lab: Lab, hole: Hole) -> NDArray[np.float64]:
    """Each step across the edge along the rows, less the mean of the steps beside it."""
    across = hole[:, 1:] != hole[:, :-1]
    margin = ((0, 0), (2, 2))
    steps = np.pad(delta_e(lab[:, 1:], lab[:, :-1]), margin)
    usable = np.pad(~across, margin)
    row, column = (index[:, None] for index in np.nonzero(across))
    beside = row, column + np.array(BESIDE)
    count = usable[beside].sum(axis=1)
    mean = (steps[beside] * usable[beside]).sum(axis=1) / np.maximum(count, 1)
    return (steps[row, column + 2][:, 0] - mean)[count > 0]
