"""Sheets: what changed is seen and only that, cells have sensible sizes, and boxes are drawn where they are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from sdinpaint.errors import ImageError
from sdinpaint.images import sheets
from sdinpaint.images.boxes import Box
from sdinpaint.images.sheets import (
    CELL_SIDE,
    GAP,
    HEAT,
    INK,
    MARGIN,
    MAX_CROPS,
    PAPER,
    contact_sheet,
    heat_map,
    review_row,
    tinted,
)

WHITE = (255, 255, 255)


def grey(height, width, level=100):
    return np.full((height, width, 3), level, dtype=np.uint8)


def hole_at(shape, box):
    hole = np.zeros(shape, dtype=bool)
    hole[box.slices] = True
    return hole


def white(image):
    return (np.asarray(image) == WHITE).all(axis=2)


# the heat map


def test_equal_pixels_are_white_and_one_level_is_not():
    changed = grey(20, 30)
    changed[3, 4, 1] += 1
    seen = ~white(heat_map(grey(20, 30), changed))
    assert np.array_equal(np.argwhere(seen), [[3, 4]])


def test_more_change_is_darker_up_to_all_of_it():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    colours = np.asarray(heat_map(np.zeros_like(ramp), ramp))[0]
    luminance = colours @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) <= 0).all()
    assert (luminance[4:] < luminance[:-4]).all()
    for level, colour in HEAT.items():
        assert tuple(colours[level]) == colour


def test_the_scale_is_the_same_for_every_pair_and_sign():
    one, other = grey(8, 8, 60), grey(8, 8, 90)
    small = np.asarray(heat_map(one, other))
    assert np.array_equal(small, np.asarray(heat_map(other, one)))
    other[0, 0] = 255
    assert np.array_equal(small[1:], np.asarray(heat_map(one, other))[1:])


def test_a_single_changed_pixel_is_seen_at_any_size():
    changed = grey(999, 1203)
    changed[577, 31, 2] += 1
    assert (~white(heat_map(grey(999, 1203), changed, (80, 100)))).any()


def test_averaging_would_hide_it():
    changed = grey(999, 1203)
    changed[577, 31, 2] += 1
    small = Image.fromarray(changed).resize((100, 80), Image.Resampling.LANCZOS)
    assert white(heat_map(grey(80, 100), np.asarray(small))).all()


# a review


def test_a_row_has_the_image_hole_result_difference_and_crop():
    box, part = Box(8, 8, 72, 56), Box(20, 20, 40, 40)
    original, result = grey(80, 100), grey(80, 100)
    hole = hole_at((80, 100), part)
    result[hole] = 200
    cells = review_row(original, hole, result, boxes=[box], caption="a ball\nseed 3")
    before, over, after, heat, crop = (np.asarray(image) for image, _ in cells)
    assert (before == 100).all()
    assert np.array_equal(~white(heat), np.kron(hole, np.ones((3, 3), dtype=bool)))
    assert (after[70:110, 70:110] == 200).all()
    assert (over[90, 90] == np.asarray(tinted(before, np.ones((240, 300), dtype=bool)))[90, 90]).all()
    assert crop.shape == (48 * 5, 64 * 5, 3)
    captions = [caption for _, caption in cells]
    assert captions[1].endswith("400 pixels, 5.0%")
    assert captions[2] == "a ball\nseed 3"
    assert "known pixels changed: 0" in captions[3]
    assert captions[4].endswith("64 x 48 pixels")


def test_changed_known_pixels_are_counted():
    result = grey(80, 100)
    result[0, :7, 1] = 0
    caption = review_row(grey(80, 100), hole_at((80, 100), Box(20, 20, 40, 40)), result)[3][1]
    assert "known pixels changed: 7" in caption


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (320, 320)),
        ((128, 128), (256, 256)),
        ((100, 80), (300, 240)),
        ((320, 200), (320, 200)),
        ((321, 200), (320, 199)),
        ((200, 321), (199, 320)),
        ((4000, 3000), (320, 240)),
        ((8, 9000), (1, 320)),
        ((8, 8), (320, 320)),
    ],
)
def test_cells_have_a_sensible_size(size, expected):
    cells = review_row(grey(*size), np.ones(size, dtype=bool), grey(*size), boxes=[Box(0, 0, 8, 8)])
    for image, _ in cells[:4]:
        assert (image.height, image.width) == expected
    assert all(max(image.size) <= CELL_SIDE for image, _ in cells)


def test_a_thin_hole_is_seen_in_a_large_image():
    original = np.repeat(np.repeat(grey(1, 1), 1500, axis=0), 1500, axis=1)
    hole = hole_at((1500, 1500), Box(700, 100, 701, 1400))
    over = np.asarray(review_row(original, hole, original)[1][0])
    assert (over != 100).any(axis=2).any(axis=1).sum() >= 1300 * CELL_SIDE // 1500


def test_boxes_are_outlined_where_they_are():
    box = Box(10, 20, 60, 70)
    over = np.asarray(review_row(grey(80, 100), np.zeros((80, 100), dtype=bool), grey(80, 100), boxes=[box])[1][0])
    rows, columns = np.nonzero((over == INK).all(axis=2))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (30, 60, 180, 210)
    assert (over[65:205, 35:175] == 100).all()


def test_a_box_that_scales_to_nothing_is_still_a_mark_where_it_is():
    strip, box = grey(8, 9000), Box(6000, 0, 6008, 8)
    over = np.asarray(review_row(strip, np.zeros((8, 9000), dtype=bool), strip, boxes=[box])[1][0])
    marked = np.nonzero((over[0] == INK).all(axis=1))[0]
    assert 0 < len(marked) < 8
    assert abs(marked.mean() - 6000 * CELL_SIDE / 9000) < 2


def test_a_box_of_the_whole_image_is_not_shown():
    cells = review_row(grey(80, 100), np.ones((80, 100), dtype=bool), grey(80, 100), boxes=[Box(0, 0, 100, 80)])
    assert len(cells) == 4
    assert not (np.asarray(cells[1][0]) == INK).all(axis=2).any()


def test_every_box_is_outlined_and_some_are_enlarged():
    boxes = [Box(8 * index, 0, 8 * index + 8, 8) for index in range(10)]
    cells = review_row(grey(80, 100), np.zeros((80, 100), dtype=bool), grey(80, 100), boxes=boxes)
    assert len(cells) == 4 + MAX_CROPS
    ink = (np.asarray(cells[1][0]) == INK).all(axis=2)
    assert all(ink[:24, 24 * index : 24 * index + 24].any() for index in range(10))


def test_a_sheet_holds_its_row():
    original, hole = grey(64, 64), hole_at((64, 64), Box(8, 8, 24, 24))
    sheet = contact_sheet([review_row(original, hole, original, boxes=[Box(0, 0, 32, 32)])], title="A title", scale=1)
    assert sheet.width == 2 * MARGIN + 5 * CELL_SIDE + 4 * GAP
    assert (np.asarray(sheet)[: MARGIN // 2] == PAPER).all()


def test_captions_are_right_below_their_images():
    high, low = Image.new("RGB", (60, 200)), Image.new("RGB", (60, 20))
    sheet = np.asarray(contact_sheet([[(high, "one"), (low, "two")]], scale=1))
    text = (sheet != PAPER).any(axis=2)[:, MARGIN + 60 + GAP : MARGIN + 120 + GAP]
    assert text[MARGIN + 22 : MARGIN + 22 + sheets.CAPTION_GAP + sheets.CAPTION_SIZE].any()
    assert not text[MARGIN + 60 :].any()


def test_rows_are_as_high_as_their_own_images():
    high, low = Image.new("RGB", (60, 200)), Image.new("RGB", (60, 20))
    heights = [
        contact_sheet([[(image, "")] for image in images], scale=1).height for images in ([high] * 2, [high, low])
    ]
    assert heights[0] - heights[1] == 180


# refused


def test_images_of_other_sizes_are_refused():
    original, hole = grey(40, 50), np.ones((40, 50), dtype=bool)
    for call in (
        lambda: heat_map(original, grey(40, 51)),
        lambda: heat_map(original, original[..., 0]),
        lambda: heat_map(np.repeat(original, 2, axis=2)[..., :4], np.repeat(original, 2, axis=2)[..., :4]),
        lambda: review_row(original, hole, grey(80, 100)),
        lambda: review_row(original, hole[1:], original),
        lambda: contact_sheet([review_row(original, hole[:, 1:], original)]),
    ):
        refused(ImageError, "IMAGE_BAD_SHAPE", call, "original (40, 50")
