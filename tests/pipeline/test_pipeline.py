"""Tests of what `Pipeline.inpaint` promises for any weights: kept pixels, batches, seeds, replays, steps by name."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from closeness import same_image
from painting import IMAGE, MASK, PROMPTS, SIZES, every_run, hole, inpaint, levels, pixels, random_image
from PIL import Image

from sdinpaint import SdInpaintWarning
from sdinpaint.images.input_image import to_uint8
from sdinpaint.sampling import blend_known, find_sampler, find_spacing, restore_known, samplers, schedule, schedules
from sdinpaint.sampling.noise import Draws

# Known pixels


@pytest.mark.parametrize("size", SIZES)
def test_known_pixels_stay_bit_for_bit(either, size):
    image, mask = random_image(*size), hole(*size)
    found = np.asarray(inpaint(either, image, mask).image)
    assert found.shape == image.shape
    assert np.array_equal(found[~mask], image[~mask])
    assert (found[mask] != image[mask]).mean() > 0.9


@pytest.mark.parametrize("size", SIZES)
def test_what_lies_under_the_mask_is_not_seen(pipe, size):
    one, mask = random_image(*size), np.zeros(size, bool)
    mask[size[0] // 2 :, size[1] // 3 :] = True  # up to the edge, where the image is padded
    other = np.where(mask[..., None], random_image(*size, seed=1), one)
    assert np.array_equal(inpaint(pipe, one, mask).image, inpaint(pipe, other, mask).image)
    seen = [inpaint(pipe, image, mask, strength=0.5).image for image in (one, other)]
    assert not np.array_equal(*seen)


def test_transparency_stays_where_nothing_is_repainted(pipe):
    image, mask = random_image(83, 101, channels=4), hole(83, 101)
    result = inpaint(pipe, Image.fromarray(image), mask).image
    assert result.mode == "RGBA"
    found = np.asarray(result)
    assert np.array_equal(found[~mask], image[~mask])
    assert (found[mask][:, 3] == 255).all()


def test_a_batch_of_different_sizes(pipe):
    images, masks = [random_image(*size) for size in SIZES], [hole(*size) for size in SIZES]
    result = inpaint(pipe, images, masks, PROMPTS, seed=[1, 2, 3])
    for i, found in enumerate(result.images):
        assert found.size == SIZES[i][::-1]
        assert np.array_equal(pixels(found)[~masks[i]], images[i][~masks[i]])
        assert levels(found, inpaint(pipe, images[i], masks[i], PROMPTS[i], seed=i + 1).image) <= 1


def test_keep_everything(either):
    for image in (IMAGE, random_image(64, 72, channels=4)):
        with pytest.warns(SdInpaintWarning, match="mask is empty"):
            result = inpaint(either, Image.fromarray(image), np.zeros_like(MASK), paste_back=False)
        assert np.array_equal(result.image, image)


def test_keep_everything_in_one_item_of_a_batch(pipe):
    with pytest.warns(SdInpaintWarning, match="image 2 of 3: the mask is empty"):
        result = inpaint(pipe, [IMAGE] * 3, [MASK, np.zeros_like(MASK), MASK], seed=[1, 2, 3])
    assert np.array_equal(result.images[1], IMAGE)
    assert levels(result.images[2], inpaint(pipe, seed=3).image) <= 1


def test_without_paste_back_the_whole_image_is_the_models(either):
    pasted, whole = (np.asarray(inpaint(either, paste_back=paste_back).image) for paste_back in (True, False))
    assert np.array_equal(pasted[MASK], whole[MASK])
    assert (whole[~MASK] != IMAGE[~MASK]).mean() > 0.9


# Seeds and replays


def test_the_same_call_gives_the_same_image(pipe):
    assert np.array_equal(inpaint(pipe).image, inpaint(pipe).image)
    assert not np.array_equal(inpaint(pipe).image, inpaint(pipe, seed=6).image)


def test_seed_0_is_a_seed(pipe):
    result = inpaint(pipe, seed=0)
    assert result.seeds == [0]
    assert np.array_equal(result.image, inpaint(pipe, seed=0).image)
    assert not np.array_equal(result.image, inpaint(pipe, seed=1).image)


@pytest.mark.parametrize("seed", [None, -1])
def test_a_seed_that_was_drawn_is_reported(pipe, seed):
    first, second = inpaint(pipe, seed=seed), inpaint(pipe, seed=seed)
    assert first.seeds != second.seeds
    assert first.seeds == [first.settings["seed"]]
    assert not np.array_equal(first.image, second.image)
    assert np.array_equal(first.image, inpaint(pipe, seed=first.seeds[0]).image)


def test_every_item_draws_its_own_seed(pipe):
    result = inpaint(pipe, [IMAGE] * 3, seed=None)
    assert len(set(result.seeds)) == 3


def test_the_global_generators_are_neither_used_nor_moved(pipe):
    states = torch.get_rng_state(), np.random.get_state()[1]
    reference = inpaint(pipe, sampler="euler_ancestral").image
    inpaint(pipe, seed=None)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    torch.manual_seed(8)
    assert np.array_equal(inpaint(pipe, sampler="euler_ancestral").image, reference)


@every_run
def test_settings_replay_the_run(pipe, options):
    first = inpaint(pipe, prompt=None, negative_prompt="a fox", seed=None, cover="max", paste_back=False, **options)
    again = pipe.inpaint(IMAGE, MASK, **first.settings, progress=False)
    assert np.array_equal(first.image, again.image)
    assert again.settings == first.settings
    assert None not in first.settings.values()


def test_settings_replay_a_batch(pipe):
    first = inpaint(pipe, [IMAGE] * 2, prompt=PROMPTS[:2], seed=None)
    again = pipe.inpaint([IMAGE] * 2, MASK, **first.settings, progress=False)
    assert [np.asarray(image).tobytes() for image in first.images] == [
        np.asarray(image).tobytes() for image in again.images
    ]


@pytest.mark.parametrize("where", [{"left": 24, "bottom": 8}, {"size": (80, 96), "anchor": "left"}], ids=str)
def test_settings_replay_an_extended_image(either, where):
    first = either.outpaint(IMAGE, "a red fox", **where, overlap=8, crop=16, steps=3, seed=None, progress=False)
    again = either.outpaint(IMAGE, **first.settings, progress=False)
    assert np.array_equal(first.image, again.image)
    assert again.settings == first.settings
    assert None not in first.settings.values()


def test_numbers_of_other_libraries_and_whole_floats(pipe):
    given = {"steps": np.int64(3), "seed": np.uint8(5), "guidance_scale": np.float32(7.5), "strength": 1}
    result = inpaint(pipe, **given)
    assert np.array_equal(result.image, inpaint(pipe, steps=3.0, seed=5.0).image)
    assert {name: type(result.settings[name]) for name in given} == dict(
        zip(given, (int, int, float, float), strict=True)
    )


def test_given_noise_replaces_the_drawn_one(pipe):
    noise = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(1))
    images = [random_image(64, 72, seed=seed) for seed in range(2)]
    together = inpaint(pipe, images, noise=noise, seed=[1, 2]).images
    assert levels(together[1], inpaint(pipe, images[1], noise=noise[1:], seed=2).image) <= 1
    assert levels(together[1], inpaint(pipe, images[1], noise=noise[:1], seed=2).image) > 20


# Steps


def test_guidance_runs_one_batch_of_two_halves_and_without_it_one(pipe, unet_batches):
    inpaint(pipe, [IMAGE] * 3, guidance_scale=7.5)
    inpaint(pipe, [IMAGE] * 3, guidance_scale=1)
    inpaint(pipe, [IMAGE] * 3, guidance_scale=0, steps=1)
    assert unet_batches == [6, 6, 6, 3, 3, 3, 6]


def test_guidance_1_does_not_look_at_the_negative_prompt(pipe):
    without, with_it = (inpaint(pipe, guidance_scale=1, negative_prompt=text).image for text in ("", "a blue cube"))
    assert np.array_equal(without, with_it)
    assert levels(inpaint(pipe).image, inpaint(pipe, negative_prompt="a blue cube").image) > 1


@pytest.mark.parametrize(
    ("steps", "strength"), [(50, 0.58), (100, 0.29), (10, 0.7), (30, 1), (30, 0.99), (7, 0.5), (2, 0.01), (1, 0.3)]
)
def test_strength_runs_as_many_steps_as_it_says(pipe, monkeypatch, steps, strength):
    monkeypatch.setattr(pipe.unet, "forward", lambda x, *rest: x[:, :4])
    seen = []
    inpaint(pipe, steps=steps, strength=strength, on_step=lambda step, x, x0: seen.append(step))
    assert seen == list(range(max(1, math.floor(steps * strength + 1e-9))))


@every_run
def test_on_step_is_told_every_step(pipe, options):
    seen = []
    image = inpaint(pipe, steps=5, paste_back=False, on_step=lambda *told: seen.append(told), **options).image
    count = 3 if "strength" in options else 5
    assert [step for step, _, _ in seen] == list(range(count))
    for _, x, x0 in seen:
        assert x.shape == x0.shape == (1, 4, 8, 9)
        assert x.dtype == x0.dtype == torch.float32
        assert bool(x.isfinite().all())
    path = schedule(options.get("sampler", "ddim"), options.get("spacing"), pipe.family.schedule, 5)
    assert same_image(to_uint8(pipe.decode(schedules.finish(seen[-1][1], path)))[0], image)


@pytest.mark.parametrize("progress", [True, False])
def test_nothing_is_printed(pipe, capfd, progress):
    inpaint(pipe, progress=progress)
    assert capfd.readouterr() == ("", "")


def test_the_progress_bar_on_a_terminal(pipe, capfd, stderr):
    shown = stderr(terminal=True)
    inpaint(pipe, progress=True)
    assert "3/3" in shown.getvalue()
    shown.truncate(0)
    inpaint(pipe, progress=False)
    assert (shown.getvalue(), *capfd.readouterr()) == ("", "", "")


# What is given


def test_every_kind_of_image_and_mask(pipe, tmp_path):
    reference = inpaint(pipe).image
    tensor = torch.from_numpy(IMAGE).permute(2, 0, 1) / 127.5 - 1
    grey = (255 * MASK).astype(np.uint8)
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    Image.fromarray(grey).save(tmp_path / "mask.png")
    images = [
        Image.fromarray(IMAGE),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        tensor,
        tensor[None],
        [IMAGE],
    ]
    masks = [
        *(grey, 1.0 * MASK, Image.fromarray(grey), Image.fromarray(MASK), tmp_path / "mask.png"),
        *(torch.from_numpy(MASK), torch.from_numpy(MASK)[None, None].float(), np.stack([grey] * 3, -1), [MASK]),
    ]
    for image in images:
        assert np.array_equal(inpaint(pipe, image=image).image, reference)
    for mask in masks:
        assert np.array_equal(inpaint(pipe, mask=mask).image, reference)


def test_cover(pipe):
    thin = np.zeros_like(MASK)
    thin[17:20, 3:70] = True  # between the first pixels of all cells
    thin[40:60, 8:40] = True
    nearest, most = (pipe.encode_image(IMAGE, thin, cover=cover).mask[0, 0] for cover in ("nearest", "max"))
    assert not nearest[2].any()
    assert most[2].all()
    assert torch.equal(nearest[5:, 1:5], torch.ones(3, 4))
    assert bool((nearest <= most).all())
    results = [np.asarray(inpaint(pipe, mask=thin, cover=cover).image) for cover in ("nearest", "max")]
    assert not np.array_equal(*results)
    for result in results:
        assert np.array_equal(result[~thin], IMAGE[~thin])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, dtype):
    half = copy.deepcopy(pipe)
    for model in (half.unet, half.vae, half.text):
        model.to(dtype)
    seen = []
    found = inpaint(half, guidance_scale=2, on_step=lambda step, x, x0: seen.append(x.dtype)).image
    assert seen == [torch.float32] * 3
    assert np.array_equal(pixels(found)[~MASK], IMAGE[~MASK])
    difference = np.abs(pixels(found) - pixels(inpaint(pipe, guidance_scale=2).image))[MASK].mean()
    assert 0 < difference < {torch.float16: 2, torch.bfloat16: 16}[dtype]


def test_what_a_pipeline_says_of_itself(pipe, four_channels):
    assert pipe.takes_mask
    assert not four_channels.takes_mask
    assert (
        repr(pipe) == "Pipeline('sd15-inpainting', source='', device=cpu, dtype=torch.float32, vae.scaling_factor=0.21)"
    )
    assert pipe.train_sigmas.shape == (1000,)
    assert not any(weight.requires_grad for model in (pipe.unet, pipe.vae, pipe.text) for weight in model.parameters())


# One level down: every step by name gives the image of `inpaint`


def whole_image(pipe, latents, size):
    return to_uint8(pipe.decode(latents))[0, : size[0], : size[1]]


@pytest.mark.parametrize("size", SIZES)
def test_the_steps_by_name(pipe, size):
    image, mask = random_image(*size), hole(*size)
    expected = inpaint(pipe, image, mask, sampler="euler", spacing="linspace", steps=4, seed=11, paste_back=False).image

    rows, columns = (-(-side // 8) for side in size)
    draws = Draws([11], pipe.device)
    noise = draws(torch.empty(1, 4, rows, columns))
    known = pipe.encode_image(image, mask, draws=draws, latents=False)
    cond, uncond = pipe.encode_prompts(["a red fox", ""])
    path = schedules.linspace(pipe.train_sigmas, 4)
    denoise = pipe.denoiser(known, cond, uncond, guidance_scale=7.5)
    x = samplers.euler(denoise, schedules.start(noise, path, unit_variance=False), path)
    found = whole_image(pipe, schedules.finish(x, path), size)
    assert same_image(found, expected)
    assert levels(found, whole_image(pipe, known.masked_latents, size)) > 20


@torch.inference_mode()
def by_name(pipe, noise, sampler="ddim", spacing=None, eta=None, strength=1.0, guidance_scale=7.5):
    """Do what `inpaint` does with given noise, one step after the other."""
    draws = Draws([5], pipe.device)
    known = pipe.encode_image(IMAGE, MASK, draws=draws, latents=strength < 1 or not pipe.takes_mask)
    cond, uncond = pipe.encode_prompts(["a red fox", ""])
    path = schedule(sampler, spacing, pipe.family.schedule, 5)
    x = schedules.start(noise, path, unit_variance=find_spacing(sampler, spacing).unit_variance)
    if strength < 1:
        path = schedules.for_strength(path, strength)
        x = schedules.start_from(known.latents, noise, path)
    denoise = pipe.denoiser(known, cond, uncond, guidance_scale=guidance_scale)
    if not pipe.takes_mask:
        denoise = blend_known(denoise, known, noise, path)
    found = find_sampler(sampler)
    x = found.run(denoise, x, path, eta=found.eta if eta is None else eta, noise=draws)
    latents = schedules.finish(x, path)
    return latents if pipe.takes_mask else restore_known(latents, known)


@every_run
def test_the_steps_by_name_for_every_run(either, options):
    noise = torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(1))
    expected = inpaint(either, steps=5, noise=noise, paste_back=False, **options).image
    assert same_image(whole_image(either, by_name(either, noise, **options), SIZES[0]), expected)
    assert not same_image(whole_image(either, by_name(either, noise.flip(3), **options), SIZES[0]), expected)


def test_inpainting_conditioning(pipe):
    known = pipe.encode_image(*(side[:, :67] for side in (IMAGE, MASK)))
    assert known.mask.shape == (1, 1, 8, 9)
    assert known.latents.shape == known.masked_latents.shape == (1, 4, 8, 9)
    assert set(known.mask.unique().tolist()) == {0, 1}
    assert pipe.encode_image(IMAGE, MASK, latents=False).latents is None
    sampled = pipe.encode_image(IMAGE, MASK, draws=Draws([1], pipe.device))
    mean = pipe.encode_image(IMAGE, MASK)
    assert torch.equal(mean.masked_latents, pipe.encode_image(IMAGE, MASK).masked_latents)
    assert not torch.equal(sampled.masked_latents, mean.masked_latents)
    tensor = torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(pipe.vae.encode(tensor), mean.latents, atol=1e-5)
