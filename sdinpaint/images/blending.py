"""The generated picture joined to the original: its colours matched, its edge blended, the known pixels untouched.

`generated` is the model's whole picture (H, W, 3) in levels 0..255, uint8 or float: what it made of the known pixels is
what colours are compared on. The functions return uint8 (H, W, 3), of which the hole is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from sdinpaint.checks import check_choice, require_extra
from sdinpaint.errors import ImageError, NumericError
from sdinpaint.images.fills import spread

__all__ = ["BLENDS", "compose", "feather", "match_color", "poisson"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Hole = NDArray[np.bool_]
Generated = NDArray[np.uint8] | NDArray[np.floating[Any]]

RING = 4
"""Width in pixels of the ring on which colours are fitted: the nearest tell most, but must be enough for a fit."""
FEATHER = 16
"""Width in pixels over which a feathered edge fades: wider lowers the ring's difference in colour no more."""
PRIOR_PIXELS, PRIOR_VARIANCE = 10.0, 25.0
"""How strongly the fit is pulled towards the identity: as by so many pixels, and so much variance in levels squared."""


def compose(original: Bytes, generated: Generated, hole: Hole, *, blend: str = "none", match: bool = False) -> Bytes:
    """The original (H, W, 3) with `generated` in its hole (H, W); known pixels stay bit for bit.

    match: fit the colours first, as `match_color`. blend: how the edge is treated, one of `BLENDS`.
    Raises: SettingError for another blend, or where "poisson" lacks the extra `mask`; ImageError on other sizes;
    NumericError on NaN and infinity.
    """
    check_choice("blend", blend, BLENDS)
    _check(original, generated, hole)
    if match:
        generated = match_color(generated, original, hole)
    return np.where(hole[..., None], _JOINS[blend](generated, original, hole), original)


def match_color(generated: Generated, original: Bytes, hole: Hole, *, width: int = RING) -> Bytes:
    """Undo the model's shift of colour: a gain and an offset per channel, fitted on known pixels up to `width` away.

    Pixels that something new reaches into are left out. A small or flat ring is trusted little, and without one nothing
    is changed. Levels beyond those of the ring are corrected as the nearest of them: new colours are not extrapolated.
    """
    ring = _reach(hole, width) & ~hole
    x, y = generated[ring].astype(np.float64), original[ring].astype(np.float64)
    matched = generated.astype(np.float64)
    if len(x):
        for channel in range(3):
            levels, corrections = _fit(x[:, channel], y[:, channel])
            matched[..., channel] += np.interp(matched[..., channel], levels, corrections)
    return _to_bytes(matched)


def poisson(generated: Generated, original: Bytes, hole: Hole) -> Bytes:
    """Keep the gradients of `generated` and meet the original at the hole's edge; the picture's border binds nothing.

    What is added is the membrane through the differences at the edge: in the hole its Laplacian is 0. It reaches far:
    something new that the edge cuts off is drawn towards the original's colours, where `feather` changes its rim alone.
    A hole that covers everything has no edge and stays as generated. Raises: SettingError without the extra `mask`.
    Source: Perez, Gangnet and Blake, Poisson image editing (2003), section 2.
    """
    blended = generated.astype(np.float64)
    if hole.any() and not hole.all():
        box = _surroundings(hole)
        blended[box] += _membrane(original[box] - blended[box], hole[box])
    return _to_bytes(blended)


def feather(generated: Generated, original: Bytes, hole: Hole, *, width: int = FEATHER) -> Bytes:
    """Meet the original at the edge of the hole, and fade smoothly to `generated` over `width` pixels into it.

    What is added is the difference at the known pixels, spread into the hole; the original's hole has no part in it.
    Deeper than `width` rows or columns, and where the hole covers everything, it is as generated.
    """
    blended = generated.astype(np.float64)
    if not hole.all():
        fade = _closeness(hole, width)[..., None]
        blended += fade * fade * (3 - 2 * fade) * spread(original - blended, ~hole)
    return _to_bytes(blended)


def _none(generated: Generated, original: Bytes, hole: Hole) -> Bytes:
    return _to_bytes(generated)


_JOINS: dict[str, Callable[[Generated, Bytes, Hole], Bytes]] = {"none": _none, "feather": feather, "poisson": poisson}
BLENDS = tuple(_JOINS)
"""The ways of joining, by name."""


def _check(original: Bytes, generated: Generated, hole: Hole) -> None:
    if generated.shape != original.shape or hole.shape != original.shape[:2]:
        found = f"generated {generated.shape} and hole {hole.shape} for a picture {original.shape}"
        raise ImageError("IMAGE_BAD_SHAPE", "generated", found, expected="one size", hint="crop the padding off")
    bad = int(generated.size - np.isfinite(generated).sum())
    if bad:
        found, hint = f"{bad} of {generated.size} values are NaN or infinite", "run the autoencoder in float32"
        raise NumericError("NUMERIC_NOT_FINITE", "generated", found, expected="finite levels 0..255", hint=hint)


def _to_bytes(levels: Generated) -> Bytes:
    whole = levels if levels.dtype == np.uint8 else np.clip(np.rint(levels), 0, 255)
    return whole.astype(np.uint8, copy=False)


def _reach(where: Hole, distance: int) -> Hole:
    """`where` (H, W), grown by `distance` rows and columns."""
    shown = torch.from_numpy(where.astype(np.float32))[None]
    grown = F.max_pool2d(shown, 2 * distance + 1, stride=1, padding=distance)
    reached: Hole = grown[0].bool().numpy()
    return reached


def _closeness(hole: Hole, width: int) -> Floats:
    """1 in pixels (H, W) beside a known one, falling by 1 / width per row or column, to 0."""
    near, closeness = ~hole, np.zeros(hole.shape)
    for _ in range(width):
        near = _reach(near, 1)
        closeness += near / width
    return closeness


def _fit(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The lowest and highest level of x and what to add there for y: a line by ridge regression without outliers."""
    gain, center, shift = 1.0, 0.0, float(np.median(y - x))
    for _ in range(3):
        residual = y - x - (gain - 1) * (x - center) - shift
        residual -= np.median(residual)
        kept = np.abs(residual) <= 4 * np.median(np.abs(residual)) + 2
        center, shift = float(x[kept].mean()), float((y[kept] - x[kept]).mean())
        covariance = float(np.mean((x[kept] - center) * (y[kept] - center - shift)))
        gain = (covariance + PRIOR_VARIANCE) / (float(x[kept].var()) + PRIOR_VARIANCE)
    levels = np.array([x[kept].min(), x[kept].max()])
    trust = kept.sum() / (kept.sum() + PRIOR_PIXELS)
    return levels, trust * ((gain - 1) * (levels - center) + shift)


def _surroundings(hole: Hole) -> tuple[slice, slice]:
    """Rows and columns of the hole's box and the pixels beside it."""
    rows, columns = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
    return slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2)


def _membrane(values: Floats, hole: Hole) -> Floats:
    """values (H, W, C) with Laplace's equation solved in the hole (H, W), and no flow across the picture's border."""
    sparse = require_extra("scipy.sparse", extra="mask", what='blend="poisson"')
    linalg = require_extra("scipy.sparse.linalg", extra="mask", what='blend="poisson"')

    def path(length: int) -> Any:
        """The Laplacian of a line of pixels: what each differs from its neighbours."""
        links = np.ones(length - 1)
        degree = np.append(links, 0) + np.append(0, links)
        return sparse.diags_array([-links, degree, -links], offsets=[-1, 0, 1])

    height, width = hole.shape
    equations = sparse.kronsum(path(width), path(height), format="csr")[np.flatnonzero(hole)]
    inside, known = equations[:, np.flatnonzero(hole)], equations[:, np.flatnonzero(~hole)]
    solved = values.copy()
    # symmetric and positive definite: such a factorization needs no pivots, and two thirds of the time of spsolve
    symmetric = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
    solved[hole] = linalg.splu(inside.tocsc(), **symmetric).solve(-(known @ values[~hole]))
    return solved
