"""Masks by GrabCut, by flooding and by regions, on images whose objects are known."""

from __future__ import annotations

import numpy as np
import pytest
from refusals import INF, NAN, refused

from sdinpaint.errors import MaskError, SettingError
from sdinpaint.images.boxes import Box
from sdinpaint.masks.segmenting import flood, grabcut, region

SIZE = (90, 120)
BOX = Box(25, 12, 95, 78)


def ellipse(x: float, y: float, across: float, down: float) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return ((columns - x) / across) ** 2 + ((rows - y) / down) ** 2 <= 1


def painted(*objects, ground=(60, 120, 170), noise=0.0):
    """An image of (hole, colour) pairs over a ground, with noise of that standard deviation."""
    image = np.empty((*SIZE, 3))
    image[:] = ground
    for hole, colour in objects:
        image[hole] = colour
    image += np.random.default_rng(0).normal(0, 1, image.shape) * noise
    return image.clip(0, 255).astype(np.uint8)


def iou(found, truth):
    assert found.dtype == bool
    assert found.shape == truth.shape
    return (found & truth).sum() / (found | truth).sum()


RED, BLUE, GROUND = (190, 60, 50), (40, 60, 200), (60, 120, 170)
OBJECT = ellipse(60, 45, 26, 20)
SPECK = ellipse(40, 20, 5, 5)


# GrabCut


def test_grabcut_finds_the_object_in_a_box():
    image = painted((OBJECT, RED), noise=25)
    assert iou(grabcut(image, BOX), OBJECT) > 0.95
    assert iou(grabcut(image, (25, 12, 95, 78)), OBJECT) > 0.95


def test_grabcut_finds_the_object_under_a_scribble():
    image = painted((OBJECT, RED), noise=25)
    assert iou(grabcut(image, repaint=ellipse(60, 45, 8, 4)), OBJECT) > 0.95


def test_nothing_outside_of_the_box_is_repainted_but_by_scribbles():
    other = ellipse(105, 70, 12, 12)
    image = painted((OBJECT, RED), (other, RED), noise=10)
    found = grabcut(image, BOX)
    outside = np.ones(SIZE, bool)
    outside[BOX.slices] = False
    assert not found[outside].any()
    assert grabcut(image, BOX, repaint=other)[outside & other].all()


def test_scribbles_decide_where_they_are_drawn():
    left, right = ellipse(45, 45, 12, 15), ellipse(75, 45, 12, 15)
    image = painted((left, RED), (right, BLUE), noise=10)
    assert iou(grabcut(image, BOX), left | right) > 0.95
    kept = grabcut(image, BOX, keep=ellipse(75, 45, 8, 10))
    assert iou(kept, left) > 0.95
    hard = ellipse(45, 45, 4, 4)
    assert not grabcut(image, BOX, keep=hard)[hard].any()
    ground = ellipse(60, 20, 5, 3)
    assert grabcut(image, BOX, repaint=ground)[ground].all()


@pytest.mark.parametrize("kind", [np.float32, np.float64, int])
def test_scribbles_of_any_kind(kind):
    image, scribble = painted((OBJECT, RED), noise=25), ellipse(60, 45, 8, 4)
    soft = scribble.astype(kind)
    if kind is not int:
        soft[~scribble] = 0.49
        soft[scribble] = 0.5
    assert np.array_equal(grabcut(image, repaint=soft), grabcut(image, repaint=scribble))


def test_grabcut_gives_the_same_bits_and_leaves_the_generator_of_opencv_alone():
    import cv2

    blocks = np.random.default_rng(1).integers(0, 256, (9, 12, 3), np.uint8).repeat(10, 0).repeat(10, 1)

    def unguarded():
        labels = np.zeros(SIZE, np.uint8)
        labels[BOX.slices] = cv2.GC_PR_FGD
        cv2.grabCut(blocks, labels, None, None, None, 2, cv2.GC_INIT_WITH_MASK)
        return labels.tobytes()

    def over_seeds(cut):
        found = set()
        for seed in range(8):
            cv2.setRNGSeed(seed)
            found.add(cut())
        return found

    assert len(over_seeds(unguarded)) > 1
    assert len(over_seeds(lambda: grabcut(blocks, BOX, iterations=2).tobytes())) == 1

    def drawn(between):
        cv2.setRNGSeed(7)
        between()
        return cv2.randu(np.zeros(8, np.int32), 0, 10**6).tolist()

    assert drawn(unguarded) != drawn(lambda: None)
    assert drawn(lambda: grabcut(blocks, BOX)) == drawn(lambda: None)


def test_grabcut_leaves_what_it_is_given():
    image, scribble = painted((OBJECT, RED), noise=25), ellipse(60, 45, 8, 4)
    before = image.copy(), scribble.copy()
    image.flags.writeable = scribble.flags.writeable = False
    grabcut(image[:, ::-1], repaint=scribble)
    assert np.array_equal(image, before[0])
    assert np.array_equal(scribble, before[1])


def test_grabcut_of_one_colour_repaints_all_or_nothing_of_the_box():
    found = grabcut(painted(), BOX)
    assert found.sum() in (0, 66 * 70)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ({}, "MASK_NO_PROMPT", ["grabcut", "box"]),
        ({"keep": OBJECT}, "MASK_NO_PROMPT", ["grabcut", "box"]),
        ({"box": (95, 12, 25, 78)}, "MASK_BOX", ["box", "left < right"]),
        ({"box": (25, 12, 121, 78)}, "MASK_BOX", ["box", "120"]),
        ({"box": (-1, 12, 95, 78)}, "MASK_BOX", ["box"]),
        ({"box": (25, 12, 95)}, "MASK_BOX", ["box"]),
        ({"box": (25, 12, NAN, 78)}, "MASK_BOX", ["box"]),
        ({"box": (25, 12, 95.5, 78)}, "MASK_BOX", ["box", "whole", "95.5"]),
        ({"box": (0, 0, 120, 90)}, "MASK_ONE_SIDED", ["nothing to keep"]),
        ({"repaint": np.zeros(SIZE, bool)}, "MASK_ONE_SIDED", ["nothing to repaint"]),
        ({"box": BOX, "keep": np.ones(SIZE, bool)}, "MASK_ONE_SIDED", ["nothing to repaint"]),
        ({"box": BOX, "keep": OBJECT[1:]}, "MASK_SIZE", ["keep", "(89, 120)", "(90, 120)"]),
        ({"repaint": OBJECT, "keep": SPECK | OBJECT}, "MASK_SCRIBBLES", ["keep", "repaint", OBJECT.sum()]),
    ],
)
def test_grabcut_refuses(arguments, code, words):
    refused(MaskError, code, lambda: grabcut(painted((OBJECT, RED)), **arguments), *words)


def test_a_scribble_of_one_pixel_is_enough():
    scribble = np.zeros(SIZE, bool)
    scribble[45, 60] = True
    assert grabcut(painted((OBJECT, RED), noise=5), repaint=scribble)[45, 60]


# flooding


def test_flood_fills_one_colour_and_no_other_object():
    far = ellipse(15, 15, 8, 8)
    image = painted((OBJECT, RED), (far, RED))
    assert np.array_equal(flood(image, (60, 45)), OBJECT)
    assert np.array_equal(flood(image, (15, 15)), far)
    assert np.array_equal(flood(image, (110, 5), tolerance=0), ~(OBJECT | far))


def test_a_point_is_x_then_y():
    corner = np.zeros(SIZE, bool)
    corner[:10, 80:] = True
    assert np.array_equal(flood(painted((corner, RED)), (85, 5)), corner)
    assert np.array_equal(region(painted((corner, RED)), (85, 5), sigma=0), corner)


def test_tolerance_is_a_distance_of_colours():
    step = np.zeros((*SIZE, 3), np.uint8)
    step[:, :40], step[:, 40:80], step[:, 80:] = 100, 110, 160
    widths = [flood(step, (5, 5), tolerance)[0].sum() for tolerance in (0.0, 0.03, 0.1, 0.5, 1.0)]
    assert widths == [40, 40, 80, 120, 120]
    black_and_white = np.zeros((*SIZE, 3), np.uint8)
    black_and_white[:, 60:] = 255
    assert flood(black_and_white, (5, 5), 0.999).sum() == 60 * SIZE[0]
    assert flood(black_and_white, (5, 5), 1.0).all()


def test_tolerance_is_measured_from_the_point_and_does_not_creep():
    ramp = np.broadcast_to(np.linspace(0, 255, SIZE[1]).astype(np.uint8)[None, :, None], (*SIZE, 3))
    found = flood(ramp, (0, 0), 0.1)
    assert 0 < found[0].sum() < SIZE[1] / 4


def test_flood_does_not_cross_a_slanted_line():
    line = np.eye(*SIZE, k=20, dtype=bool)
    found = flood(painted((line, RED)), (110, 5), 0.1)
    assert np.array_equal(found, np.triu(np.ones(SIZE, bool), k=21))


def test_flood_at_tolerance_zero_takes_every_pixel_of_one_colour():
    for colour in np.random.default_rng(3).integers(0, 256, (20, 3)):
        assert flood(painted(ground=colour), (61, 7), 0).all()


# regions


def test_region_under_a_point():
    image = painted((OBJECT, RED))
    assert np.array_equal(region(image, (60, 45), sigma=0), OBJECT)
    assert np.array_equal(region(image, (2, 2), sigma=0), ~OBJECT)
    assert iou(region(painted((OBJECT, RED), noise=10), (60, 45)), OBJECT) > 0.85


def test_small_regions_are_taken_in_by_their_neighbours():
    image = painted((SPECK, RED))
    assert np.array_equal(region(image, (40, 20), sigma=0, min_size=50), SPECK)
    assert region(image, (40, 20), sigma=0, min_size=100).all()


def test_regions_grow_with_scale():
    image = painted((OBJECT, (90, 130, 170)), noise=10)
    assert region(image, (60, 45), scale=5000).sum() > region(image, (60, 45), scale=20).sum()


@pytest.mark.parametrize("function", [flood, region])
@pytest.mark.parametrize("point", [(120, 5), (5, 90), (-1, 5), (5, -0.5), (NAN, 5), (INF, 5), (5,), (1, 2, 3), 5])
def test_points_outside_are_refused(function, point):
    refused(MaskError, "MASK_POINTS", lambda: function(painted(), point), function.__name__, "point", "(x, y)")


def test_the_last_pixel_is_inside():
    assert flood(painted(), (119, 89)).all()
    assert region(painted(), (119.5, 89.5)).all()


@pytest.mark.parametrize(
    ("function", "place", "setting", "value"),
    [
        (grabcut, BOX, "iterations", 0),
        (grabcut, BOX, "iterations", 2.5),
        (flood, (5, 5), "tolerance", -0.1),
        (flood, (5, 5), "tolerance", 1.1),
        (flood, (5, 5), "tolerance", NAN),
        (region, (5, 5), "scale", -1),
        (region, (5, 5), "sigma", NAN),
        (region, (5, 5), "min_size", -1),
    ],
)
def test_settings_out_of_range_are_refused(function, place, setting, value):
    code = f"SETTING_{setting.upper()}"
    refused(SettingError, code, lambda: function(painted(), place, **{setting: value}), function.__name__, value)


@pytest.mark.parametrize("function", [flood, region])
def test_a_point_outside_is_told_the_size(function):
    refused(MaskError, "MASK_POINTS", lambda: function(painted(), (120, 5)), "(120, 5)", "x < 120", "y < 90")
