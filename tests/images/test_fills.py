"""Tests of the fills of a hole: known pixels stay, and nothing of what is to be removed shapes the filling."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdinpaint.errors import SettingError
from sdinpaint.images import fills
from sdinpaint.images.fills import FILLS, NEUTRAL, fill_hole, spread
from sdinpaint.images.input_image import to_tensor, to_uint8

FROM_KNOWN = ("blur", "edge", "telea")
SIZE = (37, 53)


def random_image(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def box(top: int, bottom: int, left: int, right: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    hole = np.zeros(size, bool)
    hole[top:bottom, left:right] = True
    return hole


HOLES = {
    "inside": box(10, 30, 11, 40),
    "corner": box(0, 20, 0, 25),
    "right and bottom": box(15, 37, 30, 53),
    "all but a column": box(0, 37, 1, 53),
    "one pixel": box(5, 6, 7, 8),
    "two": box(3, 9, 3, 9) | box(20, 33, 25, 50),
    "scattered": np.random.default_rng(1).random(SIZE) < 0.4,
}
each_hole = pytest.mark.parametrize("hole", HOLES.values(), ids=HOLES)
each_from_known = pytest.mark.parametrize("fill", FROM_KNOWN)


@each_hole
@pytest.mark.parametrize("fill", FILLS)
def test_known_pixels_stay_and_the_input_is_not_changed(fill, hole):
    rgb = random_image()
    filled = fill_hole(rgb, hole, fill)
    assert filled.dtype == np.uint8
    assert np.array_equal(filled[~hole], rgb[~hole])
    assert np.array_equal(rgb, random_image())
    assert not np.shares_memory(filled, rgb)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 1000), st.sampled_from(FILLS))
def test_any_size_and_any_hole(height, width, share, seed, fill):
    hole = np.random.default_rng(seed).random((height, width)) < share
    rgb = random_image(seed, (height, width))
    filled = fill_hole(rgb, hole, fill)
    assert filled.shape == rgb.shape
    assert np.array_equal(filled[~hole], rgb[~hole])


@each_hole
@each_from_known
def test_what_is_removed_has_no_part(fill, hole):
    rgb, other = random_image(), random_image()
    other[hole] = 255 - other[hole]
    assert np.array_equal(fill_hole(rgb, hole, fill), fill_hole(other, hole, fill))


def test_a_leak_would_be_seen(sabotage):
    """The test above fails for a filling that looks at the hole."""
    sabotage(fills, "spread", lambda values, known: values)
    with pytest.raises(AssertionError):
        test_what_is_removed_has_no_part("blur", HOLES["inside"])


@each_hole
@pytest.mark.parametrize(("fill", "tolerance"), [("blur", 0), ("edge", 0), ("telea", 12)])
@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (7, 130, 251)])
def test_constant_surroundings_go_on(fill, tolerance, hole, color):
    """OpenCV paints each pixel from neighbours that it has rounded, which adds up."""
    rgb = np.where(hole[..., None], random_image(), np.uint8(color))
    assert np.abs(fill_hole(rgb, hole, fill) - np.array(color)).max() <= tolerance


@each_from_known
def test_fillings_stay_between_the_known_levels(fill):
    hole = HOLES["inside"]
    rgb = np.where(hole[..., None], np.uint8(0), random_image() // 4 + 90)
    filled = fill_hole(rgb, hole, fill)
    assert filled.min() >= rgb[~hole].min()
    assert filled.max() <= rgb[~hole].max()


@pytest.mark.parametrize("fill", ["original", "neutral", "noise"])
def test_fillings_that_look_at_nothing(fill):
    rgb, hole = random_image(), HOLES["two"]
    expected = rgb[hole] if fill == "original" else NEUTRAL
    assert (fill_hole(rgb, hole, fill)[hole] == expected).all()


def test_neutral_is_what_the_models_see_as_zero():
    level = np.full((8, 8, 3), NEUTRAL, np.uint8)
    assert np.array_equal(to_uint8(0 * to_tensor(level))[0], level)
    assert to_tensor(level).abs().max() < to_tensor(level + 1).abs().max()


@pytest.mark.parametrize("fill", FILLS)
def test_everything_and_nothing(fill):
    rgb = random_image()
    assert np.array_equal(fill_hole(rgb, np.zeros(SIZE, bool), fill), rgb)
    whole = fill_hole(rgb, np.ones(SIZE, bool), fill)
    assert np.array_equal(whole, rgb if fill == "original" else np.full_like(rgb, NEUTRAL))


@each_hole
def test_edge_is_the_nearest_known_pixel(hole):
    """A rare colour for each pixel says where the filling came from; ties may go to either."""
    rows, columns = np.indices(SIZE)
    filled = fill_hole(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8), hole, "edge").astype(int)
    known = np.argwhere(~hole)
    for row, column in np.argwhere(hole):
        nearest = ((known - (row, column)) ** 2).sum(axis=1).min()
        source = filled[row, column, :2]
        assert not hole[tuple(source)]
        assert ((source - (row, column)) ** 2).sum() == nearest


@pytest.mark.parametrize("name", ["inside", "one pixel", "two", "right and bottom"])
def test_telea_is_that_of_opencv(name):
    rgb, hole = random_image(), HOLES[name]
    peer = cv2.inpaint(rgb, hole.astype(np.uint8) * 255, 3, cv2.INPAINT_TELEA)
    assert np.array_equal(fill_hole(rgb, hole, "telea")[hole], peer[hole])


def test_views_that_opencv_does_not_take():
    rgb, hole = random_image()[::-1, ::-1], HOLES["inside"][::-1, ::-1]
    for fill in FILLS:
        filled = fill_hole(rgb, hole, fill)
        assert np.array_equal(filled, fill_hole(rgb.copy(), hole.copy(), fill))


def test_blur_is_smooth_and_follows_its_surroundings():
    """Dark on the left, light on the right: so is the filling, without a step."""
    ramp = np.empty((64, 64, 3), np.uint8)
    ramp[:] = np.linspace(20, 230, 64)[:, None]
    hole = box(12, 52, 12, 52, (64, 64))
    filled = fill_hole(ramp, hole, "blur").astype(int)
    assert np.abs(np.diff(filled, axis=1)).max() <= 12
    middle = filled[32, 12:52, 0]
    assert (np.diff(middle) >= 0).all()
    assert middle[-1] - middle[0] > 100


def test_spread_keeps_what_is_known_and_takes_any_scale():
    values = np.random.default_rng(0).normal(0, 1000, (*SIZE, 2))
    known = ~HOLES["scattered"]
    filled = spread(values, known)
    assert np.array_equal(filled[known], values[known].astype(np.float32))
    values[~known] = np.nan
    assert np.array_equal(filled, spread(values, known))


@pytest.mark.parametrize(("fill", "hint"), [("tela", "telea"), ("Blur", "blur"), ("xyz", ""), (None, ""), (3, "")])
def test_unknown_fill_lists_the_known(fill, hint):
    with pytest.raises(SettingError) as caught:
        fill_hole(random_image(), HOLES["inside"], fill)
    assert caught.value.code == "SETTING_FILL"
    assert repr(fill) in caught.value.found
    assert all(name in caught.value.expected for name in FILLS)
    assert caught.value.hint == (f"did you mean {hint!r}?" if hint else "")


@pytest.mark.parametrize(("fill", "module"), [("edge", "scipy.ndimage"), ("telea", "cv2")])
def test_fills_that_need_the_extra_say_so(fill, module, without):
    without(module)
    with pytest.raises(SettingError, match=r"sdinpaint\[mask\]") as caught:
        fill_hole(random_image(), HOLES["inside"], fill)
    assert caught.value.code == "SETTING_EXTRA"
    for core in ("original", "noise", "blur", "neutral"):
        fill_hole(random_image(), HOLES["inside"], core)
