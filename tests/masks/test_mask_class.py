"""Mask as a value, and every way of making one, each against an independent account of what it should hold."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from skimage.draw import polygon2mask

import sdinpaint
from sdinpaint import SdInpaintError
from sdinpaint.errors import ImageError, MaskError, SdInpaintWarning, SettingError
from sdinpaint.masks import Mask, read_mask
from sdinpaint.masks.checks import FARTHEST

SIZE = (72, 96)
ROWS, COLUMNS = np.mgrid[: SIZE[0], : SIZE[1]]
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
HOLE = (ROWS >= 20) & (ROWS < 50) & (COLUMNS >= 30) & (COLUMNS < 70)
LAYOUT = "0 0 7\n0 2 2\n"


def refused(kind, code, call, *words):
    """The error of a call, after checking what every error must have."""
    with pytest.raises(SdInpaintError) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    assert error.code == code
    assert error.expected or error.hint
    for word in words:
        assert str(word) in str(error)
    return error


def distance_to(points):
    """Return the distance of each pixel's centre (H, W) to a line through points (x, y)."""
    at = np.stack([COLUMNS, ROWS], axis=-1).astype(float)
    nearest = np.full(SIZE, np.inf)
    for start, end in zip(points, points[1:] or points, strict=False):
        from_start, along = at - start, np.subtract(end, start, dtype=float)
        share = np.clip(from_start @ along / max(along @ along, 1e-9), 0, 1)
        nearest = np.minimum(nearest, np.linalg.norm(from_start - share[..., None] * along, axis=-1))
    return nearest


# a value


def test_it_is_public():
    assert sdinpaint.Mask is Mask


def test_what_it_tells():
    mask = Mask(HOLE)
    assert mask.size == SIZE
    assert mask.array.dtype == np.float32
    assert mask.share == HOLE.mean()
    assert np.array_equal(mask.hole, HOLE)
    assert repr(mask) == f"Mask(size=(72, 96), share={HOLE.mean():.4g})"
    digits = hashlib.sha256(b"(72, 96)" + HOLE.astype("<f4").tobytes()).hexdigest()
    assert mask.sha256 == digits


def test_nobody_can_change_it():
    given = HOLE.astype(np.float32)
    mask = Mask(given)
    given[:] = 1
    assert np.array_equal(mask.hole, HOLE)
    for copied in (mask, copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert copied == mask
        with pytest.raises(ValueError, match="read-only"):
            copied.array[0, 0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            copied.array.flags.writeable = True
        with pytest.raises(AttributeError):
            copied.array = given


def test_equality_and_hash_go_by_value():
    mask = Mask(HOLE)
    assert mask == Mask(HOLE.astype(np.uint8) * 255)
    assert hash(mask) == hash(Mask(torch.from_numpy(HOLE)))
    assert Mask(np.float32([[-0.0]])) == Mask.empty((1, 1))
    assert hash(Mask(np.float32([[-0.0]]))) == hash(Mask.empty((1, 1)))
    others = (Mask(~HOLE), Mask(HOLE[:, :-1]), Mask(HOLE * 0.75), Mask(HOLE.reshape(96, 72)))
    for other in others:
        assert mask != other
        assert mask.sha256 != other.sha256
    assert len({mask, *others}) == 5
    assert mask != "mask"


def test_values_keep_what_they_are_to_the_24th_bit():
    soft = RNG.random(SIZE, dtype=np.float32)
    assert np.abs(Mask(soft).array - soft).max() < 2**-24
    below = np.nextafter(np.float32(0.5), np.float32(0))
    assert not Mask(np.full(SIZE, below)).hole.any()
    assert Mask(np.full(SIZE, 0.5)).hole.all()


@pytest.mark.parametrize(("dtype", "white"), [(bool, 1), (np.uint8, 255), (np.uint16, 65535), (np.float64, 1)])
def test_arrays_and_tensors(dtype, white):
    array = (HOLE * white).astype(dtype)
    assert Mask(array) == Mask(HOLE)
    assert Mask(torch.from_numpy(array)) == Mask(HOLE)


def test_numpy_takes_it():
    mask = Mask(HOLE)
    assert np.shares_memory(np.asarray(mask), mask.array)
    assert not np.shares_memory(np.array(mask), mask.array)
    assert np.asarray(mask, dtype=np.float64).dtype == np.float64
    assert Mask(mask) == mask


def test_what_is_no_mask_is_no_operand():
    with pytest.raises(TypeError):
        Mask(HOLE) | True
    with pytest.raises(TypeError):
        "mask" - Mask(HOLE)


@pytest.mark.parametrize("combine", [Mask.__or__, Mask.__and__, Mask.__sub__])
def test_different_sizes_do_not_combine(combine):
    one, two = Mask.full((8, 9)), Mask.full((9, 8))
    refused(MaskError, "MASK_SIZE", lambda: combine(one, two), "(8, 9)", "(9, 8)", "resize")


# looking and saving


@pytest.mark.parametrize("levels", [HOLE.astype(np.uint8) * 255, PHOTO[..., 0] | 4])
def test_saved_and_opened(tmp_path, levels):
    path = tmp_path / "mask.png"
    mask = Mask(levels)
    mask.save(path)
    assert Mask.open(path) == mask
    assert Image.open(path).mode == "L"
    assert np.array_equal(np.asarray(Image.open(path)), levels)
    assert Image.open(io.BytesIO(mask._repr_png_())).tobytes() == mask.to_pil().tobytes()
    assert [file.name for file in tmp_path.iterdir()] == ["mask.png"]


def test_open_has_the_rules_of_read_mask(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (72, 1))).save(path)
    assert Mask.open(path) == Mask(read_mask(path, SIZE))
    Image.fromarray(PHOTO).save(path)
    refused(MaskError, "MASK_COLOURED", lambda: Mask.open(path))
    refused(ImageError, "IMAGE_NOT_FOUND", lambda: Mask.open(tmp_path / "none.png"), "none.png")
    Image.merge("LA", [Image.new("L", (96, 72), 255), Image.fromarray(HOLE).convert("L")]).save(path)
    with pytest.warns(SdInpaintWarning, match="alpha channel") as caught:
        assert Mask.open(path) == Mask(HOLE)
    assert caught[0].filename == __file__


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "mask.png"
    Mask(HOLE).save(path)
    failing(Image.Image, "save", OSError("disk full"))
    refused(ImageError, "IMAGE_NOT_WRITTEN", lambda: Mask.full(SIZE).save(path), "disk full")
    monkeypatch.undo()
    assert Mask.open(path) == Mask(HOLE)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.png"]


@pytest.mark.parametrize("name", ["mask.jpg", "mask.webp", "mask", "mask.png/mask.png"])
def test_saved_as_png_alone(tmp_path, name):
    (tmp_path / "mask.png").touch()
    with pytest.raises(ImageError, match=name):
        Mask(HOLE).save(tmp_path / name)


def test_over_an_image():
    shown = np.asarray(Mask(HOLE).over(PHOTO)).astype(int)
    assert np.array_equal(shown[~HOLE], PHOTO[~HOLE])
    tint = 0.4 * PHOTO + 0.6 * np.array([255, 0, 140])
    assert np.abs(shown - tint)[HOLE].max() <= 0.5
    half = np.asarray(Mask(HOLE * 0.5).over(Image.fromarray(PHOTO)))
    assert np.abs(half - (PHOTO + tint) / 2)[HOLE].max() <= 1.5
    refused(MaskError, "MASK_SIZE", lambda: Mask.full((96, 72)).over(PHOTO))


# drawn by coordinates


def test_empty_and_full():
    assert np.array_equal(Mask.empty(SIZE).array, np.zeros(SIZE))
    assert np.array_equal(Mask.full(SIZE).array, np.ones(SIZE))


@pytest.mark.parametrize("box", [(30, 20, 70, 50), (0, 0, 96, 72), (5, 6, 6, 7), (-9, 60, 12, 99)])
def test_box_is_a_slice(box):
    left, top, right, bottom = box
    expected = np.zeros(SIZE, bool)
    expected[max(top, 0) : bottom, max(left, 0) : right] = True
    assert np.array_equal(Mask.box(SIZE, box).array, expected)
    assert Mask.box(SIZE, box).bounding_box() == tuple(np.clip(box, 0, (96, 72, 96, 72)))


@pytest.mark.parametrize("box", [(10, 10, 50, 50), (3, 20, 91, 51), (40, 2, 47, 70)])
def test_ellipse_area_and_extent(box):
    left, top, right, bottom = box
    mask = Mask.ellipse(SIZE, box)
    assert mask.bounding_box() == box
    a, b = (right - left) / 2, (bottom - top) / 2
    # each pixel that is wrong touches the outline, and a convex outline touches at most 4 (a + b) + 4 of them
    assert abs(mask.hole.sum() - np.pi * a * b) <= 4 * (a + b) + 4
    radius = np.hypot((COLUMNS + 0.5 - left - a) / a, (ROWS + 0.5 - top - b) / b)
    assert mask.hole[radius < 1 - 1 / min(a, b)].all()
    assert not mask.hole[radius > 1 + 1 / min(a, b)].any()
    assert np.array_equal(mask.hole[top:bottom, left:right], mask.hole[top:bottom, left:right][::-1, ::-1])


OUTLINES = {
    "triangle": [(10, 5), (80, 20), (40, 66)],
    "star": [(48, 4), (60, 66), (8, 28), (88, 28), (36, 66)],
    "fractional": [(10.3, 5.8), (70.9, 9.1), (60.2, 60.7), (30.5, 33.3), (12.1, 55.4)],
    "partly outside": [(-30, 30), (50, -20), (150, 90), (20, 60)],
}


@pytest.mark.parametrize("outline", OUTLINES.values(), ids=OUTLINES)
def test_polygon_is_that_of_another_rasteriser_but_at_its_outline(outline):
    mask = Mask.polygon(SIZE, outline)
    expected = polygon2mask(SIZE, [(y, x) for x, y in outline])
    away = distance_to([*outline, outline[0]]) > 1
    assert away.mean() > 0.8
    assert np.array_equal(mask.hole[away], expected[away])
    assert mask.share > 0.1


@pytest.mark.parametrize("width", [1, 2, 3, 6, 9, 16])
def test_strokes_are_as_wide_as_asked_with_round_ends(width):
    strokes = [[(10, 10), (40, 50), (80, 20)], [(85, 60)]]
    mask = Mask.strokes(SIZE, strokes, width)
    distance = np.minimum(distance_to(strokes[0]), distance_to(strokes[1]))
    assert mask.hole[distance <= width / 2 - 1].all()
    assert not mask.hole[distance > width / 2 + 1].any()
    assert all(mask.hole[y, x] for stroke in strokes for x, y in stroke)
    dot = Mask.strokes(SIZE, [[(48, 36)]], width).hole.sum()
    assert abs(dot - np.pi * width**2 / 4) <= np.pi * width + 1


# picked from images


def test_from_alpha_either_way(tmp_path):
    alpha = np.where(HOLE, np.uint8(1), PHOTO[..., 0])
    image = Image.fromarray(np.dstack([PHOTO, alpha]))
    path = tmp_path / "image.png"
    image.save(path)
    for source in (image, path):
        assert Mask.from_alpha(source, opaque=True) == Mask(alpha / np.float32(255))
        assert Mask.from_alpha(source) == ~Mask.from_alpha(source, opaque=True)
    barely = Image.fromarray(np.dstack([PHOTO, 255 - HOLE.astype(np.uint8)]))
    assert Mask.from_alpha(barely).share == 0
    refused(MaskError, "MASK_NO_ALPHA", lambda: Mask.from_alpha(PHOTO))


@pytest.mark.parametrize("color", ["magenta", "#ff00ff", (255, 0, 255), np.array([255, 0, 255])])
def test_from_color(color):
    image = np.where(HOLE[..., None], np.uint8((255, 0, 255)), np.uint8((255, 40, 255)))
    image[20, 30] = (231, 24, 231)
    image[20, 31] = (230, 24, 231)
    expected = HOLE.copy()
    expected[20, 31] = False
    assert np.array_equal(Mask.from_color(image, color).hole, expected)
    assert np.array_equal(Mask.from_color(image, color, tolerance=25).hole, HOLE)
    assert Mask.from_color(image, color, tolerance=40).share == 1


def test_from_luminance():
    luma = PHOTO @ np.array([0.299, 0.587, 0.114]) / 255
    mask = Mask.from_luminance(PHOTO, 0.25, 0.75)
    clear = (np.abs(luma - 0.25) > 1 / 255) & (np.abs(luma - 0.75) > 1 / 255)
    assert np.array_equal(mask.hole[clear], ((luma >= 0.25) & (luma <= 0.75))[clear])
    grey = np.repeat(np.tile(np.arange(96, dtype=np.uint8) + 80, (72, 1))[..., None], 3, axis=2)
    assert np.array_equal(Mask.from_luminance(grey).hole, grey[..., 0] >= 128)


# picked from label maps


def label_forms(tmp_path):
    ids = np.array([[0, 0, 7], [0, 2, 2]])
    palette = Image.fromarray(ids.astype(np.uint8)).convert("P")
    palette.putdata(ids.ravel().tolist())
    png, text, table = tmp_path / "ids.png", tmp_path / "ids.txt", tmp_path / "ids.csv"
    palette.save(png)
    text.write_text(LAYOUT)
    table.write_text("0,0,7\n0,2,2\n")
    arrays = [ids, ids.astype(np.uint8), torch.from_numpy(ids)]
    images = [palette, Image.fromarray(ids.astype(np.uint8)), Image.fromarray(ids.astype(np.int32))]
    images += [Image.fromarray(ids.astype(np.uint16)), png, str(png)]
    return [*arrays, *images, text, str(table), LAYOUT, "0, 0, 7\n0, 2, 2", "\n0\t0\t7\r\n0 2 2\n\n"]


def test_from_labels_in_every_form(tmp_path):
    for labels in label_forms(tmp_path):
        assert Mask.from_labels(labels, 7).array.tolist() == [[0, 0, 1], [0, 0, 0]]
        assert Mask.from_labels(labels, [2, 7]).array.tolist() == [[0, 0, 1], [0, 1, 1]]
        assert Mask.from_labels(labels, {0}) == ~Mask.from_labels(labels, (2, 7))


def test_from_labels_scaled_by_nearest_pixels():
    mask = Mask.from_labels(LAYOUT, 2, size=(64, 96))
    assert np.array_equal(mask.array, np.kron([[0, 0, 0], [0, 1, 1]], np.ones((32, 32))))


def test_unknown_label_lists_those_that_occur(tmp_path):
    for labels in label_forms(tmp_path):
        refused(MaskError, "MASK_UNKNOWN_LABEL", lambda labels=labels: Mask.from_labels(labels, [2, 3]), "3", "0, 2, 7")
    many = np.arange(400).reshape(20, 20)
    error = refused(MaskError, "MASK_UNKNOWN_LABEL", lambda: Mask.from_labels(many, -1))
    assert error.expected.endswith("18, 19, ...")


# segmentation: what is passed on


def test_segmentation_is_passed_the_pixels_and_returned_as_a_mask():
    image = np.full((*SIZE, 3), 30, np.uint8)
    image[HOLE] = (200, 180, 40)
    clear = Image.fromarray(np.dstack([image, np.full(SIZE, 255, np.uint8)]))
    keep, repaint = Mask.box(SIZE, (0, 0, 96, 8)), Mask.box(SIZE, (45, 30, 50, 35))
    assert Mask.flood(clear, (40, 30)) == Mask(HOLE)
    assert Mask.region(image, (40, 30), sigma=0) == Mask(HOLE)
    assert Mask.grabcut(clear, box=(20, 10, 80, 60)) == Mask(HOLE)
    assert Mask.grabcut(image, keep=keep, repaint=repaint.to_pil()) == Mask(HOLE)
    refused(MaskError, "MASK_SIZE", lambda: Mask.grabcut(image, repaint=Mask.full((96, 72))), "repaint")


def test_models_are_passed_the_pixels_and_every_argument(monkeypatch):
    from sdinpaint.masks import prompting

    calls = []
    for name in ("sam", "clipseg"):
        monkeypatch.setattr(prompting, name, lambda *given: calls.append(given) or HOLE)
    mask = Mask.sam(PHOTO, "a folder", points=[(1, 2)], keep_points=[(3, 4)], box=(5, 6, 7, 8), threshold=0.25)
    assert mask == Mask(HOLE)
    assert Mask.clipseg(Image.fromarray(PHOTO), "a dog", "another", threshold=0.75) == Mask(HOLE)
    assert [rest for _, *rest in calls] == [
        ["a folder", [(1, 2)], [(3, 4)], (5, 6, 7, 8), 0.25, None],
        ["a dog", "another", 0.75, None],
    ]
    assert all(np.array_equal(rgb, PHOTO) for rgb, *_ in calls)


def test_report_is_of_this_mask():
    assert Mask(HOLE).report("nearest").share == HOLE.mean()
    assert Mask(HOLE).report("nearest").cover == "nearest"
    assert (~Mask(HOLE)).report().inverted


# what is refused

NAN, INF = float("nan"), float("inf")
SQUARE = [(10, 10), (20, 10), (20, 20)]
BAD = {
    "NaN": (MaskError, "MASK_BAD_VALUES", lambda: Mask(np.full(SIZE, NAN))),
    "above 1": (MaskError, "MASK_BAD_VALUES", lambda: Mask(np.full(SIZE, 1.5))),
    "below 0": (MaskError, "MASK_BAD_VALUES", lambda: Mask(np.full(SIZE, -0.5))),
    "three different channels": (MaskError, "MASK_COLOURED", lambda: Mask(PHOTO)),
    "three float channels": (MaskError, "MASK_BAD_SHAPE", lambda: Mask(PHOTO / 255)),
    "a number": (MaskError, "MASK_TYPE", lambda: Mask(3)),
    "no pixels": (MaskError, "MASK_BAD_SHAPE", lambda: Mask(np.zeros((0, 5)))),
    "size of one number": (MaskError, "MASK_BAD_SIZE", lambda: Mask.full(64)),
    "size 0": (MaskError, "MASK_BAD_SIZE", lambda: Mask.empty((0, 64))),
    "size NaN": (MaskError, "MASK_BAD_SIZE", lambda: Mask.empty((NAN, 64))),
    "half a pixel": (MaskError, "MASK_BAD_SIZE", lambda: Mask.empty((64, 64.5))),
    "size beyond memory": (MaskError, "MASK_BAD_SIZE", lambda: Mask.empty((10**6, 10**6))),
    "box upside down": (MaskError, "MASK_BOX", lambda: Mask.box(SIZE, (10, 50, 40, 20))),
    "box mirrored": (MaskError, "MASK_BOX", lambda: Mask.ellipse(SIZE, (40, 20, 10, 50))),
    "box without pixels": (MaskError, "MASK_BOX", lambda: Mask.box(SIZE, (10, 20, 10, 50))),
    "box of three": (MaskError, "MASK_BOX", lambda: Mask.box(SIZE, (10, 20, 50))),
    "box of NaN": (MaskError, "MASK_BOX", lambda: Mask.box(SIZE, (10, 20, NAN, 50))),
    "box of fractions": (MaskError, "MASK_BOX", lambda: Mask.box(SIZE, (10, 20, 30.5, 50))),
    "box of text": (MaskError, "MASK_BOX", lambda: Mask.box(SIZE, "all of it")),
    "box outside": (MaskError, "MASK_OUTSIDE", lambda: Mask.box(SIZE, (96, 0, 120, 20))),
    "box left of it": (MaskError, "MASK_OUTSIDE", lambda: Mask.box(SIZE, (-20, 0, 0, 20))),
    "ellipse outside": (MaskError, "MASK_OUTSIDE", lambda: Mask.ellipse(SIZE, (-20, -20, 1, 1))),
    "polygon outside": (MaskError, "MASK_OUTSIDE", lambda: Mask.polygon(SIZE, [(x + 100, y) for x, y in SQUARE])),
    "polygon far outside": (MaskError, "MASK_POINTS", lambda: Mask.polygon(SIZE, [*SQUARE, (2 * FARTHEST, 0)])),
    "polygon of nothing": (MaskError, "MASK_POINTS", lambda: Mask.polygon(SIZE, [])),
    "polygon of two points": (MaskError, "MASK_POINTS", lambda: Mask.polygon(SIZE, SQUARE[:2])),
    "polygon with NaN": (MaskError, "MASK_POINTS", lambda: Mask.polygon(SIZE, [*SQUARE, (NAN, 0)])),
    "polygon of triples": (MaskError, "MASK_POINTS", lambda: Mask.polygon(SIZE, [(1, 2, 3)] * 3)),
    "ragged polygon": (MaskError, "MASK_POINTS", lambda: Mask.polygon(SIZE, [(1, 2), (3,), (4, 5)])),
    "no strokes": (MaskError, "MASK_OUTSIDE", lambda: Mask.strokes(SIZE, [], 4)),
    "stroke without points": (MaskError, "MASK_POINTS", lambda: Mask.strokes(SIZE, [[]], 4)),
    "one stroke for many": (MaskError, "MASK_POINTS", lambda: Mask.strokes(SIZE, SQUARE, 4)),
    "strokes outside": (MaskError, "MASK_OUTSIDE", lambda: Mask.strokes(SIZE, [[(-20, 5)]], 4)),
    "number of strokes": (MaskError, "MASK_POINTS", lambda: Mask.strokes(SIZE, 3, 4)),
    "width 0": (SettingError, "SETTING_WIDTH", lambda: Mask.strokes(SIZE, [SQUARE], 0)),
    "width of fractions": (SettingError, "SETTING_WIDTH", lambda: Mask.strokes(SIZE, [SQUARE], 2.5)),
    "width NaN": (SettingError, "SETTING_WIDTH", lambda: Mask.strokes(SIZE, [SQUARE], NAN)),
    "unknown color": (SettingError, "SETTING_COLOR", lambda: Mask.from_color(PHOTO, "blurple")),
    "color of two": (SettingError, "SETTING_COLOR", lambda: Mask.from_color(PHOTO, (1, 2))),
    "color above 255": (SettingError, "SETTING_COLOR", lambda: Mask.from_color(PHOTO, (1, 2, 256))),
    "color of shares": (SettingError, "SETTING_COLOR", lambda: Mask.from_color(PHOTO, (0.5, 0.5, 1.0))),
    "a number as color": (SettingError, "SETTING_COLOR", lambda: Mask.from_color(PHOTO, 255)),
    "tolerance": (SettingError, "SETTING_TOLERANCE", lambda: Mask.from_color(PHOTO, "red", -1)),
    "luma of 0..255": (SettingError, "SETTING_HIGH", lambda: Mask.from_luminance(PHOTO, 0, 255)),
    "low above high": (SettingError, "SETTING_LOW", lambda: Mask.from_luminance(PHOTO, 0.8, 0.2)),
    "colours as labels": (MaskError, "MASK_LABELS", lambda: Mask.from_labels(Image.fromarray(PHOTO), 1)),
    "colour array as labels": (MaskError, "MASK_LABELS", lambda: Mask.from_labels(PHOTO, 1)),
    "fractions as labels": (MaskError, "MASK_LABELS", lambda: Mask.from_labels(np.zeros(SIZE), 0)),
    "words as labels": (MaskError, "MASK_LABELS", lambda: Mask.from_labels("sky sky\nsea sea\n", 1)),
    "ragged layout": (MaskError, "MASK_LABELS", lambda: Mask.from_labels("1 2\n3\n", 1)),
    "long layout": (MaskError, "MASK_LABELS", lambda: Mask.from_labels("1 2\n" * 8_500_000, 1)),
    "no layout file": (MaskError, "MASK_LABELS", lambda: Mask.from_labels("none.csv", 1)),
    "no label image": (ImageError, "IMAGE_NOT_FOUND", lambda: Mask.from_labels("none.png", 1)),
    "no ids": (MaskError, "MASK_UNKNOWN_LABEL", lambda: Mask.from_labels(LAYOUT, [])),
    "ids as text": (MaskError, "MASK_UNKNOWN_LABEL", lambda: Mask.from_labels(LAYOUT, "7")),
    "labels to no size": (MaskError, "MASK_BAD_SIZE", lambda: Mask.from_labels(LAYOUT, 7, size=(0, 1))),
    "point outside": (MaskError, "MASK_POINTS", lambda: Mask.flood(PHOTO, (96, 0))),
}


@pytest.mark.parametrize(("kind", "code", "call"), BAD.values(), ids=BAD)
def test_bad_input(kind, code, call):
    refused(kind, code, call)


def test_a_label_map_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "labels.txt")
    refused(MaskError, "MASK_LABELS", lambda: Mask.from_labels(tmp_path / "labels.txt", 1), "a pipe")


def test_far_coordinates_are_drawn_right():
    far = [(0, 0), (FARTHEST, 0), (FARTHEST, FARTHEST)]
    assert np.array_equal(Mask.polygon(SIZE, far).hole, COLUMNS >= ROWS)
    assert Mask.ellipse(SIZE, (-FARTHEST, -FARTHEST, FARTHEST, FARTHEST)).share == 1
    assert Mask.box(SIZE, (-FARTHEST, -FARTHEST, FARTHEST, FARTHEST)).share == 1
    assert Mask.strokes(SIZE, [[(-FARTHEST, 36), (FARTHEST, 36)]], 5).hole.sum() == 5 * 96


def test_inverted_images_make_inverted_masks():
    grey = Image.fromarray(PHOTO[..., 0]).point(lambda level: 255 * (level > 127))
    assert Mask(ImageOps.invert(grey)) == ~Mask(grey)
