"""Blending of the generated image into the original: colour matching and edge blending; known pixels stay untouched.

`generated` is the model's whole image (H, W, 3) in levels 0..255, uint8 or float: colours are compared on what the
model made of the known pixels. The functions return uint8 (H, W, 3), of which the hole is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sdinpaint.checks import check_choice, require_extra
from sdinpaint.errors import ImageError, NumericError
from sdinpaint.images.fills import spread
from sdinpaint.on_demand import OnDemand

if TYPE_CHECKING:
    import torch
    from torch.nn import functional as F
else:
    torch, F = OnDemand("torch"), OnDemand("torch.nn.functional")

__all__ = ["BLENDS", "Blend", "compose", "feather", "match_color", "poisson"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Hole = NDArray[np.bool_]
Generated = NDArray[np.uint8] | NDArray[np.floating[Any]]
Blend = Literal["none", "feather", "poisson"]
BLENDS: tuple[Blend, ...] = get_args(Blend)

BAND_WIDTH = 4
"""Pixels of the band on which colours are fitted: the nearest pixels tell most, but must be enough for a fit."""
FADE_WIDTH = 16
"""Pixels over which a feathered edge fades: more does not lower the colour difference at the edge further."""
PRIOR_PIXELS, PRIOR_VARIANCE = 10.0, 25.0
"""Strength of the pull towards the identity: weight in pixels of the offset, variance in squared levels of the gain."""


def compose(original: Bytes, generated: Generated, hole: Hole, *, blend: Blend = "none", match: bool = False) -> Bytes:
    """Put the hole of a generated image into the original; known pixels stay bit for bit.

    Args:
        original: the original image (H, W, 3).
        generated: the generated image (H, W, 3) in levels 0..255.
        hole: (H, W), True = repainted.
        blend: how the edge is blended, one of BLENDS.
        match: match the colours first, by `match_color`.

    Returns:
        The joined image (H, W, 3).

    Raises:
        SettingError: `blend` is unknown, or "poisson" lacks the extra `mask`.
        ImageError: the sizes differ.
        NumericError: `generated` has NaN or infinity.
    """
    check_choice("blend", blend, BLENDS)
    _check(original, generated, hole)
    if match:
        generated = match_color(generated, original, hole)
    return np.where(hole[..., None], _BLENDERS[blend](generated, original, hole), original)


def match_color(generated: Generated, original: Bytes, hole: Hole, *, width: int = BAND_WIDTH) -> Bytes:
    """Undo the model's colour shift by a gain and an offset per channel, fitted on known pixels along the hole.

    The fit uses a band of known pixels. Pixels of it that new content covers are left out of the fit. A small or flat
    band is trusted little; without a band nothing is changed. Levels outside the range of the band get the correction
    of the nearest level inside.

    Args:
        generated: the generated image (H, W, 3) in levels 0..255.
        original: the original image (H, W, 3).
        hole: (H, W), True = repainted.
        width: width of the band in pixels.

    Returns:
        The corrected image (H, W, 3).
    """
    band = _reach(hole, width) & ~hole
    x, y = generated[band].astype(np.float64), original[band].astype(np.float64)
    matched = generated.astype(np.float64)
    if len(x):
        for channel in range(3):
            levels, corrections = _fit(x[:, channel], y[:, channel])
            matched[..., channel] += np.interp(matched[..., channel], levels, corrections)
    return _to_bytes(matched)


def poisson(generated: Generated, original: Bytes, hole: Hole) -> Bytes:
    """Keep the gradients of the generated image and meet the original at the edge of the hole.

    The correction is the membrane through the differences at the edge: in the hole its Laplacian is 0, and the border
    of the image is free. It reaches far: new content at the edge is drawn towards the original's colours, where
    `feather` changes its rim only. A hole that covers everything has no edge and stays as generated.

    Args:
        generated: the generated image (H, W, 3) in levels 0..255.
        original: the original image (H, W, 3).
        hole: (H, W), True = repainted.

    Returns:
        The blended image (H, W, 3).

    Raises:
        SettingError: the extra `mask` is not installed.

    Source: Perez, Gangnet and Blake, Poisson image editing (2003), section 2.
    """
    blended = generated.astype(np.float64)
    if hole.any() and not hole.all():
        box = _surroundings(hole)
        blended[box] += _membrane(original[box] - blended[box], hole[box])
    return _to_bytes(blended)


def feather(generated: Generated, original: Bytes, hole: Hole, *, width: int = FADE_WIDTH) -> Bytes:
    """Meet the original at the edge of the hole, and fade smoothly to the generated image inside.

    The correction is the difference at the known pixels, continued into the hole; the original's hole has no part in
    it. Beyond the fade, and where the hole covers everything, the image stays as generated.

    Args:
        generated: the generated image (H, W, 3) in levels 0..255.
        original: the original image (H, W, 3).
        hole: (H, W), True = repainted.
        width: length of the fade in pixels.

    Returns:
        The blended image (H, W, 3).
    """
    blended = generated.astype(np.float64)
    if not hole.all():
        fade = _closeness(hole, width)[..., None]
        blended += fade * fade * (3 - 2 * fade) * spread(original - blended, ~hole)
    return _to_bytes(blended)


def _none(generated: Generated, original: Bytes, hole: Hole) -> Bytes:
    return _to_bytes(generated)


_BLENDERS: dict[Blend, Callable[[Generated, Bytes, Hole], Bytes]] = {
    "none": _none,
    "feather": feather,
    "poisson": poisson,
}


def _check(original: Bytes, generated: Generated, hole: Hole) -> None:
    if generated.shape != original.shape or hole.shape != original.shape[:2]:
        found = f"generated {generated.shape} and hole {hole.shape} for an image {original.shape}"
        raise ImageError("IMAGE_BAD_SHAPE", "generated", found, expected="one size", hint="crop the padding off")
    bad = int(generated.size - np.isfinite(generated).sum())
    if bad:
        found, hint = f"{bad} of {generated.size} values are NaN or infinite", "run the VAE in float32"
        raise NumericError("NUMERIC_NOT_FINITE", "generated", found, expected="finite levels 0..255", hint=hint)


def _to_bytes(levels: Generated) -> Bytes:
    whole = levels if levels.dtype == np.uint8 else np.clip(np.rint(levels), 0, 255)
    return whole.astype(np.uint8, copy=False)


def _reach(where: Hole, distance: int) -> Hole:
    """Grow `where` (H, W) by `distance` rows and columns."""
    shown = torch.from_numpy(where.astype(np.float32))[None]
    grown = F.max_pool2d(shown, 2 * distance + 1, stride=1, padding=distance)
    reached: Hole = grown[0].bool().numpy()
    return reached


def _closeness(hole: Hole, width: int) -> Floats:
    """Return 1 in pixels (H, W) beside a known one, falling by 1 / width per row or column to 0."""
    near, closeness = ~hole, np.zeros(hole.shape)
    for _ in range(width):
        near = _reach(near, 1)
        closeness += near / width
    return closeness


def _fit(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Fit a line by ridge regression without outliers: the lowest and highest level of x, and the corrections there."""
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
    """Return the rows and columns of the hole's box and of the pixels beside it."""
    rows, columns = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
    return slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2)


def _membrane(values: Floats, hole: Hole) -> Floats:
    """Solve Laplace's equation for values (H, W, C) in the hole (H, W), without flow across the image border."""
    sparse = require_extra("scipy.sparse", extra="mask", what='blend="poisson"')
    linalg = require_extra("scipy.sparse.linalg", extra="mask", what='blend="poisson"')

    def path(length: int) -> Any:
        """Return the Laplacian of a line of pixels."""
        links = np.ones(length - 1)
        degree = np.append(links, 0) + np.append(0, links)
        return sparse.diags_array([-links, degree, -links], offsets=[-1, 0, 1])

    height, width = hole.shape
    equations = sparse.kronsum(path(width), path(height), format="csr")[np.flatnonzero(hole)]
    inside, known = equations[:, np.flatnonzero(hole)], equations[:, np.flatnonzero(~hole)]
    solved = values.copy()
    # symmetric and positive definite: a factorization without pivots takes two thirds of the time of spsolve
    symmetric = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
    solved[hole] = linalg.splu(inside.tocsc(), **symmetric).solve(-(known @ values[~hole]))
    return solved
