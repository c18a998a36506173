"""Metrics against other libraries, on images whose scores are known, and under changes that must not matter."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from sdinpaint import metrics
from sdinpaint.errors import ImageError, MaskError, SettingError
from sdinpaint.masks.generator import KINDS, random_hole

BASE, SHIFTED = (90, 120, 60), (95, 118, 70)
SHIFT = float(metrics.delta_e(metrics.to_lab(np.uint8(BASE)), metrics.to_lab(np.uint8(SHIFTED))))
EDGED = sorted(set(KINDS) - {"full"})


@pytest.fixture
def pair():
    """A random image and one like it."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (61, 80, 3), dtype=np.uint8)
    return image, np.clip(image + rng.integers(-30, 31, image.shape), 0, 255).astype(np.uint8)


def flat(size=(96, 96), colour=BASE):
    return np.full((*size, 3), colour, np.uint8)


def with_hole(image, hole, colour):
    return np.where(hole[..., None], np.uint8(colour), image)


def ramp(slope_x, slope_y, size=96):
    """Grey levels that rise evenly along rows and columns."""
    y, x = np.mgrid[:size, :size]
    return np.repeat((20 + slope_x * x + slope_y * y).astype(np.uint8)[..., None], 3, axis=2)


def textured(seed=1, size=96, contrast=40):
    from scipy import ndimage

    noise = np.random.default_rng(seed).normal(0, 1, (size, size, 3))
    smooth = ndimage.gaussian_filter(noise, (3, 3, 0))
    return np.clip(128 + contrast * smooth / smooth.std(), 0, 255).astype(np.uint8)


def hole_of(kind, seed=3, size=96):
    return random_hole(np.random.default_rng(seed), size, kind)


# colour


def test_lab_is_that_of_skimage(pair):
    from skimage import color

    every_grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    for image in (*pair, every_grey):
        np.testing.assert_allclose(metrics.to_lab(image), color.rgb2lab(image), atol=5e-4)
    ours, theirs = (metrics.delta_e(*map(to_lab, pair)) for to_lab in (metrics.to_lab, color.rgb2lab))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    np.testing.assert_allclose(ours, color.deltaE_cie76(*map(color.rgb2lab, pair)), atol=1e-3)


def test_lab_of_known_colours():
    lab = metrics.to_lab(np.uint8([[0, 0, 0], [255, 255, 255], [255, 0, 0], [119, 119, 119]]))
    np.testing.assert_allclose(lab, [[0, 0, 0], [100, 0, 0], [53.24, 80.09, 67.20], [50.03, 0, 0]], atol=0.02)


# likeness


def test_psnr_and_ssim_are_those_of_skimage(pair):
    from skimage import metrics as peer

    assert metrics.psnr(*pair) == pytest.approx(peer.peak_signal_noise_ratio(*pair), abs=1e-9)
    options = {"channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    images = [
        pair,
        (textured(1), textured(2)),
        (flat(), flat(colour=SHIFTED)),
        (pair[0] // 8 + 220, pair[1] // 8 + 220),
    ]
    for one, other in images:
        expected = peer.structural_similarity(one, other, data_range=255, **options)
        assert metrics.ssim(one, other) == pytest.approx(expected, abs=1e-4)


def test_ssim_is_that_of_torchmetrics(pair):
    """Their mean counts windows over the reflected border too: the map is compared, without the border."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    batches = (torch.from_numpy(one).permute(2, 0, 1)[None].double() for one in pair)
    _, windows = structural_similarity_index_measure(*batches, data_range=255.0, return_full_image=True)
    assert metrics.ssim(*pair) == pytest.approx(float(windows[..., 5:-5, 5:-5].mean()), abs=1e-4)


def test_masked_ssim_is_the_mean_of_skimages_map(pair):
    from skimage import metrics as peer

    hole = hole_of("ellipse")[:61, :80]
    options = {"channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, windows = peer.structural_similarity(*pair, data_range=255, full=True, **options)
    inner = slice(5, -5), slice(5, -5)
    assert metrics.ssim(*pair, hole) == pytest.approx(windows[inner][hole[inner]].mean(), abs=1e-4)


def test_a_mask_counts_its_pixels_alone(pair):
    hole = hole_of("box")[:61, :80]
    image = np.where(hole[..., None], *pair)
    assert metrics.psnr(image, pair[0], hole) == math.inf
    assert metrics.psnr(image, pair[0], ~hole) < 40
    error = (image[~hole].astype(float) - pair[0][~hole]) ** 2
    assert metrics.psnr(image, pair[0], ~hole) == pytest.approx(10 * np.log10(255**2 / error.mean()))
    everything = np.ones((61, 80), bool)
    for metric in (metrics.psnr, metrics.ssim):
        assert metric(*pair, everything) == metric(*pair)
        assert metric(pair[0], pair[0].copy()) == {"psnr": math.inf, "ssim": 1}[metric.__name__]


def test_an_empty_mask_is_named(pair):
    for metric in (metrics.psnr, metrics.ssim):
        refused(
            MaskError, "MASK_EMPTY", lambda metric=metric: metric(*pair, np.zeros((61, 80), bool)), "no pixel is True"
        )
    rim = np.ones((61, 80), bool)
    rim[5:-5, 5:-5] = False
    assert metrics.psnr(*pair, rim) > 0
    refused(MaskError, "MASK_EMPTY", lambda: metrics.ssim(*pair, rim), "5 or more from the borders")


# the edge of the hole


@pytest.mark.parametrize("kind", EDGED)
def test_a_flat_image_scores_0_and_a_step_scores_its_height(kind):
    hole = hole_of(kind)
    assert metrics.ring_delta_e(flat(), hole) == pytest.approx(0, abs=1e-4)
    assert metrics.seam(flat(), hole) == 0
    assert metrics.ring_delta_e(with_hole(flat(), hole, SHIFTED), hole) == pytest.approx(SHIFT, abs=1e-4)
    assert metrics.seam(with_hole(flat(), hole, SHIFTED), hole) == pytest.approx(SHIFT)


@pytest.mark.parametrize("kind", EDGED)
@pytest.mark.parametrize("slopes", [(2, 0), (0, 2), (1, 1)])
def test_a_ramp_has_no_seam(kind, slopes):
    """Slopes are whole levels, lest rounding makes stairs; the rest is that lightness bends over the levels."""
    assert abs(metrics.seam(ramp(*slopes), hole_of(kind))) < 0.02


def test_a_step_on_a_ramp_is_found():
    hole = np.zeros((96, 96), bool)
    hole[30:60, 48:] = True
    image = ramp(1, 0)
    stepped = np.where(hole[..., None], image + 10, image)
    across = metrics.to_lab(np.uint8([78, 78, 78]))[0] - metrics.to_lab(np.uint8([68, 68, 68]))[0]
    assert metrics.seam(stepped, hole) == pytest.approx(across, rel=0.1)


@pytest.mark.parametrize("kind", EDGED)
def test_texture_that_goes_on_has_no_seam_and_texture_that_breaks_has_one(kind):
    hole = hole_of(kind)
    broken = np.where(hole[..., None], textured(2), textured(1))
    assert metrics.seam(broken, hole) > 5
    assert abs(metrics.seam(textured(1), hole)) < 0.1 * metrics.seam(broken, hole)
    assert metrics.ring_delta_e(broken, hole) > 1.3 * metrics.ring_delta_e(textured(1), hole)


def test_ring_delta_e_is_proportional_to_the_shift_of_what_is_pasted():
    hole = hole_of("ellipse")
    grey = flat(colour=(128, 128, 128))
    found, shifts = [], []
    for level in (130, 134, 142):
        found.append(metrics.ring_delta_e(with_hole(grey, hole, (level,) * 3), hole))
        shifts.append(metrics.to_lab(np.uint8([level] * 3))[0] - metrics.to_lab(np.uint8([128] * 3))[0])
    np.testing.assert_allclose(found, shifts, rtol=1e-3)
    image = textured(contrast=5)
    rising = [metrics.ring_delta_e(np.where(hole[..., None], image + np.uint8(k), image), hole) for k in (0, 20, 40)]
    assert rising[1] > 2 * rising[0]
    assert rising[2] > 1.8 * rising[1]


def test_the_boundary_band_has_the_width_given():
    """A shift beyond the ring does not count, one within it does."""
    hole = np.zeros((64, 64), bool)
    hole[:, 32:] = True
    image = flat((64, 64))
    image[:, 36:] = SHIFTED
    assert metrics.ring_delta_e(image, hole, width=4) == pytest.approx(0, abs=1e-4)
    assert metrics.ring_delta_e(image, hole, width=5) > 0.05 * SHIFT
    assert metrics.ring_delta_e(image, hole, width=40) == pytest.approx(SHIFT * 28 / 32, rel=0.1)


def test_every_part_of_the_edge_counts():
    """One half of a hole that is off gives half the score."""
    hole = np.zeros((96, 96), bool)
    hole[:, 32:64] = True
    half = hole.copy()
    half[:48] = False
    image = with_hole(flat(), half, SHIFTED)
    assert metrics.ring_delta_e(image, hole) == pytest.approx(SHIFT / 2, rel=0.05)
    assert metrics.seam(image, hole) == pytest.approx(SHIFT / 2)


@given(st.integers(0, 2**32 - 1), st.sampled_from(EDGED), st.sampled_from(["flip", "transpose", "swap sides", "move"]))
@settings(max_examples=40, deadline=None)
def test_what_must_not_matter(seed, kind, change):
    rng = np.random.default_rng(seed)
    image, hole = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8), random_hole(rng, 48, kind)
    if change == "flip":
        other, mask = image[::-1], hole[::-1]
    elif change == "transpose":
        other, mask = image.swapaxes(0, 1), hole.T
    elif change == "swap sides":
        other, mask = image, ~hole
    else:  # into a larger image, far from whose content it does not depend
        hole[:14] = hole[-14:] = hole[:, :14] = hole[:, -14:] = False
        other, mask = (
            np.pad(image, ((30, 40), (50, 20), (0, 0)), constant_values=255),
            np.pad(hole, ((30, 40), (50, 20))),
        )
    if hole.any():
        assert metrics.ring_delta_e(other, mask) == pytest.approx(metrics.ring_delta_e(image, hole), abs=1e-3)
        assert metrics.seam(other, mask) == pytest.approx(metrics.seam(image, hole), abs=1e-9)


def inner_hole(kind):
    """A hole (40, 40) away from the borders."""
    return np.pad(random_hole(np.random.default_rng(5), 20, kind), 10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rings_are_those_of_the_definition(kind):
    """The score again, written as its docstring says, one pixel of the edge after the other."""
    from scipy import ndimage

    hole, width = inner_hole(kind), 3
    lab = metrics.to_lab(textured(4, 40))
    square, cross = np.ones((2 * width + 1,) * 2), ndimage.generate_binary_structure(2, 1)
    rings = [side & ndimage.binary_dilation(~side, square) for side in (hole, ~hole)]
    edge = (hole & ndimage.binary_dilation(~hole, cross)) | (~hole & ndimage.binary_dilation(hole, cross))
    y, x = np.mgrid[:40, :40]
    found = []
    for row, column in zip(*np.nonzero(edge), strict=True):
        weight = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * width**2))
        weight[(abs(y - row) > 2 * width) | (abs(x - column) > 2 * width)] = 0
        inside, outside = (np.average(lab[ring], axis=0, weights=weight[ring]) for ring in rings)
        found.append(np.linalg.norm(inside - outside))
    assert metrics.ring_delta_e(textured(4, 40), hole, width) == pytest.approx(np.mean(found), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seam_is_that_of_the_definition(kind):
    """The score again, one step across the edge after the other."""
    hole, image = inner_hole(kind), textured(4, 40)
    found = []
    for mask, lab in ((hole, metrics.to_lab(image)), (hole.T, metrics.to_lab(image).swapaxes(0, 1))):
        for row, column in zip(*np.nonzero(mask[:, 1:] != mask[:, :-1]), strict=True):
            near = [column + k for k in (-2, -1, 1, 2) if 0 <= column + k < 39]
            beside = [at for at in near if mask[row, at] == mask[row, at + 1]]
            steps = [np.linalg.norm(lab[row, at + 1] - lab[row, at]) for at in (column, *beside)]
            if beside:
                found.append(steps[0] - np.mean(steps[1:]))
    assert metrics.seam(image, hole) == pytest.approx(np.mean(found))


# what changed


def test_changed_counts_what_is_seen():
    hole = hole_of("box")
    original = flat()
    assert metrics.changed(original, original, hole) == 0
    assert metrics.changed(original, with_hole(original, hole, (91, 120, 60)), hole) == 0
    assert metrics.changed(original, with_hole(original, hole, SHIFTED), hole) == 1
    half = hole.copy()
    half[:, : int(np.median(np.nonzero(hole)[1]))] = False
    expected = half.sum() / hole.sum()
    assert metrics.changed(original, with_hole(original, half, SHIFTED), hole) == pytest.approx(expected)


def test_known_error_is_exact(pair):
    hole = hole_of("box")[:61, :80]
    original, other = pair
    image = np.where(hole[..., None], other, original)
    assert metrics.known_error(original, image, hole) == 0
    row, column = np.argwhere(~hole)[7]
    image[row, column] = original[row, column] ^ np.uint8(1)
    assert metrics.known_error(original, image, hole) == 1
    assert metrics.known_error(flat(colour=(0, 0, 0)), flat(colour=(255, 0, 0)), np.zeros((96, 96), bool)) == 255
    assert metrics.known_error(original, other, np.ones((61, 80), bool)) == 0


# all together


def test_scores():
    hole = hole_of("thick")
    told = metrics.scores(flat(), with_hole(flat(), hole, SHIFTED), hole)
    assert told.changed == 1
    assert told.known_error == 0
    assert str(told) == f"ring delta E {SHIFT:.2f}, seam {SHIFT:.2f}, changed 100.0%, known error 0"
    assert json.loads(json.dumps(told.to_json()))["seam"] == pytest.approx(SHIFT)


@pytest.mark.parametrize(("fill", "changed"), [(False, None), (True, 0)])
def test_what_cannot_be_measured_is_none(fill, changed):
    told = metrics.scores(flat(), flat(), np.full((96, 96), fill))
    assert told == metrics.Scores(ring_delta_e=None, seam=None, changed=changed, known_error=0)
    assert str(told).startswith("ring delta E none, seam none, changed " + ("0.0%" if fill else "none"))


def test_a_hole_with_no_steps_beside_its_edge_has_no_seam():
    assert metrics.seam(flat(), np.indices((96, 96)).sum(0) % 2 == 0) is None


def test_scores_are_fast():
    """About 0.03 s of work; a bound that a busy machine keeps, and that full convolutions in float64 would not."""
    image, hole = np.tile(textured(), (6, 6, 1))[:512, :512], hole_of("thick", size=512)
    took = []
    for _ in range(3):
        start = time.thread_time()
        metrics.scores(image, image, hole)
        took.append(time.thread_time() - start)
    assert min(took) < 0.4


# refusals


def test_refusals(pair):
    one, hole = pair[0], np.zeros((61, 80), bool)
    refused(ImageError, "IMAGE_BAD_SHAPE", lambda: metrics.psnr(one, one[:-1]), "(60, 80, 3)", "(61, 80, 3)")
    refused(ImageError, "IMAGE_TYPE", lambda: metrics.ssim(one / 255, one), "float64 (61, 80, 3)")
    refused(ImageError, "IMAGE_TYPE", lambda: metrics.changed(one, one[..., 0], hole), "uint8 (61, 80)")
    refused(ImageError, "IMAGE_TYPE", lambda: metrics.seam("image.png", hole), "a str")
    refused(ImageError, "IMAGE_TOO_SMALL", lambda: metrics.ssim(one[:10], one[:10]), "10 rows, 80 columns")
    refused(MaskError, "MASK_TYPE", lambda: metrics.seam(one, hole.T), "bool (80, 61)", "(61, 80)")
    refused(MaskError, "MASK_TYPE", lambda: metrics.scores(one, one, hole.astype(float)), "float64", ">= 0.5")
    refused(MaskError, "MASK_TYPE", lambda: metrics.psnr(one, one, hole.astype(np.uint8)), "mask", "uint8")
    refused(SettingError, "SETTING_WIDTH", lambda: metrics.ring_delta_e(one, hole, 0), "width")


@pytest.mark.parametrize("missing", ["torchmetrics.image.lpip", "torchvision"])
def test_lpips_names_what_is_missing(pair, missing, installed, without):
    installed("torchvision", torch)
    without(missing)
    words = (missing.partition(".")[0], "pip install 'sdinpaint[eval]'")
    refused(SettingError, "SETTING_EXTRA", lambda: metrics.lpips(*pair), *words)


@pytest.mark.parametrize("missing", ["torchmetrics.image.fid", "torch_fidelity"])
def test_fid_names_what_is_missing(pair, missing, installed, without):
    installed("torch_fidelity", torch)
    without(missing)
    words = (missing.partition(".")[0], "pip install 'sdinpaint[eval]'")
    refused(SettingError, "SETTING_EXTRA", lambda: metrics.fid(pair, pair), *words)


def test_weights_that_cannot_be_fetched_are_named(pair, failing, installed):
    from torchmetrics.image import lpip

    installed("torchvision", torch)
    failing(lpip, "LearnedPerceptualImagePatchSimilarity", OSError("no route to host"))
    refused(SettingError, "SETTING_WEIGHTS", lambda: metrics.lpips(*pair), "lpips", "no route to host")


class Means(torch.nn.Module):
    """Features whose distance is known: the mean of each channel."""

    num_features = 3

    def forward(self, images):
        return images.double().mean(dim=(2, 3))


def test_fid_by_given_features_is_the_frechet_distance():
    from scipy import linalg

    rng = np.random.default_rng(0)
    sets = [[rng.integers(low, 256, (16 + i, 20, 3), dtype=np.uint8) for i in range(9)] for low in (0, 60)]
    features = [np.stack([one.mean(axis=(0, 1)) for one in images]) for images in sets]
    means, covariances = [one.mean(axis=0) for one in features], [np.cov(one.T) for one in features]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert metrics.fid(*sets, features=Means()) == pytest.approx(expected, rel=1e-4)
    assert metrics.fid(sets[0], sets[0], features=Means()) == pytest.approx(0, abs=1e-3)
    refused(SettingError, "SETTING_COUNTS", lambda: metrics.fid(sets[0], sets[1][:1]), "images", "at least two")


def test_colours_of_8_bits_have_no_distance():
    dark, light = np.uint8([[0, 0, 0]]), np.uint8([[255, 255, 255]])  # whose squared difference wraps around
    refused(ImageError, "IMAGE_TYPE", lambda: metrics.delta_e(dark, light), "to_lab")


def test_images_without_pixels_are_refused():
    nothing = np.zeros((0, 5, 3), np.uint8)
    refused(ImageError, "IMAGE_TYPE", lambda: metrics.psnr(nothing, nothing))
    refused(ImageError, "IMAGE_TYPE", lambda: metrics.seam(nothing, nothing[..., 0] > 0))
