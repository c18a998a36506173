"""Extending: the canvas, its mask, any final size, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import INF, NAN, refused

from sdinpaint.errors import ImageError, SettingError
from sdinpaint.images import canvas
from sdinpaint.images.canvas import ANCHORS, EXTENDING_FILLS, OVERLAP, extend, sides_for
from sdinpaint.images.files import MAX_PIXELS
from sdinpaint.images.fills import NEUTRAL
from sdinpaint.images.input_image import InputImage

SIDES = ("left", "right", "top", "bottom")


def random_image(height=40, width=60, *, alpha=False, icc_profile=None):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    opacity = rng.integers(0, 256, (height, width), dtype=np.uint8) if alpha else None
    return InputImage(rgb=rgb, alpha=opacity, icc_profile=icc_profile)


# the canvas


@pytest.mark.parametrize("fill", EXTENDING_FILLS)
def test_the_old_image_is_on_the_canvas_bit_for_bit(fill):
    old = random_image(alpha=True, icc_profile=b"profile")
    new, mask = extend(old, left=5, right=6, top=7, bottom=8, overlap=3, fill=fill)
    assert new.size == mask.shape == (40 + 7 + 8, 60 + 5 + 6)
    assert np.array_equal(new.rgb[7:47, 5:65], old.rgb)
    assert np.array_equal(new.alpha[7:47, 5:65], old.alpha)
    assert new.icc_profile == b"profile"


def test_new_pixels_are_opaque():
    new, _ = extend(random_image(alpha=True), left=5, top=7)
    assert (new.alpha[:7] == 255).all()
    assert (new.alpha[:, :5] == 255).all()
    assert extend(random_image(), left=5)[0].alpha is None


@pytest.mark.parametrize("side", SIDES)
def test_the_mask_covers_the_new_pixels_and_the_overlap_of_that_side_alone(side):
    _, mask = extend(random_image(), **{side: 10}, overlap=4)
    expected = np.zeros_like(mask)
    rows = {"left": (slice(None), slice(14)), "top": (slice(14),)}
    rows |= {"right": (slice(None), slice(-14, None)), "bottom": (slice(-14, None),)}
    expected[rows[side]] = 1
    assert mask.dtype == np.float32
    assert np.array_equal(mask, expected)


def test_without_an_overlap_the_mask_is_what_is_new():
    new, mask = extend(random_image(), left=1, bottom=2, overlap=0)
    assert (mask == 0).sum() == 40 * 60
    assert (mask[:40, 1:] == 0).all()
    assert new.size == (42, 61)


def test_every_overlap_holds_a_whole_latent_cell():
    for width in range(40, 48):
        _, mask = extend(random_image(width=width), right=20)
        cells = mask[:, : mask.shape[1] // 8 * 8].reshape(40, -1, 8).all(axis=(0, 2))
        assert cells[: width // 8].any(), "a cell within the old image is painted"


def test_edges_and_reflections_go_on():
    old = random_image()
    edge, _ = extend(old, right=100, top=3, fill="edge")
    assert (edge.rgb[3:, 60:] == old.rgb[:, -1:]).all()
    assert (edge.rgb[:3, :60] == old.rgb[:1]).all()
    mirrored, _ = extend(old, left=100, fill="reflect")
    assert np.array_equal(mirrored.rgb[:, 41:101], old.rgb[:, ::-1])
    neutral, _ = extend(old, left=100, fill="neutral")
    assert (neutral.rgb[:, :100] == NEUTRAL).all()


def test_what_is_under_transparent_edges_is_not_spread():
    rgb = np.full((40, 60, 3), (255, 0, 0), dtype=np.uint8)
    alpha = np.zeros((40, 60), dtype=np.uint8)
    new, _ = extend(InputImage(rgb=rgb, alpha=alpha), right=10)
    assert (new.rgb[:, 60:] == 255).all(), "transparent is white, as a model is shown it"
    assert (new.rgb[:, :60] == (255, 0, 0)).all()


# any final size


@pytest.mark.parametrize(
    ("anchor", "expected"),
    [
        ("center", (5, 6, 10, 11)),
        ("left", (0, 11, 10, 11)),
        ("right", (11, 0, 10, 11)),
        ("top", (5, 6, 0, 21)),
        ("bottom", (5, 6, 21, 0)),
        ("top-left", (0, 11, 0, 21)),
        ("bottom-right", (11, 0, 21, 0)),
    ],
)
def test_sides_follow_from_the_final_size(anchor, expected):
    assert sides_for((40, 60), (61, 71), anchor) == dict(zip(SIDES, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 80), st.integers(0, 80), st.sampled_from(sorted(ANCHORS)))
def test_any_final_size_is_reached(down, across, anchor):
    final = 40 + down, 60 + across
    sides = sides_for((40, 60), final, anchor)
    assert all(side >= 0 for side in sides.values())
    if down or across:
        assert extend(random_image(), **sides, overlap=4)[0].size == final


# refused


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("value", [-1, 1.5, NAN, INF, True, "8", None, [8], 2**40])
def test_a_side_that_is_no_number_of_pixels_is_refused(side, value):
    refused(SettingError, f"SETTING_{side.upper()}", lambda: extend(random_image(), **{side: value}), side, repr(value))


def test_nothing_to_extend_is_refused():
    refused(SettingError, "SETTING_SIDES", lambda: extend(random_image()), *SIDES)
    refused(SettingError, "SETTING_SIDES", lambda: extend(random_image(), **sides_for((40, 60), (40, 60))))


@pytest.mark.parametrize("overlap", [-1, 0.5, NAN, False, "8", None])
def test_an_overlap_that_is_no_number_of_pixels_is_refused(overlap):
    refused(SettingError, "SETTING_OVERLAP", lambda: extend(random_image(), left=8, overlap=overlap), repr(overlap))


@pytest.mark.parametrize(
    ("sides", "overlap"), [({"left": 8}, 60), ({"left": 8, "right": 8}, 30), ({"top": 8}, 40), ({"bottom": 1}, 999)]
)
def test_an_overlap_that_leaves_nothing_is_refused_with_both_sizes(sides, overlap):
    refused(SettingError, "SETTING_OVERLAP", lambda: extend(random_image(), **sides, overlap=overlap), overlap, 40, 60)
    _, mask = extend(random_image(), **sides, overlap=min(overlap - 1, 39))
    assert (mask == 0).any()


def test_a_canvas_that_is_too_large_is_refused_before_it_is_made(forbid):
    forbid(canvas.np, "pad")
    right = MAX_PIXELS // 40
    refused(
        ImageError, "IMAGE_TOO_LARGE", lambda: extend(random_image(), right=min(right, 2**20), bottom=2**19), MAX_PIXELS
    )


def test_the_argument_that_makes_it_too_large_is_named():
    error = refused(
        ImageError, "IMAGE_TOO_LARGE", lambda: extend(random_image(), left=9, bottom=2**20, right=1000), 2**20
    )
    assert error.subject == "bottom"


@pytest.mark.parametrize("fill", ["telea", "", None, "Edge", ["edge"]])
def test_an_unknown_fill_is_refused_with_the_known(fill):
    refused(
        SettingError, "SETTING_FILL", lambda: extend(random_image(), left=8, fill=fill), repr(fill), *EXTENDING_FILLS
    )


@pytest.mark.parametrize("anchor", ["middle", "", None, "left-top", ["left"]])
def test_an_unknown_anchor_is_refused_with_the_known(anchor):
    refused(SettingError, "SETTING_ANCHOR", lambda: sides_for((40, 60), (80, 80), anchor), repr(anchor), *ANCHORS)


@pytest.mark.parametrize(
    "final", [(39, 80), (80, 59), (80,), (1, 2, 3), 80, "80x80", None, (80.5, 80), (-1, 80), (True, 80)]
)
def test_a_final_size_that_does_not_hold_the_image_is_refused(final):
    refused(SettingError, "SETTING_SIZE", lambda: sides_for((40, 60), final))


def test_the_default_overlap_is_refused_only_for_tiny_images():
    assert extend(random_image(height=OVERLAP + 1), top=8)[1].sum() == (8 + OVERLAP) * 60
    refused(SettingError, "SETTING_OVERLAP", lambda: extend(random_image(height=OVERLAP), top=8), OVERLAP)
