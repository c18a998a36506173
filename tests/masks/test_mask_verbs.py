"""Tests of the verbs of Mask, each against an independent account; what holds for any mask is in test_mask_laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from sdinpaint.errors import MaskError, SettingError, said
from sdinpaint.masks import Mask

SIZE = (40, 56)
RNG = np.random.default_rng(1)
SOFT = Mask(np.where(RNG.random(SIZE) < 0.02, RNG.random(SIZE), 0))
NAN, INF = math.nan, math.inf


MARKS = {"#": 1, "+": 0.25, ".": 0}


def drawn(text):
    """A mask from rows of marks."""
    return Mask(np.array([[MARKS[mark] for mark in row] for row in text.split()], np.float32))


def soft_edge(along, start, end, sigma):
    """A stripe from `start` to `end` after a Gaussian of `sigma`, at the centres of the pixels `along`."""
    below = [[math.erf((pixel + 0.5 - edge) / sigma / math.sqrt(2)) / 2 for pixel in along] for edge in (start, end)]
    return np.subtract(*below)


SUMMED = 0.242 / 16 / 24 + 6.4e-5
"""The error of a sum over pixels for the integral of a Gaussian of sigma 4: max|g'| / 24, and the tail it lacks."""


def disc_maximum(values, radius):
    """The highest of all values within `radius` of each pixel, looked up one by one."""
    height, width = values.shape
    found = np.zeros_like(values)
    for y in range(height):
        for x in range(width):
            reach = [
                values[row, column]
                for row in range(max(0, y - int(radius)), min(height, y + int(radius) + 1))
                for column in range(max(0, x - int(radius)), min(width, x + int(radius) + 1))
                if (row - y) ** 2 + (column - x) ** 2 <= radius**2
            ]
            found[y, x] = max(reach)
    return found


# growing


@pytest.mark.parametrize("radius", [0, 0.9, 1, math.sqrt(2), 2.5, 4])
def test_grow_is_the_maximum_over_a_disc(radius):
    assert np.array_equal(SOFT.grow(radius).array, disc_maximum(SOFT.array, radius))


@pytest.mark.parametrize("radius", [1, 3.2, 9])
def test_hard_masks_grow_by_euclidean_distance(radius):
    hole = SOFT.hole
    assert np.array_equal(Mask(hole).grow(radius).array, ndimage.distance_transform_edt(~hole) <= radius)
    assert np.array_equal(Mask(~hole).shrink(radius).array, ndimage.distance_transform_edt(~hole) > radius)


def test_growing_beyond_the_image_fills_it():
    assert drawn("#... ....").grow(1e9) == Mask.full((2, 4))
    assert Mask.empty((2, 4)).grow(1e9) == Mask.empty((2, 4))


def test_shrink_keeps_the_borders_of_the_image():
    half = Mask.box(SIZE, (0, 0, 30, 40))
    assert half.shrink(5) == Mask.box(SIZE, (0, 0, 25, 40))
    assert half.grow(5) == Mask.box(SIZE, (0, 0, 35, 40))
    assert Mask.full(SIZE).shrink(9) == Mask.full(SIZE)


# softening


@pytest.mark.parametrize("pixels", [0, 0.3, 1, 4, 12, 60])
def test_feather_leaves_straight_edges_where_they_were(pixels):
    for half in (Mask.box(SIZE, (0, 0, 23, 40)), Mask.box(SIZE, (0, 11, 56, 40))):
        assert np.array_equal(half.feather(pixels).hole, half.hole)


def test_feather_reaches_as_far_as_asked():
    soft = Mask.box((4, 96), (48, 0, 96, 4)).feather(8)
    assert np.abs(soft.array - soft_edge(range(96), 48, 999, sigma=4)).max() < SUMMED
    assert Mask.full(SIZE).feather(8) == Mask.full(SIZE)


@pytest.mark.parametrize(("width", "stays"), [(5, False), (6, False), (8, True), (9, True)])
def test_smooth_takes_away_what_is_thinner_than_two_thirds(width, stays):
    """The middle of a stripe is erf(width / (2 sqrt(2) sigma)), which is 0.5 at a width of 0.674 pixels, here 6.7."""
    stripe = Mask.box((20, 80), (30, 0, 30 + width, 20))
    assert (stripe.smooth(10).share > 0) is stays
    assert ((~stripe).smooth(10).share < 1) is stays


def test_smooth_rounds_corners_and_nothing_else():
    box = Mask.box((80, 80), (20, 20, 60, 60))
    smooth = box.smooth(8)
    edge = soft_edge(range(80), 20, 60, sigma=4)
    expected = np.outer(edge, edge)
    clear = np.abs(expected - 0.5) > 2 * SUMMED
    assert clear.mean() > 0.95
    assert np.array_equal(smooth.array[clear], expected[clear] >= 0.5)
    assert not (smooth - box).share
    assert (box - smooth).regions()[3].share > 0


# regions


ISLANDS = """
    ##.......#
    ##.......#
    ..#......#
    ..........
    .####..#..
    .#..#.....
    .#..#..+#+
    .####...+.
"""


def test_regions_are_those_that_touch_at_edges_or_corners():
    largest, second, third, fourth, dot = drawn(ISLANDS).regions()
    assert largest.bounding_box() == (1, 4, 5, 8)
    assert second.bounding_box() == (0, 0, 3, 3)
    assert third.bounding_box() == (9, 0, 10, 3)
    assert [region.hole.sum() for region in (largest, second, third, fourth, dot)] == [12, 5, 3, 1, 1]
    assert fourth.bounding_box() == (7, 4, 8, 5)
    assert dot.bounding_box(0.25) == (7, 6, 10, 8)
    assert Mask.empty(SIZE).regions() == []


def test_drop_specks_takes_their_soft_edges_too():
    kept = drawn(ISLANDS).drop_specks(3)
    assert kept == Mask(np.where(np.arange(10) < 6, drawn(ISLANDS).array, 0)) | Mask.box((8, 10), (9, 0, 10, 3))
    assert drawn(ISLANDS).drop_specks(1) == drawn(ISLANDS)
    assert drawn(ISLANDS).drop_specks() == Mask.empty((8, 10))


RINGS = """
    #.#####
    #.#...#
    ###.+.#
    #.#####
    #######
    ....#..
    .###.#.
    ....#..
"""


def test_fill_holes_fills_what_is_enclosed():
    filled = drawn(RINGS).fill_holes()
    assert np.array_equal(filled.array, ndimage.binary_fill_holes(drawn(RINGS).hole))
    some = drawn(RINGS).fill_holes(max_area=1)
    assert (some - drawn(RINGS)).regions()[0].hole.sum() == 1
    assert (some - drawn(RINGS)).share == 2 / 56
    assert drawn(RINGS).fill_holes(max_area=0) == drawn(RINGS)
    assert drawn(RINGS).fill_holes(max_area=6) == filled
    assert drawn("### #+# ###").fill_holes() == Mask.full((3, 3))


# measuring and scaling


def test_bounding_box():
    mask = drawn("..... .+##. ...#. .....")
    assert mask.bounding_box() == (2, 1, 4, 3)
    assert mask.bounding_box(threshold=0.25) == (1, 1, 4, 3)
    assert mask.bounding_box(threshold=0) == (0, 0, 5, 4)
    assert mask.bounding_box().size == (2, 2)
    assert drawn("+..").bounding_box() is None
    assert Mask.empty(SIZE).bounding_box() is None


def test_lattice_by_any_and_by_the_first_pixel():
    corner = Mask.box((16, 24), (8, 0, 9, 1))
    inside = Mask.box((16, 24), (9, 1, 16, 8))
    cell = Mask.box((16, 24), (8, 0, 16, 8))
    assert corner.on_lattice() == corner.on_lattice("nearest") == cell
    assert inside.on_lattice() == cell
    assert inside.on_lattice("nearest") == Mask.empty((16, 24))
    assert inside.on_lattice(cell=16) == Mask.box((16, 24), (0, 0, 24, 16))
    assert SOFT.on_lattice(cell=1) == SOFT


def test_lattice_of_a_size_that_does_not_divide():
    """20 columns are padded to 24 by reflection about column 19, so that the last cell reaches back to column 15."""
    for column, covered in ((14, slice(8, 16)), (15, slice(8, 20)), (16, slice(16, 20))):
        mask = Mask.box((8, 20), (column, 0, column + 1, 8))
        assert np.array_equal(np.flatnonzero(mask.on_lattice().hole[0]), np.arange(20)[covered])


def test_resize():
    assert SOFT.resize(SIZE) == SOFT
    assert Mask.full(SIZE).resize((7, 13)) == Mask.full((7, 13))
    assert Mask.box((40, 60), (20, 10, 40, 30)).resize((80, 120)).hole.sum() == 4 * 400
    smaller = Mask.box((40, 60), (20, 10, 40, 30)).resize((20, 30))
    assert smaller.bounding_box() == (10, 5, 20, 15)
    assert Mask(np.float32([[0, 1]])).resize((1, 4)).array.tolist() == [[0, 0.25, 0.75, 1]]


def test_invert():
    assert SOFT.invert() == ~SOFT
    assert np.array_equal(SOFT.invert().array, 1 - SOFT.array)


# what is refused


MISSING = {
    "Mask.grow": ("cv2", lambda: SOFT.grow(2)),
    "Mask.shrink": ("cv2", lambda: SOFT.shrink(2)),
    "Mask.feather": ("scipy.ndimage", lambda: SOFT.feather(2)),
    "Mask.smooth": ("scipy.ndimage", lambda: SOFT.smooth(2)),
    "Mask.fill_holes": ("scipy.ndimage", SOFT.fill_holes),
    "Mask.drop_specks": ("scipy.ndimage", SOFT.drop_specks),
    "Mask.regions": ("scipy.ndimage", SOFT.regions),
}


@pytest.mark.parametrize("verb", MISSING)
def test_missing_library_is_named_with_its_extra(verb, without):
    module, call = MISSING[verb]
    without(module)
    with pytest.raises(SettingError) as caught:
        call()
    assert (caught.value.code, caught.value.subject) == ("SETTING_EXTRA", verb)
    assert "sdinpaint[mask]" in caught.value.hint


ARGUMENTS = {
    ("grow", "pixels"): SOFT.grow,
    ("shrink", "pixels"): SOFT.shrink,
    ("feather", "pixels"): SOFT.feather,
    ("smooth", "pixels"): SOFT.smooth,
    ("fill_holes", "max_area"): SOFT.fill_holes,
    ("drop_specks", "min_area"): SOFT.drop_specks,
    ("bounding_box", "threshold"): SOFT.bounding_box,
    ("on_lattice", "cell"): lambda cell: SOFT.on_lattice(cell=cell),
}


@pytest.mark.parametrize("bad", [-1, NAN, INF, -INF, "4", [4], 1j, True, 10**400], ids=repr)
@pytest.mark.parametrize("verb", ARGUMENTS, ids="-".join)
def test_bad_numbers_name_the_verb_and_its_argument(verb, bad):
    name, argument = verb
    with pytest.raises(SettingError) as caught:
        ARGUMENTS[verb](bad)
    assert caught.value.code == f"SETTING_{argument.upper()}"
    assert caught.value.subject == f"Mask.{name}: {argument}"
    assert caught.value.found == said(bad)


@pytest.mark.parametrize("call", [lambda: SOFT.fill_holes(1.5), lambda: SOFT.on_lattice(cell=7.5)])
def test_counts_are_whole(call):
    with pytest.raises(SettingError, match="whole number"):
        call()


def test_other_bad_arguments():
    with pytest.raises(SettingError, match="nearest, max"):
        SOFT.on_lattice("mean")
    for size in (7, (0, 4), (4, NAN), (10**9, 10**9), "large"):
        with pytest.raises(MaskError, match=r"Mask\.resize"):
            SOFT.resize(size)
