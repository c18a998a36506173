"""Laws of crops, for any image and hole: where boxes are, what they are scaled to, and what comes back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdinpaint.images import crops
from sdinpaint.images.boxes import Box
from sdinpaint.images.crops import AUTO, MAX_ELONGATION, NEAR, Crop, crop_box, regions, working_size

SIDES = st.integers(8, 300)
MULTIPLES = st.sampled_from([8, 64])
MODELS = st.sampled_from([64, 128, 512, 1024])
quick = settings(max_examples=120, deadline=None)


@st.composite
def holes(draw, sides=SIDES):
    """A hole of one to four filled boxes."""
    height, width = draw(sides), draw(sides)
    hole = np.zeros((height, width), dtype=bool)
    for _ in range(draw(st.integers(1, 4))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        hole[top : draw(st.integers(top + 1, height)), left : draw(st.integers(left + 1, width))] = True
    return hole


@st.composite
def contexts(draw, hole):
    return draw(st.one_of(st.integers(0, max(hole.shape)), st.sampled_from([AUTO, None])))


@st.composite
def boxes_in(draw, height, width):
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return Box(left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


def random_image(height, width):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def surrounded(hole, context):
    """The box of the hole and `context` pixels around it, as far as there are that many."""
    rows, columns = np.nonzero(hole)
    height, width = hole.shape
    return Box(
        max(int(columns.min()) - context, 0),
        max(int(rows.min()) - context, 0),
        min(int(columns.max()) + 1 + context, width),
        min(int(rows.max()) + 1 + context, height),
    )


def holds(outer, inner):
    return (
        outer.left <= inner.left
        and outer.top <= inner.top
        and outer.right >= inner.right
        and outer.bottom >= inner.bottom
    )


def breaks_a_law_of_boxes(hole, context, box, multiple):
    """The first law that this box does not keep, or None."""
    height, width = hole.shape
    if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
        return "it is inside the image"
    if not holds(box, surrounded(hole, context)):
        return "it holds the hole and as much of the context as there is"
    for side, whole in zip(box.size, hole.shape, strict=True):
        if side % multiple and side != whole:
            return "its sides are multiples, or the image's own"
        if side * MAX_ELONGATION < max(box.size) and side != whole:
            return "it is at most twice as long as wide, or as wide as the image"
    return None


# where


@quick
@given(st.data(), holes(), MODELS, MULTIPLES)
def test_boxes_hold_the_hole_and_what_fits_around_it_inside_the_image(data, hole, size, multiple):
    context = data.draw(st.integers(0, max(hole.shape)))
    box = crop_box(hole, context, size, multiple)
    assert breaks_a_law_of_boxes(hole, context, box, multiple) is None


@quick
@given(holes(), MODELS)
def test_auto_leaves_at_least_an_eighth_of_the_models_side(hole, size):
    box = crop_box(hole, AUTO, size)
    assert breaks_a_law_of_boxes(hole, size // 8, box, 8) is None
    _, (height, width) = box.size, surrounded(hole, 0).size
    assert breaks_a_law_of_boxes(hole, max(height, width) // 2, box, 8) is None


@quick
@given(st.data(), holes())
def test_more_context_never_shows_less(data, hole):
    less, more = sorted(data.draw(st.tuples(*[st.integers(0, max(hole.shape))] * 2)))
    small, large = crop_box(hole, less, 512), crop_box(hole, more, 512)
    assert all(one <= other for one, other in zip(small.size, large.size, strict=True))


@quick
@given(st.data(), holes())
def test_a_mirrored_hole_has_a_box_of_the_same_size(data, hole):
    context = data.draw(contexts(hole))
    size = crop_box(hole, context, 512).size
    assert crop_box(hole[::-1, ::-1], context, 512).size == size
    assert crop_box(hole.T, context, 512).size == size[::-1]


def broken_boxes(sabotage, placed):
    """Whether any of some holes at borders and elsewhere shows that boxes are placed so."""
    sabotage(crops, "_placed", placed)
    found = set()
    for box in (Box(0, 0, 20, 20), Box(70, 70, 90, 90), Box(40, 30, 60, 50)):
        hole = np.zeros((90, 90), dtype=bool)
        hole[box.slices] = True
        found.add(breaks_a_law_of_boxes(hole, 12, crop_box(hole, 12, 512), 8))
    return found - {None}


def test_the_laws_see_boxes_that_are_cut_not_shifted(sabotage):
    def cut(span, length, whole):
        start = (sum(span) - length) // 2
        return max(start, 0), min(start + length, whole)

    assert broken_boxes(sabotage, cut) == {"its sides are multiples, or the image's own"}


def test_the_laws_see_boxes_that_are_off_centre(sabotage):
    def aside(span, length, whole):
        start = min(span[0], whole - length)
        return start, start + length

    assert "it holds the hole and as much of the context as there is" in broken_boxes(sabotage, aside)


def test_the_laws_see_boxes_that_leave_the_image(sabotage):
    def outside(span, length, whole):
        start = (sum(span) - length) // 2
        return start, start + length

    assert "it is inside the image" in broken_boxes(sabotage, outside)


# working size


@quick
@given(st.data(), holes(), MODELS, MULTIPLES)
def test_working_sizes_are_multiples_of_about_the_models_area_and_the_boxes_shape(data, hole, model, multiple):
    box = crop_box(hole, data.draw(contexts(hole)), model, multiple).size
    size = working_size(box, model, multiple)
    scale = model / math.sqrt(math.prod(box))
    for side, given_side in zip(size, box, strict=True):
        if size == box:
            assert abs(scale - 1) <= NEAR or side % multiple == 0
        else:
            assert side % multiple == 0
            assert abs(side - scale * given_side) <= max(multiple / 2, multiple - scale * given_side)
    if max(box) <= MAX_ELONGATION * min(box):
        off = multiple / 2 / (model / math.sqrt(MAX_ELONGATION))  # of the shorter side at most
        low, high = min(1 - off, 1 - NEAR), max(1 + off, 1 / (1 - NEAR))
        assert low <= math.sqrt(math.prod(size)) / model <= high


@quick
@given(SIDES, SIDES, st.sampled_from([128, 512, 1024]))
def test_a_working_size_is_its_own(height, width, model):
    size = working_size((height, width), model)
    if max(size) <= MAX_ELONGATION * min(size):
        assert working_size(size, model) == size


# regions


@settings(max_examples=60, deadline=None)
@given(holes(st.integers(8, 40)), st.integers(0, 12))
def test_regions_are_apart_disjoint_and_together_the_hole(hole, gap):
    parts = regions(hole, gap)
    assert np.array_equal(sum(part.astype(int) for part in parts), hole.astype(int))
    areas = [int(part.sum()) for part in parts]
    assert areas == sorted(areas, reverse=True)
    points = [np.argwhere(part) for part in parts]
    for index, one in enumerate(points):
        for other in points[:index]:
            steps = np.abs(one[:, None] - other[None]).max(axis=2).min()
            assert steps - 1 >= max(gap, 1), "fewer than `gap` known pixels are between them"


@settings(max_examples=60, deadline=None)
@given(holes(st.integers(8, 24)), st.integers(0, 8))
def test_a_region_is_held_together_by_steps_over_less_than_the_gap(hole, gap):
    for part in regions(hole, gap):
        points = np.argwhere(part)
        near = np.abs(points[:, None] - points[None]).max(axis=2) <= max(gap, 1)
        reached = np.zeros(len(points), dtype=bool)
        reached[0] = True
        while (grown := near[reached].any(axis=0)).sum() > reached.sum():
            reached = grown
        assert reached.all()


# there and back


@quick
@given(st.data(), SIDES, SIDES)
def test_cut_and_put_back_are_inverse_at_the_boxs_own_size(data, height, width):
    image, box = random_image(height, width), data.draw(boxes_in(height, width))
    crop = Crop(box, box.size)
    assert np.array_equal(crop.cut(image), image[box.slices])
    assert np.array_equal(crop.put_back(crop.cut(image), np.zeros_like(image))[box.slices], image[box.slices])
    assert np.array_equal(crop.put_back(crop.cut(image), image), image)


@quick
@given(st.data(), SIDES, SIDES, st.integers(1, 80), st.integers(1, 80))
def test_pixels_outside_the_box_never_change(data, height, width, rows, columns):
    image, box = random_image(height, width), data.draw(boxes_in(height, width))
    crop = Crop(box, (rows, columns))
    assert crop.cut(image).shape == (rows, columns, 3)
    back = crop.put_back(random_image(rows, columns), image)
    outside = np.ones((height, width), dtype=bool)
    outside[box.slices] = False
    assert np.array_equal(back[outside], image[outside])


@quick
@given(st.data(), holes(st.integers(8, 60)), st.integers(1, 80), st.integers(1, 80))
def test_every_repainted_pixel_of_the_box_is_repainted_at_working_size_and_none_beside(data, hole, rows, columns):
    box = data.draw(boxes_in(*hole.shape))
    cut = Crop(box, (rows, columns)).cut_hole(hole)
    inside = hole[box.slices]
    touched = np.zeros_like(cut)
    for row, column in np.argwhere(inside):
        top, bottom = row * rows // inside.shape[0], -(-(row + 1) * rows // inside.shape[0])
        left, right = column * columns // inside.shape[1], -(-(column + 1) * columns // inside.shape[1])
        touched[top:bottom, left:right] = True
    assert np.array_equal(cut, touched)


@pytest.mark.parametrize("seed", range(3))
def test_repeated_edits_of_one_crop_leave_what_is_outside_of_it(seed):
    image = first = random_image(90 + seed, 120)
    crop = Crop(Box(10, 20, 58, 68), (128, 128))
    for _ in range(10):
        image = crop.put_back(crop.cut(image), image)
    outside = np.ones(first.shape[:2], dtype=bool)
    outside[crop.box.slices] = False
    assert np.array_equal(image[outside], first[outside])
