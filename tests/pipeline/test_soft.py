"""Soft masks: every pixel changes in its own share of the steps, and models are shown binary masks alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from closeness import same_image

from sdinpaint.images.input_image import to_tensor
from sdinpaint.masks import Mask, masked_image, to_latent
from sdinpaint.pipeline import patch_sampling
from sdinpaint.sampling import Known, blend_soft, restore_known, samplers, schedules, soft_masks, start_soft
from sdinpaint.sampling.graphs import Graphs

SIZE = 64, 72
STEPS = 8
IMAGE = np.random.default_rng(3).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
RAMP = np.tile(np.linspace(0, 1, SIZE[1], dtype=np.float32), (SIZE[0], 1))
STEEP = np.concatenate([np.zeros((64, 24)), np.tile(np.linspace(0, 1, 24), (64, 1)), np.ones((64, 24))], 1)


def inpaint(pipe, mask, **options):
    return pipe.inpaint(IMAGE, mask, "a red fox", **{"steps": STEPS, "seed": 5, "progress": False} | options)


def pixels(result):
    return np.asarray(result.image).astype(int)


# In which steps a cell changes


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 1000])
def test_a_cell_changes_in_as_many_steps_as_a_run_of_that_strength_has(steps):
    amounts = [0.0, 0.003, 0.1, 0.29, 0.5, 0.58, 127 / 255, 0.999, 1.0]
    masks = soft_masks(torch.tensor(amounts).reshape(1, 1, 1, -1), steps)
    ran = torch.stack(masks).sum(0).flatten().tolist()
    sigmas = torch.linspace(10, 0, steps + 1)
    asked = [int(steps * amount + 1e-4) for amount in amounts]
    assert ran == asked
    for count, amount in zip(ran, amounts, strict=True):
        if count:
            assert len(schedules.for_strength(sigmas, amount)) - 1 == count


def test_masks_are_binary_and_only_grow():
    masks = soft_masks(torch.rand(2, 1, 9, 7), 13)
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in masks)
    assert all((later >= earlier).all() for earlier, later in pairwise(masks))


# Sampling


def differential(denoise, x, masks, latents, noise, sigmas):
    """Levin and Fried's loop written out, by Euler steps: the image is put back where it is not its turn.

    What they leave to the model in a step, it changed in the step before; so their masks are those of the step before.
    """
    for step, (sigma, after) in enumerate(pairwise(sigmas.tolist())):
        x = torch.where(masks[max(step - 1, 0)] > 0, x, latents + sigma * noise)
        x = x + (after - sigma) * (x - denoise(x, sigma)) / sigma
    return torch.where(masks[-1] > 0, x, latents)


def stub(x, sigma):
    return torch.tanh(x * 0.3) / (1 + sigma)


def test_it_is_differential_diffusion():
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 6, 5, dtype=torch.float64), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    amounts = torch.rand(2, 1, 6, 5)
    sigmas = torch.linspace(9, 0, STEPS + 1, dtype=torch.float64)
    masks = soft_masks(amounts, STEPS)
    start = noise * float(sigmas[0])
    x = start_soft(start, latents, noise, masks[0], sigmas)
    denoise = blend_soft(lambda step: stub, masks, latents, sigmas)
    ours = restore_known(samplers.euler(denoise, x, sigmas), Known(masks[-1], latents, latents))
    expected = differential(stub, start, masks, latents, noise, sigmas)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for wrong in (1 - amounts, amounts.clamp(min=0.3), (amounts >= 0.5).float()):
        other = differential(stub, start, soft_masks(wrong, STEPS), latents, noise, sigmas)
        assert not torch.allclose(other, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize("amount", [0.25, 0.5, 0.75])
def test_a_mask_of_one_grey_is_a_strength(four_channels, name, amount):
    options = {"sampler": name, "steps": STEPS, "seed": 5, "progress": False}
    even = inpaint(four_channels, np.full(SIZE, amount, np.float32), soft=True, **options)
    varied = four_channels.vary(IMAGE, "a red fox", amount, **options)
    # the draw of the masked image, which `vary` needs none of, comes after the noise and changes nothing
    assert np.abs(pixels(even) - pixels(varied)).max() <= 1
    other = four_channels.vary(IMAGE, "a red fox", amount + 0.25, **options)
    assert np.abs(pixels(even) - pixels(other)).max() > 20


# What the model is shown


def test_a_nine_channel_model_sees_binary_masks_and_the_image_without_each(pipe, sabotage):
    fed = []
    sabotage(patch_sampling.Draws, "__call__", lambda self, like: torch.zeros_like(like))
    with pipe.unet.register_forward_pre_hook(lambda unet, given: fed.append(given[0][:1])):
        inpaint(pipe, STEEP, soft=True)
    assert len(fed) == STEPS
    holes = soft_masks(torch.tensor(Mask(STEEP).array)[None, None], STEPS)
    assert len({hole.sum().item() for hole in holes}) == STEPS
    for x, hole in zip(fed, holes, strict=True):
        mask, masked_latents = x[:, 4:5], x[:, 5:]
        torch.testing.assert_close(mask, to_latent(hole, "max"), rtol=0, atol=0)
        expected = pipe.sample_latents(masked_image(to_tensor(IMAGE), hole))
        torch.testing.assert_close(masked_latents, expected, rtol=0, atol=1e-6)


def test_conditioning_is_precomputed_once(pipe, replays, spy, substitute):
    """The text does not change with the mask, so what follows from it is computed but once for a captured step."""
    substitute(pipe, graphs=Graphs(True))
    calls = spy(type(pipe.unet), "prepare")
    inpaint(pipe, STEEP, soft=True)
    assert len(calls) == 1


# Images


def test_black_stays_bit_for_bit_and_more_changes_where_it_is_whiter(either):
    result = inpaint(either, STEEP, soft=True)
    after = pixels(result)
    assert (after[STEEP == 0] == IMAGE[STEEP == 0]).all()
    assert result.scores[0].known_error == 0
    assert (after != IMAGE).any(axis=2)[:, 48:].mean() > 0.9


def test_what_no_step_changes_is_not_passed_through_the_autoencoder(either):
    faint = np.where(RAMP < 0.3, np.float32(0.9) / STEPS, 1)
    result = inpaint(either, faint, soft=True)
    assert (pixels(result)[RAMP < 0.3] == IMAGE[RAMP < 0.3]).all()
    enough = np.where(RAMP < 0.3, np.float32(1) / STEPS, 1)
    assert (pixels(inpaint(either, enough, soft=True))[RAMP < 0.3] != IMAGE[RAMP < 0.3]).any()


def test_a_white_mask_is_a_hard_one(pipe):
    white = np.ones(SIZE, np.float32)
    hard = inpaint(pipe, white)
    assert same_image(inpaint(pipe, white, soft=True).image, hard.image)
    grey = np.full(SIZE, 0.9, np.float32)
    assert not same_image(inpaint(pipe, grey, soft=True).image, hard.image)


def test_a_soft_mask_does_something_else_than_a_hard_one(either):
    soft, hard = (pixels(inpaint(either, STEEP, soft=soft)) for soft in (True, False))
    assert (hard[:, 24:35] == IMAGE[:, 24:35]).all()
    assert (soft[:, 27:35] != IMAGE[:, 27:35]).any()


@pytest.mark.parametrize("options", [{"strength": 0.5}, {"sampler": "euler_ancestral"}, {"sampler": "dpmpp_2m"}])
def test_with_other_settings(either, options):
    result = inpaint(either, RAMP, soft=True, **options)
    assert result.scores[0].known_error == 0
    again = either.inpaint(IMAGE, RAMP, progress=False, **result.settings)
    assert (pixels(result) == pixels(again)).all()


def test_each_image_of_a_batch_has_its_own_soft_mask(either):
    masks = [RAMP, np.ones(SIZE, np.float32), STEEP]
    together = either.inpaint([IMAGE] * 3, masks, "a fox", steps=STEPS, seed=[1, 2, 3], soft=True, progress=False)
    for index, mask in enumerate(masks):
        alone = either.inpaint(IMAGE, mask, "a fox", steps=STEPS, seed=index + 1, soft=True, progress=False)
        assert np.abs(np.asarray(together.images[index]).astype(int) - pixels(alone)).max() <= 1
