"""Runs over a part of an image, and over its parts one by one; fills; and what joins them to the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import as_sd2, as_sdxl, random_pipeline, small

from sdinpaint import Mask, SdInpaintWarning
from sdinpaint.errors import SettingError
from sdinpaint.images.boxes import Box
from sdinpaint.images.crops import crop_box, working_size
from sdinpaint.images.fills import FILLS, fill_hole
from sdinpaint.images.input_image import to_tensor
from sdinpaint.pipeline import repaint
from sdinpaint.pipeline.patch_sampling import PatchSampling

SIZE = 120, 168
RNG = np.random.default_rng(7)
IMAGE = RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
ONE, OTHER = Mask.box(SIZE, (20, 24, 44, 50)), Mask.box(SIZE, (120, 70, 150, 100))
BOTH = ONE | OTHER


@pytest.fixture
def shown(spy):
    """Every batch of a run, as it is shown to the models."""
    return spy(PatchSampling, "__call__")


def inpaint(pipe, mask=BOTH, image=IMAGE, **options):
    return pipe.inpaint(image, mask, "a red fox", **{"steps": 2, "seed": 5, "progress": False} | options)


def pixels(result):
    return np.asarray(result.image)


def untouched(result, hole):
    return (pixels(result)[~hole] == IMAGE[~hole]).all()


# Crops


@pytest.mark.parametrize("crop", [0, 12, "auto"])
def test_the_model_sees_the_crop_at_its_working_size(either, shown, crop):
    result = inpaint(either, ONE, crop=crop)
    box = crop_box(ONE.hole, crop, either.family.size)
    assert result.crops == [(box,)]
    height, width = working_size(box.size, either.family.size)
    assert shown[0][0].patches[0].image.shape[-2:] == (height + -height % 8, width + -width % 8)
    assert untouched(result, ONE.hole)
    assert (pixels(result)[ONE.hole] != IMAGE[ONE.hole]).any(axis=1).mean() > 0.9


def test_a_crop_of_working_size_is_the_run_of_that_part(pipe, substitute):
    """No scaling, so pasting the run of the cut-out part by hand gives the same bits."""
    box = crop_box(ONE.hole, 12, pipe.family.size)
    substitute(repaint, working_size=lambda size, _: size)
    part = inpaint(pipe, ONE.hole[box.slices], IMAGE[box.slices])
    whole = inpaint(pipe, ONE, crop=12)
    assert (pixels(whole)[box.slices] == pixels(part)).all()


def test_a_faint_pixel_does_not_inflate_the_crop(pipe):
    faint = ONE.array.copy()
    faint[-1, -1] = 0.4
    assert inpaint(pipe, faint, crop=8).crops == inpaint(pipe, ONE, crop=8).crops


def test_noise_has_the_size_of_the_crop(pipe):
    box = crop_box(ONE.hole, 12, pipe.family.size)
    rows, columns = (-(-side // 8) for side in working_size(box.size, pipe.family.size))
    inpaint(pipe, ONE, crop=12, noise=torch.randn(1, 4, rows, columns))
    with pytest.raises(SettingError) as caught:
        inpaint(pipe, ONE, crop=12, noise=torch.randn(1, 4, 15, 21))
    assert caught.value.code == "SETTING_NOISE"


# Regions


def test_one_noise_does_not_serve_several_regions(pipe):
    with pytest.raises(SettingError) as caught:
        inpaint(pipe, regions="each", noise=torch.randn(1, 4, 15, 21))
    assert caught.value.code == "SETTING_NOISE"


def test_regions_one_by_one(either, shown):
    result = inpaint(either, regions="each", crop=8)
    assert len(shown) == 2
    assert result.crops == [tuple(crop_box(region.hole, 8, either.family.size) for region in (OTHER, ONE))]
    assert untouched(result, BOTH.hole)
    for region in (ONE, OTHER):
        assert (pixels(result)[region.hole] != IMAGE[region.hole]).any(axis=1).mean() > 0.9


def test_the_first_region_is_as_its_own_run_and_the_second_sees_it(pipe, shown):
    both, alone = inpaint(pipe, regions="each", crop=8), inpaint(pipe, OTHER, crop=8)
    assert (pixels(both)[OTHER.hole] == pixels(alone)[OTHER.hole]).all()
    near = Mask.box(SIZE, (64, 30, 80, 44))
    result = inpaint(pipe, ONE | near, regions="each", crop=24)
    second = shown[-1][0].patches[0]
    first_is_done = np.where(ONE.hole[..., None], pixels(result), IMAGE)
    assert torch.equal(
        second.image[..., : second.crop.size[0], : second.crop.size[1]], to_tensor(second.crop.cut(first_is_done))
    )


def test_a_region_that_is_still_to_come_is_hidden_too(pipe, shown):
    """The model must not see what is to go, or it is painted again."""
    near = Mask.box(SIZE, (64, 30, 80, 44))
    inpaint(pipe, ONE | near, regions="each", crop=30)
    (first,), (second,) = shown
    assert float(first.patches[0].amount.sum()) > float(second.patches[0].amount.sum())


def test_parts_with_less_than_16_pixels_between_them_are_one(pipe):
    apart = [Mask.box(SIZE, (44 + gap, 24, 60 + gap, 50)) for gap in (15, 16)]
    counts = [len(inpaint(pipe, ONE | other, regions="each").crops[0]) for other in apart]
    assert counts == [1, 2]


def test_images_with_other_numbers_of_regions_in_a_batch(pipe):
    masks = [BOTH, ONE, OTHER]
    together = inpaint(pipe, masks, [IMAGE] * 3, seed=[1, 2, 3], regions="each", crop=8, batch_size=1)
    assert [len(boxes) for boxes in together.crops] == [2, 1, 1]
    for index, mask in enumerate(masks):
        alone = inpaint(pipe, mask, seed=index + 1, regions="each", crop=8)
        assert (np.asarray(together.images[index]) == pixels(alone)).all()


# Fills


@pytest.mark.parametrize("fill", FILLS)
def test_what_stands_in_the_hole_at_the_start(either, shown, fill):
    result = inpaint(either, ONE, strength=0.5, fill=fill, steps=4)
    start = shown[0][0].patches[0].start
    assert torch.equal(start, to_tensor(fill_hole(IMAGE, ONE.hole, fill)))
    latents, hole = shown[0][0].known.latents, shown[0][0].known.mask > 0
    if fill == "noise":
        filled = latents[hole.expand_as(latents)]
        assert abs(float(filled.mean())) < 0.3
        assert float(filled.std()) == pytest.approx(1, abs=0.2)
    assert untouched(result, ONE.hole)


def test_fills_make_a_difference_below_strength_1_and_none_at_it(pipe):
    below = {pixels(inpaint(pipe, ONE, strength=0.5, fill=fill)).tobytes() for fill in FILLS}
    assert len(below) == len(FILLS)
    at_1 = {pixels(inpaint(pipe, ONE, fill=fill)).tobytes() for fill in FILLS}
    assert len(at_1) == 1


def test_what_was_in_the_hole_has_no_influence_once_it_is_filled(pipe):
    other = IMAGE.copy()
    other[ONE.hole] = 255 - other[ONE.hole]
    for fill in FILLS[1:]:
        first, second = (pixels(inpaint(pipe, ONE, image, strength=0.5, fill=fill)) for image in (IMAGE, other))
        assert (first == second).all()
    first, second = (pixels(inpaint(pipe, ONE, image, strength=0.5)) for image in (IMAGE, other))
    assert (first != second).any()


@pytest.mark.parametrize("kind", [as_sd2, as_sdxl], ids=["sd2", "sdxl"])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_at_strength_1_all_steps_run_and_nothing_of_the_hole_is_left(kind, sampler, tiny, vocabulary):
    """No strength of 0.9999 behind it, which would skip the first step and let the old colours through."""
    pipe = random_pipeline(small(kind(tiny)), vocabulary)
    other = IMAGE.copy()
    other[ONE.hole] = 255 - other[ONE.hole]
    steps = []
    for strength, run in {1.0: 4, 0.9999: 3}.items():
        steps.clear()
        options = {"strength": strength, "steps": 4, "sampler": sampler, "on_step": lambda *_: steps.append(1)}
        first, second = (pixels(inpaint(pipe, ONE, image, **options)) for image in (IMAGE, other))
        assert len(steps) == 2 * run
        assert (first[ONE.hole] == second[ONE.hole]).all() == (strength == 1)


# Joining


@pytest.mark.parametrize("blend", ["none", "feather", "poisson"])
@pytest.mark.parametrize("match_color", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_known_pixels_stay_bit_for_bit(either, blend, match_color, alpha):
    image = np.dstack([IMAGE, RNG.integers(0, 256, SIZE, dtype=np.uint8)]) if alpha else IMAGE
    from PIL import Image

    result = inpaint(either, image=Image.fromarray(image), crop=8, regions="each", blend=blend, match_color=match_color)
    kept = ~BOTH.hole
    assert (pixels(result)[kept] == image[kept]).all()
    plain = inpaint(either, image=Image.fromarray(image), crop=8, regions="each")
    changed = (pixels(result) != pixels(plain)).any(axis=2)
    assert changed.any() == (blend != "none" or match_color)
    assert not changed[kept].any()


def test_ten_edits_leave_what_no_mask_covered(pipe):
    image, touched = IMAGE, np.zeros(SIZE, bool)
    for edit in range(10):
        mask = Mask.ellipse(SIZE, (5 * edit, 3 * edit, 5 * edit + 40, 3 * edit + 30))
        result = inpaint(pipe, mask, image, seed=edit, crop="auto" if edit % 2 else None, blend="feather")
        image, touched = pixels(result), touched | mask.hole
    assert (image[~touched] == IMAGE[~touched]).all()
    assert (image[touched] != IMAGE[touched]).any(axis=1).mean() > 0.9


# Warnings


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (~Mask.box(SIZE, (70, 50, 100, 80)), "~mask"),
        (Mask.strokes(SIZE, [[(10, 60), (150, 70)]], width=3), "grow"),
        (Mask.box(SIZE, (50, 50, 51, 51)), "grow"),
    ],
)
def test_a_doubtful_mask_is_warned_of_with_a_remedy(pipe, mask, says):
    with pytest.warns(SdInpaintWarning, match="mask: .*" + says) as caught:
        result = inpaint(pipe, mask)
    assert any(result.reports[0].warnings[0] in str(one.message) for one in caught)


def test_a_sound_mask_and_an_extended_image_are_not(pipe, recwarn):
    inpaint(pipe)
    pipe.outpaint(IMAGE, "a fox", 8, 100, 8, 100, steps=1, progress=False)
    assert [one for one in recwarn if issubclass(one.category, SdInpaintWarning)] == []


# Outpainting


def test_outpainting(either):
    result = either.outpaint(IMAGE, "a fox", left=24, bottom=13, steps=2, seed=1, progress=False)
    assert result.image.size == (168 + 24, 120 + 13)
    assert (pixels(result)[: 120 - 16, 24 + 16 :] == IMAGE[:-16, 16:]).all()
    assert result.repainted[0].item.image.old == Box(24, 0, 192, 120)
    sized = either.outpaint(IMAGE, "a fox", size=(133, 192), anchor="top-right", steps=2, seed=1, progress=False)
    assert (pixels(sized) == pixels(result)).all()
    strong = either.outpaint(IMAGE, "a fox", left=24, overlap=0, strength=0.5, steps=2, seed=1, progress=False)
    assert (pixels(strong)[:, 24:] == IMAGE).all()
    reflected = either.outpaint(
        IMAGE, "a fox", left=24, overlap=0, strength=0.5, fill="reflect", steps=2, seed=1, progress=False
    )
    assert (pixels(reflected) != pixels(strong)).any()


def test_outpainting_several(pipe):
    result = pipe.outpaint([IMAGE, IMAGE[:80]], ["a fox", "a cube"], size=(128, 176), steps=1, progress=False)
    assert [image.size for image in result.images] == [(176, 128)] * 2
