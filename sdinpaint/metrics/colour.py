"""Perceptual colour: CIELAB and its distance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdinpaint.errors import ImageError
from sdinpaint.metrics.inputs import described

__all__ = ["delta_e", "to_lab"]

Lab = NDArray[np.float64]

TO_XYZ = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]],
)
"""Matrix from linear sRGB to CIE XYZ. Source: ITU-R BT.709 primaries with the white D65."""
WHITE = np.array([0.95047, 1.0, 1.08883])
"""XYZ of D65 for the 2 degree observer. Source: ASTM E308."""
TO_LAB = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
"""Matrix from f(X), f(Y), f(Z) to L + 16, a, b."""

AT_ONCE = 2**20
"""Numbers that are converted at a time, because intermediate values take seven times the memory of the result."""

_levels = np.arange(256) / 255
LINEAR = np.where(_levels <= 0.04045, _levels / 12.92, ((_levels + 0.055) / 1.055) ** 2.4)
"""Linear light of each 8-bit level. Source: IEC 61966-2-1."""


def to_lab(rgb: NDArray[np.uint8]) -> Lab:
    """Convert sRGB to CIELAB for D65.

    Args:
        rgb: uint8 (..., 3).

    Returns:
        float64 (..., 3): L in 0..100, a and b in about -100..100.

    Raises:
        ImageError: `rgb` is anything else.
    """
    if not isinstance(rgb, np.ndarray) or rgb.dtype != np.uint8 or rgb.shape[-1:] != (3,):
        expected, hint = "a uint8 array (..., 3)", "np.asarray(image.convert('RGB'))"
        raise ImageError("IMAGE_TYPE", "rgb", described(rgb), expected=expected, hint=hint)
    lab = np.empty(rgb.shape)
    lines = max(AT_ONCE * len(rgb) // max(rgb.size, 1), 1)
    for start in range(0, len(rgb), lines):
        lab[start : start + lines] = _to_lab(rgb[start : start + lines])
    return lab


def _to_lab(rgb: NDArray[np.uint8]) -> Lab:
    xyz = LINEAR[rgb] @ (TO_XYZ / WHITE[:, None]).T
    roots = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return roots @ TO_LAB.T - np.array([16.0, 0.0, 0.0])


def delta_e(one: Lab, other: Lab) -> NDArray[Any]:
    """Compute the distance of colours in CIELAB; 2.3 is just noticeable.

    This is CIE76, not CIEDE2000: it is a norm, so that twice the shift gives twice the score, and the 2.3 belongs to
    it.

    Args:
        one: CIELAB (..., 3).
        other: CIELAB (..., 3).

    Returns:
        The distances (...).

    Raises:
        ImageError: one is no array of floats, or their shapes differ.

    Source: CIE 015; Mahy, van Eycken and Oosterlinck, 1994, for 2.3.
    """
    for lab in (one, other):
        if not isinstance(lab, np.ndarray) or not np.issubdtype(lab.dtype, np.floating) or lab.shape != one.shape:
            expected, hint = "two arrays of floats (..., 3), of one shape", "to_lab(rgb) converts 8-bit pixels"
            raise ImageError("IMAGE_TYPE", "lab", described(lab), expected=expected, hint=hint)
    return np.sqrt(((one - other) ** 2).sum(axis=-1))
