"""Random holes: their kinds, that they are never empty, and that they stay the same."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from refusals import refused

from sdinpaint.errors import SettingError
from sdinpaint.masks.generator import KINDS, random_hole

EXPECTED = {
    "thin": "6e21c2eb2c32917b",
    "thick": "1a89feeea10f0cb2",
    "box": "db5cf7b6163e3bce",
    "ellipse": "48860406c2aed1b7",
    "half": "2d45b9fa46998cb5",
    "full": "9f56cda75fefeab9",
    "scattered": "ed9625ca81e01a71",
}


def holes(kind, count, size):
    return [random_hole(np.random.default_rng(seed), size, kind) for seed in range(count)]


def fingerprint(hole):
    return hashlib.sha256(np.packbits(hole).tobytes()).hexdigest()[:16]


def test_every_kind_has_an_expected_hole():
    assert set(EXPECTED) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_hole_it_always_gave(kind):
    hole = random_hole(np.random.default_rng(7), 64, kind)
    assert fingerprint(hole) == EXPECTED[kind]
    if kind != "full":
        assert fingerprint(random_hole(np.random.default_rng(8), 64, kind)) != EXPECTED[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 9, 96])
def test_holes_are_never_empty(kind, size):
    for hole in holes(kind, 100, size):
        assert hole.shape == (size, size)
        assert hole.dtype == np.bool_
        assert hole.any()
        assert hole.flags.writeable


@pytest.mark.parametrize("kind", KINDS)
def test_the_covered_share_hardly_depends_on_the_size(kind):
    small, large = (np.mean([hole.mean() for hole in holes(kind, 60, size)]) for size in (128, 256))
    if kind == "thin":
        assert small < large * 2.2
    else:
        assert small == pytest.approx(large, rel=0.05)


def test_thin_strokes_are_1_to_7_pixels_at_512():
    widths = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        hole = random_hole(np.random.default_rng(seed), 512, "thin")
        points = 512 * rng.uniform(0.05, 0.95, (rng.integers(3, 6), 2))
        widths.append(hole.sum() / np.hypot(*np.diff(points, axis=0).T).sum())
    assert {round(width) for width in widths} == {1, 2, 3, 4, 5, 6, 7}


def test_thin_strokes_are_at_least_a_pixel_and_never_torn():
    from scipy import ndimage

    for hole in holes("thin", 40, 64):
        assert ndimage.label(hole, structure=np.ones((3, 3)))[1] == 1


def test_scattered_pieces_stay_apart():
    from scipy import ndimage

    counts = {ndimage.label(hole, structure=np.ones((3, 3)))[1] for hole in holes("scattered", 60, 128)}
    assert counts == {4, 5, 6, 7, 8, 9}


def test_a_half_reaches_three_borders_and_full_is_full():
    for hole in holes("half", 40, 64):
        assert sum(edge.all() for edge in (hole[0], hole[-1], hole[:, 0], hole[:, -1])) == 1
        assert sum(edge.any() for edge in (hole[0], hole[-1], hole[:, 0], hole[:, -1])) == 3
    assert holes("full", 1, 16)[0].all()


def test_refusals():
    rng = np.random.default_rng(0)
    refused(SettingError, "SETTING_KIND", lambda: random_hole(rng, 64, "blob"), "'blob'", *KINDS)
    refused(SettingError, "SETTING_SIZE", lambda: random_hole(rng, 7, "box"), "at least 8")
