"""Crops: exact boxes, working sizes and regions, the way there and back, and what is refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from refusals import INF, NAN, refused

from sdinpaint.errors import ImageError, MaskError, SettingError
from sdinpaint.images.boxes import Box
from sdinpaint.images.crops import AUTO, Crop, crop_box, pooled, regions, working_size
from sdinpaint.masks import binarize


def hole_at(shape, *boxes):
    hole = np.zeros(shape, dtype=bool)
    for box in boxes:
        hole[Box(*box).slices] = True
    return hole


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# where


@pytest.mark.parametrize(
    ("shape", "hole", "context", "size", "expected"),
    [
        ((600, 800), (300, 200, 364, 264), 32, 512, (268, 168, 396, 296)),
        ((600, 800), (300, 200, 364, 264), 0, 512, (300, 200, 364, 264)),
        ((600, 800), (300, 200, 400, 300), AUTO, 512, (234, 134, 466, 366)),  # 64: an eighth of 512, more than 50
        ((600, 800), (300, 100, 500, 300), AUTO, 512, (200, 0, 600, 400)),  # 100: half of 200
        ((600, 800), (0, 0, 64, 64), 32, 512, (0, 0, 128, 128)),  # shifted to the left and top border
        ((600, 800), (736, 536, 800, 600), 32, 512, (672, 472, 800, 600)),  # and to the right and bottom one
        ((600, 800), (100, 300, 500, 310), 0, 512, (100, 205, 500, 405)),  # a long strip: 400 by at least 200
        ((40, 800), (100, 10, 500, 20), 0, 512, (100, 0, 500, 40)),  # in an image that is not high enough
        ((600, 800), (300, 200, 301, 201), 0, 512, (296, 196, 304, 204)),  # one pixel: a latent cell
        ((8, 9), (0, 0, 9, 8), 9, 512, (0, 0, 9, 8)),  # the smallest image, and no multiple of 8
        ((601, 803), (0, 0, 803, 601), AUTO, 512, (0, 0, 803, 601)),
        ((600, 800), (300, 200, 364, 264), None, 512, (0, 0, 800, 600)),
    ],
)
def test_boxes(shape, hole, context, size, expected):
    assert crop_box(hole_at(shape, hole), context, size) == expected


def test_sides_are_of_the_multiple_that_is_asked_for():
    box = crop_box(hole_at((600, 800), (300, 200, 364, 264)), 5, 512, multiple=64)
    assert box.size == (128, 128)


def test_faint_pixels_do_not_move_the_box():
    mask = np.zeros((512, 512), dtype=np.float32)
    mask[200:300, 200:300] = 1
    alone = crop_box(binarize(mask), 32, 512)
    mask[511, 0] = 0.49
    assert crop_box(binarize(mask), 32, 512) == alone
    mask[511, 0] = 0.5
    assert crop_box(binarize(mask), 32, 512) != alone


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ((512, 512), 512, (512, 512)),
        ((500, 530), 512, (500, 530)),  # within 5 %: as it is
        ((128, 128), 512, (512, 512)),
        ((2000, 1000), 512, (728, 360)),
        ((1000, 2000), 512, (360, 728)),
        ((100, 130), 512, (448, 584)),
        ((64, 64), 1024, (1024, 1024)),
        ((8, 4000), 512, (24, 11448)),
        ((8, 40000), 64, (8, 4528)),  # never less than a cell
    ],
)
def test_working_sizes(box, size, expected):
    assert working_size(box, size) == expected


def test_a_working_size_of_multiples_of_64():
    assert working_size((100, 130), 512, multiple=64) == (448, 576)


# regions


def test_regions_come_largest_first_and_near_ones_belong_together():
    hole = hole_at((60, 100), (2, 2, 6, 6), (10, 2, 12, 4), (50, 20, 70, 40))  # 4 pixels between the first two
    apart = regions(hole, 4)
    assert [int(region.sum()) for region in apart] == [400, 16, 4]
    joined = regions(hole, 5)
    assert [int(region.sum()) for region in joined] == [400, 20]
    assert np.array_equal(joined[1], hole_at((60, 100), (2, 2, 6, 6), (10, 2, 12, 4)))


@pytest.mark.parametrize("gap", [0, 1])
def test_pixels_that_touch_at_a_corner_are_one_region(gap):
    hole = np.eye(9, dtype=bool)
    assert len(regions(hole, gap)) == 1
    hole[4, 4] = False
    assert len(regions(hole, gap)) == 2
    assert len(regions(hole, 2)) == 1


def test_no_hole_has_no_regions():
    assert regions(np.zeros((20, 20), dtype=bool), 8) == []


def test_regions_say_what_they_need(without):
    without("scipy", "scipy.ndimage")
    hole = hole_at((20, 20), (2, 2, 6, 6))
    refused(SettingError, "SETTING_EXTRA", lambda: regions(hole, 8), "scipy", "sdinpaint[mask]")
    assert crop_box(hole, AUTO, 64)


# there and back


def test_without_scaling_a_crop_is_the_box_itself():
    image = noise(40, 50)
    crop = Crop(Box(4, 6, 36, 30), (24, 32))
    assert np.array_equal(crop.cut(image), image[6:30, 4:36])
    soft = np.random.default_rng(1).random((40, 50), dtype=np.float32)
    assert np.array_equal(crop.cut_soft(soft), soft[6:30, 4:36])
    assert np.array_equal(crop.cut_hole(soft > 0.5), soft[6:30, 4:36] > 0.5)


def test_scaling_there_and_back_keeps_a_smooth_image():
    rows, columns = np.mgrid[:96, :120]
    image = np.stack([2 * rows, 2 * columns, rows + columns], axis=2).astype(np.uint8)
    crop = Crop(Box(10, 8, 90, 72), (128, 160))
    back = crop.put_back(crop.cut(image), image)
    assert np.abs(back.astype(int) - image).max() <= 3


def test_a_pasted_crop_fills_its_box_and_changes_nothing_else():
    image = noise(40, 50)
    before = image.copy()
    crop = Crop(Box(4, 6, 36, 30), (48, 64))
    back = crop.put_back(np.full((48, 64, 3), 7, dtype=np.uint8), image)
    assert (back[6:30, 4:36] == 7).all()
    outside = ~hole_at((40, 50), crop.box)
    assert np.array_equal(back[outside], before[outside])
    assert np.array_equal(image, before)


def test_a_thin_line_survives_any_scaling_down():
    for column in range(4, 36):
        crop = Crop(Box(4, 6, 36, 30), (6, 7))
        assert crop.cut_hole(hole_at((40, 50), (column, 6, column + 1, 30))).any(axis=1).all()


def test_sampling_the_nearest_pixel_would_lose_it():
    lost = 0
    for column in range(4, 36):
        hole = hole_at((40, 50), (column, 6, column + 1, 30))
        lost += not hole[6:30, 4:36][2::4, 2::4].any()
    assert lost > 0


def test_pooled_takes_the_largest_that_a_pixel_touches():
    values = np.array([[0, 5, 1], [2, 3, 4]])
    assert np.array_equal(pooled(values, (1, 2)), [[5, 5]])  # the middle column belongs to both
    assert np.array_equal(pooled(values, (2, 6)), np.repeat(values, 2, axis=1))


def test_soft_masks_stay_in_range():
    mask = hole_at((40, 50), (20, 10, 30, 20)).astype(np.float32)
    for size in ((48, 64), (11, 13)):
        cut = Crop(Box(4, 6, 36, 30), size).cut_soft(mask)
        assert cut.dtype == np.float32
        assert cut.shape == size
        assert cut.min() >= 0
        assert 0 < cut.max() <= 1


def test_crops_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Crop(Box(0, 0, 8, 8), (8, 8)).size = (1, 1)


# refused

HOLE = hole_at((64, 72), (20, 16, 40, 50))


def test_an_empty_hole_is_refused():
    empty = np.zeros((64, 72), dtype=bool)
    for context in (AUTO, None, 8):
        refused(MaskError, "MASK_EMPTY", lambda context=context: crop_box(empty, context, 512))


@pytest.mark.parametrize("context", ["automatic", "", "32", 1.5, 8.0, NAN, INF, True, False, [8], b"auto", {}])
def test_a_context_that_is_none_is_refused_with_those_that_are(context):
    refused(SettingError, "SETTING_CROP", lambda: crop_box(HOLE, context, 512), repr(context), "'auto'", "None")


@pytest.mark.parametrize("context", [-1, 73, 10**30, np.int64(-8)])
def test_a_context_beyond_the_image_is_refused_with_both_sizes(context):
    refused(SettingError, "SETTING_CROP", lambda: crop_box(HOLE, context, 512), context, 64, 72)


def test_numpy_counts_are_whole_numbers():
    assert crop_box(HOLE, np.int64(8), 512) == crop_box(HOLE, 8, 512)
    assert crop_box(HOLE, 72, 512) == Box(0, 0, 72, 64)


@pytest.mark.parametrize("gap", [-1, 1.5, NAN, True, "8", None])
def test_a_gap_that_is_none_is_refused(gap):
    refused(SettingError, "SETTING_GAP", lambda: regions(HOLE, gap), repr(gap))


def test_a_result_of_another_size_is_refused():
    crop = Crop(Box(4, 6, 36, 30), (48, 64))
    for shape in ((48, 72, 3), (48, 64), (48, 64, 4)):
        refused(
            ImageError, "IMAGE_BAD_SHAPE", lambda shape=shape: crop.put_back(np.zeros(shape, np.uint8), noise(40, 50))
        )


@pytest.mark.parametrize("box", [Box(4, 6, 51, 30), Box(4, 6, 36, 41), Box(-1, 6, 36, 30), Box(9, 6, 9, 30)])
def test_a_box_outside_the_image_is_refused(box):
    crop = Crop(box, (8, 8))
    for call in (
        lambda: crop.cut(noise(40, 50)),
        lambda: crop.cut_hole(np.ones((40, 50), dtype=bool)),
        lambda: crop.cut_soft(np.ones((40, 50), dtype=np.float32)),
        lambda: crop.put_back(noise(8, 8), noise(40, 50)),
    ):
        refused(ImageError, "IMAGE_BAD_SHAPE", call, "40 rows", "50 columns")
