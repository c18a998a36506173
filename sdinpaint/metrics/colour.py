"""Colours as the eye tells them apart: CIELAB and its distance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["delta_e", "to_lab"]

Lab = NDArray[np.float64]

TO_XYZ = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]],
)
"""Linear sRGB to CIE XYZ. Source: ITU-R BT.709 primaries with the white D65."""
WHITE = np.array([0.95047, 1.0, 1.08883])
"""XYZ of D65 for the observer of 2 degrees. Source: ASTM E308."""
TO_LAB = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
"""f(X), f(Y), f(Z) to L + 16, a, b."""

AT_ONCE = 2**20
"""Numbers that are converted at a time: what is needed on the way is seven times what comes of them."""

_levels = np.arange(256) / 255
LINEAR = np.where(_levels <= 0.04045, _levels / 12.92, ((_levels + 0.055) / 1.055) ** 2.4)
"""Light of each level of an 8-bit picture. Source: IEC 61966-2-1."""


def to_lab(rgb: NDArray[np.uint8]) -> Lab:
    """rgb uint8 (..., 3) of sRGB -> CIELAB float64 (..., 3) for D65: L 0..100, a and b about -100..100."""
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
    """Distance of colours (..., 3) in CIELAB -> (...); 2.3 is just noticeable.

    This is CIE76, not CIEDE2000: a norm, so that twice the shift is twice the score, and the one that 2.3 belongs to.
    Source: CIE 015; Mahy, van Eycken and Oosterlinck, 1994, for 2.3.
    """
    return np.sqrt(((one - other) ** 2).sum(axis=-1))
