"""What `Pipeline.inpaint` promises for any weights: kept pixels, batches, seeds, replays, and every step by name."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from builders import for_text_to_image, random_pipeline, small
from PIL import Image

from sdinpaint import SdInpaintWarning
from sdinpaint.batch import Draws
from sdinpaint.images import to_uint8
from sdinpaint.sampling import blend_known, find_sampler, find_spacing, restore_known, samplers, schedule, schedules

SIZES = (64, 72), (83, 101), (70, 64)
"""Height and width in pixels; two of them are no multiples of 8."""
PROMPTS = ["a red fox", "a blue cube on the a", ""]
RUNS = {
    "ddim": {"sampler": "ddim"},
    "ddim, eta 1": {"sampler": "ddim", "eta": 1.0},
    "ddim, strength 0.6": {"sampler": "ddim", "strength": 0.6},
    "euler, linspace": {"sampler": "euler", "spacing": "linspace"},
    "euler_ancestral": {"sampler": "euler_ancestral"},
    "euler_ancestral, strength 0.6": {"sampler": "euler_ancestral", "strength": 0.6},
    "dpmpp_2m, karras": {"sampler": "dpmpp_2m", "spacing": "karras"},
    "guidance 1": {"guidance_scale": 1},
}
every_run = pytest.mark.parametrize("options", RUNS.values(), ids=list(RUNS))


def picture(height, width, channels=3, seed=0):
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, channels), dtype=np.uint8)


def hole(height, width):
    """A mask that keeps to no cell of 8 pixels."""
    mask = np.zeros((height, width), bool)
    mask[13 : height - 20, 22 : width - 9] = True
    return mask


IMAGE, MASK = picture(*SIZES[0]), hole(*SIZES[0])


@pytest.fixture(scope="module")
def pipe(tiny, vocabulary):
    return random_pipeline(small(tiny), vocabulary)


@pytest.fixture(scope="module")
def four_channels(tiny, vocabulary):
    return random_pipeline(for_text_to_image(small(tiny)), vocabulary)


@pytest.fixture(params=["nine channels", "four channels"])
def either(request, pipe, four_channels):
    return pipe if request.param == "nine channels" else four_channels


def inpaint(pipe, image=IMAGE, mask=MASK, prompt="a red fox", **options):
    return pipe.inpaint(image, mask, prompt, **{"steps": 3, "seed": 5, "progress": False} | options)


def pixels(image):
    return np.asarray(image).astype(int)


def levels(one, other):
    """The largest difference of two pictures, in levels of 255."""
    return int(np.abs(pixels(one) - pixels(other)).max())


# Known pixels


@pytest.mark.parametrize("size", SIZES)
def test_known_pixels_stay_bit_for_bit(either, size):
    image, mask = picture(*size), hole(*size)
    found = np.asarray(inpaint(either, image, mask).image)
    assert found.shape == image.shape
    assert np.array_equal(found[~mask], image[~mask])
    assert (found[mask] != image[mask]).mean() > 0.9


@pytest.mark.parametrize("size", SIZES)
def test_what_lies_under_the_mask_is_not_seen(pipe, size):
    one, mask = picture(*size), np.zeros(size, bool)
    mask[size[0] // 2 :, size[1] // 3 :] = True  # up to the edge, where the picture is padded
    other = np.where(mask[..., None], picture(*size, seed=1), one)
    assert np.array_equal(inpaint(pipe, one, mask).image, inpaint(pipe, other, mask).image)
    seen = [inpaint(pipe, image, mask, strength=0.5).image for image in (one, other)]
    assert not np.array_equal(*seen)


def test_transparency_stays_where_nothing_is_repainted(pipe):
    image, mask = picture(83, 101, channels=4), hole(83, 101)
    result = inpaint(pipe, Image.fromarray(image), mask).image
    assert result.mode == "RGBA"
    found = np.asarray(result)
    assert np.array_equal(found[~mask], image[~mask])
    assert (found[mask][:, 3] == 255).all()


def test_a_batch_of_different_sizes(pipe):
    images, masks = [picture(*size) for size in SIZES], [hole(*size) for size in SIZES]
    result = inpaint(pipe, images, masks, PROMPTS, seed=[1, 2, 3])
    for i, found in enumerate(result.images):
        assert found.size == SIZES[i][::-1]
        assert np.array_equal(pixels(found)[~masks[i]], images[i][~masks[i]])
        assert levels(found, inpaint(pipe, images[i], masks[i], PROMPTS[i], seed=i + 1).image) <= 1


def test_keep_everything(either):
    for image in (IMAGE, picture(64, 72, channels=4)):
        with pytest.warns(SdInpaintWarning, match="mask is empty"):
            result = inpaint(either, Image.fromarray(image), np.zeros_like(MASK), paste_back=False)
        assert np.array_equal(result.image, image)


def test_keep_everything_in_one_item_of_a_batch(pipe):
    with pytest.warns(SdInpaintWarning, match="picture 2 of 3: the mask is empty"):
        result = inpaint(pipe, [IMAGE] * 3, [MASK, np.zeros_like(MASK), MASK], seed=[1, 2, 3])
    assert np.array_equal(result.images[1], IMAGE)
    assert levels(result.images[2], inpaint(pipe, seed=3).image) <= 1


def test_without_paste_back_the_whole_picture_is_the_models(either):
    pasted, whole = (np.asarray(inpaint(either, paste_back=paste_back).image) for paste_back in (True, False))
    assert np.array_equal(pasted[MASK], whole[MASK])
    assert (whole[~MASK] != IMAGE[~MASK]).mean() > 0.9


# Batches


@every_run
def test_an_item_of_a_batch_is_its_single_run(pipe, options):
    images = [picture(64, 72, seed=seed) for seed in range(3)]
    together = inpaint(pipe, images, MASK, PROMPTS, seed=[4, 0, 9], **options).images
    for i, seed in enumerate([4, 0, 9]):
        assert levels(together[i], inpaint(pipe, images[i], MASK, PROMPTS[i], seed=seed, **options).image) <= 1


def test_an_item_of_a_batch_is_its_single_run_with_four_channels(four_channels):
    images = [picture(64, 72, seed=seed) for seed in range(2)]
    together = inpaint(four_channels, images, MASK, PROMPTS[:2], seed=[4, 0], sampler="euler_ancestral").images
    for i, seed in enumerate([4, 0]):
        alone = inpaint(four_channels, images[i], MASK, PROMPTS[i], seed=seed, sampler="euler_ancestral").image
        assert levels(together[i], alone) <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_permuting_a_batch_permutes_the_pictures(pipe, sampler):
    images, order = [picture(64, 72, seed=seed) for seed in range(3)], [2, 0, 1]
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
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=list(MODES))
SEEDS = [4, 0, 9]
ONE_LEVEL = 1
"""Of 255: what another order of sums makes in batches of other lengths; measured, in at most 3 values of a picture."""


def three():
    """Pictures of two sizes; of the masks, whose edges are soft, two are as large, and one has two parts."""
    sizes = SIZES[0], SIZES[0], SIZES[1]
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
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
def test_one_at_a_time_an_item_is_its_single_run_bit_for_bit(either, options):
    listed = inpaint_those(either, [0, 1, 2], batch_size=1, **options)
    permuted = inpaint_those(either, [2, 0, 1], batch_size=1, **options)
    for i, found in enumerate(listed):
        (alone,) = inpaint_those(either, [i], **options)
        assert np.array_equal(found, alone)
        assert np.array_equal(found, permuted[(i + 1) % 3])
    assert levels(listed[0], listed[1]) > 20


@every_mode
def test_batches_of_any_length_give_the_same_pictures_to_a_level(either, options):
    one_by_one = inpaint_those(either, [0, 1, 2], batch_size=1, **options)
    for batch_size in (2, None):
        for order in ([0, 1, 2], [1, 2, 0]):
            found = inpaint_those(either, order, batch_size=batch_size, **options)
            assert all(levels(one, one_by_one[i]) <= ONE_LEVEL for one, i in zip(found, order, strict=True))


@pytest.mark.parametrize("options", [MODES["hard"], MODES["soft"], MODES["crop"]], ids=str)
def test_noise_that_depends_on_the_others_is_seen(pipe, monkeypatch, options):
    draw = torch.randn

    def from_one_generator(draws, like):
        return draw(like.shape, generator=draws.generators[0])

    expected = inpaint_those(pipe, [1, 1], batch_size=1, **options)
    monkeypatch.setattr(Draws, "__call__", from_one_generator)
    assert levels(inpaint_those(pipe, [1, 1], **options)[1], expected[1]) > 20 * ONE_LEVEL


def test_one_stands_for_all(pipe):
    result = inpaint(pipe, prompt=PROMPTS[:2], negative_prompt="a blue cube", seed=7)
    assert result.seeds == [7, 7]
    for found, prompt in zip(result.images, PROMPTS, strict=False):
        assert levels(found, inpaint(pipe, prompt=prompt, negative_prompt="a blue cube", seed=7).image) <= 1


def test_a_batch_in_one_tensor_is_a_list(pipe):
    images = [picture(64, 72, seed=seed) for seed in range(2)]
    tensor = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1 for image in images])
    masks = np.stack([MASK, MASK[::-1]])
    listed = inpaint(pipe, images, list(masks)).images
    stacked = inpaint(pipe, tensor, torch.from_numpy(masks)[:, None]).images
    assert all(np.array_equal(one, other) for one, other in zip(listed, stacked, strict=True))


# Seeds and replays


def test_the_same_call_gives_the_same_picture(pipe):
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
def test_settings_replay_an_extended_picture(either, where):
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
    images = [picture(64, 72, seed=seed) for seed in range(2)]
    together = inpaint(pipe, images, noise=noise, seed=[1, 2]).images
    assert levels(together[1], inpaint(pipe, images[1], noise=noise[1:], seed=2).image) <= 1
    assert levels(together[1], inpaint(pipe, images[1], noise=noise[:1], seed=2).image) > 20


# Steps


@pytest.fixture
def unet_batches(pipe):
    """A list that takes the size of what every call of the UNet puts out."""
    sizes = []
    hook = pipe.unet.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    yield sizes
    hook.remove()


def test_guidance_runs_one_batch_of_two_halves_and_without_it_one(pipe, unet_batches):
    inpaint(pipe, [IMAGE] * 3, guidance_scale=7.5)
    inpaint(pipe, [IMAGE] * 3, guidance_scale=1)
    inpaint(pipe, [IMAGE] * 3, guidance_scale=0, steps=1)
    assert unet_batches == [6, 6, 6, 3, 3, 3, 6]


def test_batch_size_is_how_many_the_models_see(pipe, unet_batches):
    for batch_size, expected in {None: [6, 6], 3: [6, 6], 2: [4, 4, 2, 2], 1: [2] * 6}.items():
        inpaint(pipe, [IMAGE] * 3, batch_size=batch_size, steps=2)
        assert unet_batches == expected
        unet_batches.clear()
    inpaint_those(pipe, [0, 2], crop=8, steps=2)
    assert unet_batches == [4, 4], "crops of one size from pictures of two"


def test_guidance_1_does_not_look_at_the_negative_prompt(pipe):
    without, with_it = (inpaint(pipe, guidance_scale=1, negative_prompt=text).image for text in ("", "a blue cube"))
    assert np.array_equal(without, with_it)
    assert levels(inpaint(pipe).image, inpaint(pipe, negative_prompt="a blue cube").image) > 1


@pytest.mark.parametrize(
    ("steps", "strength"), [(50, 0.58), (100, 0.29), (10, 0.7), (30, 1), (30, 0.99), (7, 0.5), (2, 0.01), (1, 0.3)]
)
def test_strength_runs_as_many_steps_as_it_says(pipe, monkeypatch, steps, strength):
    monkeypatch.setattr(pipe.unet, "forward", lambda x, *rest: x[:, :4].repeat(2, 1, 1, 1))
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
    assert np.array_equal(to_uint8(pipe.decode(schedules.finish(seen[-1][1], path)))[0], image)


@pytest.mark.parametrize("progress", [True, False])
def test_nothing_is_printed(pipe, capfd, progress):
    inpaint(pipe, progress=progress)
    assert capfd.readouterr() == ("", "")


def test_the_progress_bar_on_a_terminal(pipe, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    inpaint(pipe, progress=True)
    assert "3/3" in capfd.readouterr().err
    inpaint(pipe, progress=False)
    assert capfd.readouterr() == ("", "")


# What is given


def test_every_kind_of_picture_and_mask(pipe, tmp_path):
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
    assert repr(pipe) == "Pipeline('sd15-inpainting', source='', device=cpu, dtype=torch.float32)"
    assert pipe.train_sigmas.shape == (1000,)
    assert not any(weight.requires_grad for model in (pipe.unet, pipe.vae, pipe.text) for weight in model.parameters())


# One level down: every step by name gives the picture of `inpaint`


def whole_picture(pipe, latents, size):
    return to_uint8(pipe.decode(latents))[0, : size[0], : size[1]]


@pytest.mark.parametrize("size", SIZES)
def test_the_steps_by_name(pipe, size):
    image, mask = picture(*size), hole(*size)
    expected = inpaint(pipe, image, mask, sampler="euler", spacing="linspace", steps=4, seed=11, paste_back=False).image

    rows, columns = (-(-side // 8) for side in size)
    draws = Draws([11], pipe.device)
    noise = draws(torch.empty(1, 4, rows, columns))
    known = pipe.encode_image(image, mask, draws=draws, latents=False)
    cond, uncond = pipe.encode_prompts(["a red fox", ""])
    path = schedules.linspace(pipe.train_sigmas, 4)
    denoise = pipe.denoiser(known, cond, uncond, guidance_scale=7.5)
    x = samplers.euler(denoise, schedules.start(noise, path, unit_variance=False), path)
    assert np.array_equal(whole_picture(pipe, schedules.finish(x, path), size), expected)


@torch.inference_mode()
def by_name(pipe, noise, sampler="ddim", spacing=None, eta=None, strength=1.0, guidance_scale=7.5):
    """What `inpaint` does with given noise, one step after the other."""
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
    assert np.array_equal(whole_picture(either, by_name(either, noise, **options), SIZES[0]), expected)


def test_what_the_picture_says(pipe):
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
