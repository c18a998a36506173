"""Laws that hold for any mask: exactly, but where a bound is derived."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage
from skimage import measure

from sdinpaint.images.input_image import pad_to_multiple
from sdinpaint.masks import Mask, to_latent

LEVELS = st.sampled_from([0.0, 0.0, 1.0, 0.5, 0.25]) | st.floats(0, 1, width=32)
SIZES = st.tuples(st.integers(1, 21), st.integers(1, 21))
RADII = st.floats(0, 5)


def soft_masks(size):
    return arrays.arrays(np.float32, size, elements=LEVELS).map(Mask)


def hard_masks(size):
    return arrays.arrays(np.bool_, size).map(Mask)


def several(count):
    """That many masks of one size, soft or hard."""
    return SIZES.flatmap(lambda size: st.tuples(*[soft_masks(size) | hard_masks(size)] * count))


one, two, three = (several(count) for count in (1, 2, 3))
quick = settings(max_examples=60, deadline=None)


def within(lower, upper):
    return bool((lower.array <= upper.array).all())


# algebra


@given(three)
@quick
def test_algebra(masks):
    a, b, c = masks
    nothing, everything = Mask.empty(a.size), Mask.full(a.size)
    assert ~~a == a
    assert ~nothing == everything
    assert a | a == a & a == a
    assert a | b == b | a
    assert a & b == b & a
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (b & c) == (a | b) & (a | c)
    assert a | (a & b) == a & (a | b) == a
    assert ~(a | b) == ~a & ~b
    assert ~(a & b) == ~a | ~b
    assert a - b == a & ~b
    assert a | nothing == a & everything == a
    assert a & nothing == everything - everything == nothing
    assert a | everything == everything


@given(two)
@quick
def test_the_hole_of_a_combination_is_that_of_the_holes(masks):
    a, b = masks
    assert np.array_equal((a | b).hole, a.hole | b.hole)
    assert np.array_equal((a & b).hole, a.hole & b.hole)
    apart = a.array != 0.5  # which is repainted, and so is its complement
    assert np.array_equal((~a).hole[apart], ~a.hole[apart])


@given(two)
@quick
def test_equal_means_equal_in_every_way(masks):
    a, b = masks
    same = np.array_equal(a.array, b.array)
    assert (a == b) is (a.sha256 == b.sha256) is same
    assert Mask(a.array) == a
    assert hash(Mask(a.array)) == hash(a)
    assert Mask(a.to_pil()).size == a.size
    assert np.abs(np.asarray(a.to_pil()) / 255 - a.array).max() <= 0.5 / 255 + 1e-6


def test_without_the_steps_of_the_values_the_algebra_would_not_hold():
    tiny, one = np.float32(1e-9), np.float32(1)
    assert one - (one - tiny) != tiny
    assert ~~Mask(np.full((2, 2), tiny)) == Mask(np.full((2, 2), tiny))


# growing and shrinking


@given(two, RADII, RADII)
@quick
def test_growing_and_shrinking(masks, radius, other):
    a, b = masks
    less, more = sorted((radius, other))
    grown, shrunk = a.grow(radius), a.shrink(radius)
    assert within(shrunk, a)
    assert within(a, grown)
    assert shrunk == ~(~a).grow(radius)
    assert within(a.grow(less), a.grow(more))
    assert within(a.shrink(more), a.shrink(less))
    assert (a | b).grow(radius) == grown | b.grow(radius)
    assert (a & b).shrink(radius) == shrunk & b.shrink(radius)
    assert np.array_equal(grown.hole, Mask(a.hole).grow(radius).hole)
    assert a.grow(0) == a.shrink(0) == a


@given(one, RADII)
@quick
def test_opening_and_closing(masks, radius):
    (a,) = masks
    opened, closed = a.shrink(radius).grow(radius), a.grow(radius).shrink(radius)
    assert within(opened, a)
    assert within(a, closed)
    assert opened.shrink(radius).grow(radius) == opened
    assert closed.grow(radius).shrink(radius) == closed


# softening


@given(two, st.floats(0, 12))
@quick
def test_feathering(masks, pixels):
    a, b = masks
    soft = a.feather(pixels)
    assert a.array.min() - 1e-6 <= soft.array.min()
    assert soft.array.max() <= a.array.max() + 1e-6
    assert np.abs((~a).feather(pixels).array - (~soft).array).max() < 1e-6
    assert ((a | b).feather(pixels).array >= soft.array - 1e-6).all()
    assert a.feather(0) == a
    smooth = a.smooth(pixels)
    assert np.array_equal(smooth.array, soft.hole)


# the lattice


@given(one)
@quick
def test_the_lattice_by_max_loses_nothing(masks):
    (a,) = masks
    covered = a.on_lattice()
    assert within(a, covered)
    assert covered.on_lattice("nearest") == covered
    height, width = a.size
    for top in range(0, height, 8):
        for left in range(0, width, 8):
            cell = np.s_[top : top + 8, left : left + 8]
            assert len(np.unique(covered.array[cell])) == 1
            assert covered.hole[cell].all() or not a.hole[cell].any()
    if height % 8 == width % 8 == 0:
        assert covered.on_lattice() == covered


@given(one, st.sampled_from(["nearest", "max"]), st.integers(1, 9))
@quick
def test_the_lattice_is_the_rule_of_the_models(masks, cover, cell):
    (a,) = masks
    (height, width), values = a.size, a.on_lattice(cover, cell).array
    padded = np.pad(a.array, ((0, -height % cell), (0, -width % cell)), mode="reflect")
    cells = padded.reshape(len(padded) // cell, cell, -1, cell)
    expected = cells[:, 0, :, 0] if cover == "nearest" else cells.max(axis=(1, 3))
    assert np.array_equal(values[::cell, ::cell], expected)
    assert np.array_equal(values, np.kron(expected, np.ones((cell, cell)))[:height, :width])
    assert np.array_equal(values >= 0.5, Mask(a.hole).on_lattice(cover, cell).hole)
    if cell == 8:
        image, _ = pad_to_multiple(torch.from_numpy(a.array.copy())[None, None])
        assert np.array_equal(values[::8, ::8], to_latent(image, cover)[0, 0])


# regions


@given(one)
@quick
def test_regions_part_a_mask(masks):
    (a,) = masks
    parts = a.regions()
    assert len(parts) == measure.label(a.hole, connectivity=2).max()
    together = Mask.empty(a.size)
    for part in parts:
        assert not (together.array.astype(bool) & part.array.astype(bool)).any()
        assert measure.label(part.hole, connectivity=2).max() == 1
        together |= part
    assert together == (a if parts else Mask.empty(a.size))
    assert all(first.share >= second.share for first, second in pairwise(parts))


@given(one, st.integers(0, 30))
@quick
def test_dropping_specks_and_filling_holes(masks, area):
    (a,) = masks
    dropped, filled = a.drop_specks(area), a.fill_holes(area)
    large = [part for part in a.regions() if part.hole.sum() >= area]
    assert within(dropped, a)
    assert dropped.drop_specks(area) == dropped
    assert len(dropped.regions()) == len(large)
    assert all(within(part, dropped) for part in large)
    assert within(a, filled)
    assert within(filled, a.fill_holes())
    assert filled.fill_holes(area) == filled
    assert np.array_equal(a.fill_holes().hole, ndimage.binary_fill_holes(a.hole))


# boxes


@given(one, st.floats(2**-24, 1))
@quick
def test_the_bounding_box_holds_all_and_no_less_would(masks, threshold):
    (a,) = masks
    box = a.bounding_box(threshold)
    found = a.array >= threshold
    if box is None:
        assert not found.any()
        return
    inside = found[box.slices]
    assert inside.sum() == found.sum()
    assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    assert Mask(found) == Mask(found) & Mask.box(a.size, box)
