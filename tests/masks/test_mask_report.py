"""The report names what would go wrong, agrees with what the run does, and is silent about good masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from sdinpaint.errors import MaskError, SettingError
from sdinpaint.images.input_image import pad_to_multiple
from sdinpaint.masks import Mask, to_latent
from sdinpaint.masks import report as report_on
from sdinpaint.masks.generator import random_hole


def square(side, top=20, left=20, size=(64, 64)):
    mask = np.zeros(size, np.float32)
    mask[top : top + side, left : left + side] = 1
    return mask


# measures


def test_a_box():
    told = report_on(square(16, 8, 24, (64, 80)))
    assert told.size == (64, 80)
    assert told.share == 256 / 5120
    assert told.bounds == (24, 8, 40, 24)
    assert (told.regions, told.specks, told.speck_pixels) == (1, 0, 0)
    assert told.thin_share == told.lost_share == told.lost_share_nearest == told.grown_share_max == told.faint == 0
    assert (told.empty, told.full, told.inverted) == (False, False, False)
    assert told.warnings == ()


def test_every_form_of_a_mask():
    hole = square(16) > 0
    for mask in (hole, hole.astype(np.float64), torch.from_numpy(hole).float(), Mask(hole)):
        assert report_on(mask) == report_on(square(16))
    assert Mask(hole).report("nearest") == report_on(hole, "nearest")


@pytest.mark.parametrize(("side", "kept"), [(2, 4), (4, 16), (6, 36), (7, 49), (8, 64)])
def test_squares_lost_between_cells_over_all_positions(side, kept):
    """Nearest keeps a square only if it holds a cell's first pixel: in side^2 of the 64 positions on the lattice."""
    nearest = [report_on(square(side, 16 + i // 8, 16 + i % 8), "nearest") for i in range(64)]
    assert sum(told.lost_share < 1 for told in nearest) == kept
    assert all(told.lost_share == told.lost_share_nearest for told in nearest)
    most = [report_on(square(side, 16 + i // 8, 16 + i % 8), "max") for i in range(64)]
    assert {told.lost_share for told in most} == {0}
    assert [told.lost_share_nearest for told in most] == [told.lost_share for told in nearest]


def test_what_max_adds_is_counted():
    told = report_on(square(8, 20, 20))
    assert told.grown_share_max == 3  # four cells are touched, of which it fills one
    assert told.lost_share_nearest == 0.75  # only the cell from 24, 24 on has its first pixel in the square


@given(st.integers(0, 2**32 - 1), st.integers(8, 40), st.integers(8, 40))
@settings(max_examples=40, deadline=None)
def test_the_report_and_the_latent_mask_of_a_run_agree(seed, height, width):
    hole = np.random.default_rng(seed).random((height, width)) < 0.05
    padded, crop = pad_to_multiple(torch.from_numpy(hole).float()[None, None])
    told = {}
    for cover in ("nearest", "max"):
        covered = to_latent(padded, cover)[0, 0].numpy().repeat(8, 0).repeat(8, 1)[crop] > 0
        told[cover] = report_on(hole, cover)
        assert told[cover].lost_share == pytest.approx((hole & ~covered).sum() / max(hole.sum(), 1))
    assert told["max"].grown_share_max == pytest.approx((covered & ~hole).sum() / max(hole.sum(), 1))
    assert told["max"].lost_share == 0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_thin_is_what_a_square_cannot_paint(seed):
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    hole = random_hole(rng, 64, "thick") | random_hole(rng, 64, "thin")
    opened = ndimage.binary_opening(hole, np.ones((8, 8)))
    assert report_on(hole).thin_share == pytest.approx((hole & ~opened).sum() / hole.sum())


def test_thin_strokes_are_told_from_thick_ones():
    line = np.zeros((64, 64), bool)
    line[:, 20:27] = True
    assert report_on(line).thin_share == 1
    line[:, 27] = True
    assert report_on(line).thin_share == 0


def test_regions_touch_at_corners_and_specks_are_below_a_cell():
    mask = square(8, 0, 0) + square(8, 8, 8) + square(7, 40, 8) + square(1, 50, 50)
    told = report_on(mask)
    assert (told.regions, told.specks, told.speck_pixels) == (3, 2, 50)


def test_faint_pixels_are_above_zero_and_below_half():
    told = report_on(square(16) * 0.5 + square(4, 0, 0) * 0.49)
    assert told.share == 256 / 4096
    assert told.faint == 16 / 4096
    assert told.bounds == (20, 20, 36, 36)


def test_empty_and_full():
    empty, full = report_on(np.zeros((10, 20))), report_on(np.ones((10, 20)))
    assert empty.empty
    assert empty.bounds is None
    assert full.full
    assert full.bounds == (0, 0, 20, 10)
    assert not full.warnings


# warnings


@pytest.mark.parametrize("kind", ["thick", "box", "ellipse", "half", "full", "scattered"])
@pytest.mark.parametrize(("size", "cover"), [(128, "max"), (256, "max"), (256, "nearest"), (512, "nearest")])
def test_no_warning_about_good_masks(kind, size, cover):
    for seed in range(12):
        assert report_on(random_hole(np.random.default_rng(seed), size, kind), cover).warnings == ()


def test_no_warning_about_soft_masks():
    assert Mask(square(40, 100, 100, (256, 256))).feather(24).report().warnings == ()


@pytest.mark.parametrize(
    ("mask", "cover", "said"),
    [
        (np.zeros((64, 64)), "max", ["nothing is repainted: it is black; "]),
        (square(16) * 0.4, "max", ["nothing is repainted: 6.2% of the pixels are grey, but none is 0.5 or more"]),
        (1 - square(16), "max", ["94% is repainted, up to all borders; if that was meant to be kept, use ~mask"]),
        (square(4), "max", ["100% of the mask is thinner than 8 pixels; widen it: Mask.grow(4)"]),
        (square(4), "nearest", ['100% of the mask is lost between latent cells; use cover="max"', "Mask.grow(4)"]),
        (square(30) + square(2, 0, 0), "max", ["1 of 2 regions are specks; remove them: Mask.drop_specks()"]),
    ],
)
def test_a_warning_names_its_remedy(mask, cover, said):
    warnings = report_on(mask, cover).warnings
    assert len(warnings) == len(said)
    for warning, words in zip(warnings, said, strict=True):
        assert words in warning
        assert "\n" not in warning


@pytest.mark.parametrize(
    ("mask", "remedy"),
    [
        (1 - square(16), lambda mask: ~mask),
        (square(4), lambda mask: mask.grow(4)),
        (square(30) + square(2, 0, 0), lambda mask: mask.drop_specks()),
    ],
)
def test_the_remedies_work(mask, remedy):
    assert Mask(mask).report().warnings
    assert not remedy(Mask(mask)).report().warnings


def test_thin_strokes_are_warned_about():
    for seed in range(10):
        told = report_on(random_hole(np.random.default_rng(seed), 512, "thin"))
        assert any("Mask.grow(4)" in warning for warning in told.warnings)


# forms of the report


def test_text_and_json():
    told = report_on(square(4) + square(30, 30, 30), "nearest")
    text = str(told)
    assert "64 rows, 64 columns" in text
    assert 'this run uses "nearest"' in text
    assert "2, of which 1 below 64 pixels (16 pixels in all)" in text
    assert text.count("warning: ") == len(told.warnings) == 1
    values = json.loads(json.dumps(told.to_json()))
    assert values["bounds"] == [20, 20, 60, 60]
    assert values["size"] == [64, 64]
    assert values["warnings"] == list(told.warnings)
    assert values["empty"] is False
    assert report_on(np.zeros((8, 8))).to_json()["bounds"] is None


def test_without_opencv_all_but_the_regions_is_told(without):
    mask = square(30) + square(2, 0, 0)
    told = report_on(mask).to_json()
    without("cv2")
    less = report_on(mask)
    assert (less.regions, less.specks, less.speck_pixels) == (None, None, None)
    assert "pip install 'sdinpaint[mask]'" in str(less)
    assert less.warnings == ()
    counted = {"regions", "specks", "speck_pixels", "warnings"}
    assert {key for key, value in less.to_json().items() if value != told[key]} == counted


def test_refusals():
    refused(MaskError, "MASK_BAD_SHAPE", lambda: report_on(np.zeros((3, 8, 8))), "(3, 8, 8)")
    refused(MaskError, "MASK_BAD_SHAPE", lambda: report_on(np.zeros((0, 8))))
    refused(SettingError, "SETTING_COVER", lambda: report_on(np.zeros((8, 8)), "Max"), "'Max'", "nearest, max")
