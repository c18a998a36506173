"""Batches: item i is its single run, whatever runs beside it, but for the order of sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closeness import same_image
from painting import IMAGE, MASK, PROMPTS, SIZES, every_run, inpaint, levels, random_image

from sdinpaint.sampling.noise import Draws


@every_run
def test_an_item_of_a_batch_is_its_single_run(pipe, options):
    images = [random_image(64, 72, seed=seed) for seed in range(3)]
    together = inpaint(pipe, images, MASK, PROMPTS, seed=[4, 0, 9], **options).images
    for i, seed in enumerate([4, 0, 9]):
        assert levels(together[i], inpaint(pipe, images[i], MASK, PROMPTS[i], seed=seed, **options).image) <= 1


def test_an_item_of_a_batch_is_its_single_run_with_four_channels(four_channels):
    images = [random_image(64, 72, seed=seed) for seed in range(2)]
    together = inpaint(four_channels, images, MASK, PROMPTS[:2], seed=[4, 0], sampler="euler_ancestral").images
    for i, seed in enumerate([4, 0]):
        alone = inpaint(four_channels, images[i], MASK, PROMPTS[i], seed=seed, sampler="euler_ancestral").image
        assert levels(together[i], alone) <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_permuting_a_batch_permutes_the_images(pipe, sampler):
    images, order = [random_image(64, 72, seed=seed) for seed in range(3)], [2, 0, 1]
    there = inpaint(pipe, images, MASK, PROMPTS, seed=[1, 2, 3], sampler=sampler)
    prompts, images, seeds = zip(*((PROMPTS[i], images[i], i + 1) for i in order), strict=True)
    back = inpaint(pipe, images, MASK, prompts, seed=seeds, sampler=sampler)
    assert back.seeds == [3, 1, 2]
    assert all(levels(back.images[i], there.images[one]) <= 1 for i, one in enumerate(order))
    assert levels(there.images[0], there.images[1]) > 20


MODES = {
    "hard": {},
    "from a filled hole": {"strength": 0.6, "fill": "noise"},
    "soft": {"soft": True, "sampler": "euler_ancestral"},
    "crop": {"crop": 8, "sampler": "euler_ancestral"},
    "crop of each region": {"crop": "auto", "regions": "each", "blend": "feather", "match_color": True},
}
every_mode = pytest.mark.parametrize(
    ("either", "options"),
    [("nine channels", options) for options in MODES.values()] + [("four channels", MODES["soft"])],
    ids=[*MODES, "soft, four channels"],
    indirect=["either"],
)
SEEDS = [4, 0, 9]
ONE_LEVEL = 1
"""The levels of 255 that another order of sums makes in batches of other lengths; measured in at most 3 values."""


def three():
    """Images of two sizes; of the masks, whose edges are soft, two are as large, and one has two parts."""
    sizes = SIZES[0], SIZES[0], SIZES[1]
    images = [random_image(*size, seed=seed) for seed, size in enumerate(sizes)]
    masks = [np.zeros(size, np.float32) for size in sizes]
    masks[0][13:44, 22:63] = masks[2][30:61, 40:81] = np.linspace(0.3, 1, 41)
    masks[1][3:20, 5:30], masks[1][42:60, 50:70] = 1, np.linspace(0.6, 0.9, 20)
    return images, masks, PROMPTS, SEEDS


def inpaint_those(pipe, order, **options):
    """Some of the three, in this order."""
    images, masks, prompts, seeds = ([values[i] for i in order] for values in three())
    result = inpaint(pipe, images, masks, prompts, seed=seeds, **options)
    assert result.seeds == seeds
    return [np.asarray(image) for image in result.images]


@every_mode
def test_one_at_a_time_an_item_is_its_single_run(either, options):
    listed = inpaint_those(either, [0, 1, 2], batch_size=1, **options)
    permuted = inpaint_those(either, [2, 0, 1], batch_size=1, **options)
    for i, found in enumerate(listed):
        (alone,) = inpaint_those(either, [i], **options)
        assert same_image(found, alone)
        assert same_image(found, permuted[(i + 1) % 3])
    assert levels(listed[0], listed[1]) > 20


@every_mode
def test_batches_of_any_length_give_the_same_images_to_a_level(either, options):
    one_by_one = inpaint_those(either, [0, 1, 2], batch_size=1, **options)
    for batch_size in (2, None):
        for order in ([0, 1, 2], [1, 2, 0]):
            found = inpaint_those(either, order, batch_size=batch_size, **options)
            assert all(levels(one, one_by_one[i]) <= ONE_LEVEL for one, i in zip(found, order, strict=True))


@pytest.mark.parametrize("options", [MODES["hard"], MODES["soft"], MODES["crop"]], ids=str)
def test_noise_that_depends_on_the_others_is_seen(pipe, options, sabotage):
    draw = torch.randn

    def from_one_generator(draws, like):
        return draw(like.shape, generator=draws.generators[0])

    expected = inpaint_those(pipe, [1, 1], batch_size=1, **options)
    sabotage(Draws, "__call__", from_one_generator)
    assert levels(inpaint_those(pipe, [1, 1], **options)[1], expected[1]) > 20 * ONE_LEVEL


def test_one_stands_for_all(pipe):
    result = inpaint(pipe, prompt=PROMPTS[:2], negative_prompt="a blue cube", seed=7)
    assert result.seeds == [7, 7]
    for found, prompt in zip(result.images, PROMPTS, strict=False):
        assert levels(found, inpaint(pipe, prompt=prompt, negative_prompt="a blue cube", seed=7).image) <= 1


def test_a_batch_in_one_tensor_is_a_list(pipe):
    images = [random_image(64, 72, seed=seed) for seed in range(2)]
    tensor = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1 for image in images])
    masks = np.stack([MASK, MASK[::-1]])
    listed = inpaint(pipe, images, list(masks)).images
    stacked = inpaint(pipe, tensor, torch.from_numpy(masks)[:, None]).images
    assert all(np.array_equal(one, other) for one, other in zip(listed, stacked, strict=True))


def test_batch_size_is_how_many_the_models_see(pipe, unet_batches):
    for batch_size, expected in {None: [6, 6], 3: [6, 6], 2: [4, 4, 2, 2], 1: [2] * 6}.items():
        inpaint(pipe, [IMAGE] * 3, batch_size=batch_size, steps=2)
        assert unet_batches == expected
        unet_batches.clear()
    inpaint_those(pipe, [0, 2], crop=8, steps=2)
    assert unet_batches == [4, 4], "crops of one size from images of two"
