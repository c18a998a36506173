"""Bounds for one computation done in two ways that differ in the order of sums alone: see docs/numerics.md."""

from __future__ import annotations

import numpy as np

LEVEL = 1
"""The most that two values may differ, in levels of 255: two numbers on both sides of a half are rounded apart."""
SHARE = 0.01
"""The share of the values that may differ: one that is off by a part of a level is rounded apart in that part of all
cases. From float64, the small random pipelines are off by up to 1.5e-4 levels in float32, so two of them by 3e-4."""
FLOAT32 = 1e-5
"""The relative norm of a difference: float32's rounding (6e-8) some hundred times, which a network is deep."""


def close(found, expected, bound=FLOAT32):
    """Tell whether two tensors are equal but for the order of sums."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return float((found.double() - expected.double()).norm()) <= bound * float(expected.double().norm())


def same_image(one, other):
    """Tell whether no value differs by more than a level, and less than 1 % of them at all."""
    one, other = (np.asarray(image).astype(int) for image in (one, other))
    if one.shape != other.shape:
        return False
    difference = np.abs(one - other)
    return bool(difference.max() <= LEVEL and (difference > 0).mean() < SHARE)


def same_images(ones, others):
    """Tell whether each is the `same_image` as its counterpart."""
    return all(same_image(*pair) for pair in zip(ones, others, strict=True))


def apart(one, other):
    """The mean difference of two images, in levels of 255."""
    return float(np.abs(np.asarray(one).astype(int) - np.asarray(other)).mean())
