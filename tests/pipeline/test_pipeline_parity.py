"""Whole runs against diffusers' inpainting pipelines over the same random weights, and each guard seen to fail."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peers import pipeline_twin
from PIL import Image
from torch import nn

from sdinpaint import latent_diffusion
from sdinpaint.images.input_image import pad_to_multiple
from sdinpaint.loading import load, save_diffusers
from sdinpaint.pipeline import repaint
from sdinpaint.sampling import Denoiser, find_sampler, schedule, schedules
from sdinpaint.sampling.noise import Draws

# numpy 2 says it of diffusers
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

PROMPT, NEGATIVE = "a red fox on the a", "a blue cube"
STEPS = 6
TOLERANCE = 3e-4
ONE_LEVEL = 1
"""The difference in levels of 255 where rounding falls the other way."""


def image_and_mask(height=64, width=72):
    """A smooth image with some grain, and a hole that keeps to no cell of 8 pixels."""
    rows, columns = np.mgrid[:height, :width] / 64
    grain = np.random.default_rng(1).normal(0, 0.05, (height, width, 3))
    waves = [0.5 + 0.4 * np.sin(5 * rows + 3 * columns * shift + shift) for shift in range(3)]
    image = Image.fromarray((255 * (np.stack(waves, -1) + grain).clip(0, 1)).astype(np.uint8))
    mask = np.zeros((height, width), np.uint8)
    mask[13:45, 22:57] = 255
    return image, Image.fromarray(mask)


def pair(family, vocabulary, folder):
    """diffusers' pipeline, and ours as loaded from the folder that diffusers saved."""
    vocabulary.save(folder / "vocabulary")
    theirs = pipeline_twin(family, folder / "vocabulary")
    with torch.no_grad():
        theirs.vae.decoder.conv_out.weight.mul_(0.25)  # so that few pixels are clamped to black or white
    theirs.save_pretrained(folder / "pipeline")
    return theirs, load(folder / "pipeline", device="cpu", progress=False)


@pytest.fixture(scope="module")
def pipes(tiny, vocabulary, tmp_path_factory):
    return pair(tiny, vocabulary, tmp_path_factory.mktemp("nine"))


@pytest.fixture(scope="module")
def four_channel_pipes(tiny, vocabulary, tmp_path_factory):
    family = replace(tiny, name="sd15", unet=replace(tiny.unet, in_channels=4))
    return pair(family, vocabulary, tmp_path_factory.mktemp("four"))


def scheduler(config, sampler):
    import diffusers

    match sampler:
        case "ddim":
            return diffusers.DDIMScheduler.from_config(config, timestep_spacing="leading")
        case "euler":
            return diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="leading")
        case "euler_ancestral":
            return diffusers.EulerAncestralDiscreteScheduler.from_config(config, timestep_spacing="leading")
        case "dpmpp_2m":
            return diffusers.DPMSolverMultistepScheduler.from_config(config, timestep_spacing="linspace")


def run_theirs(theirs, image, mask, *, seed, sampler="ddim", steps=STEPS, **options):
    theirs.scheduler = scheduler(theirs.scheduler.config, sampler)
    return theirs(
        PROMPT,
        image,
        mask,
        negative_prompt=NEGATIVE,
        height=image.height,
        width=image.width,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).images


def run_ours(mine, image, mask, **options):
    options = {"steps": STEPS, "paste_back": False, "cover": "nearest", **options}  # diffusers knows no other
    return mine.inpaint(image, mask, PROMPT, NEGATIVE, progress=False, **options)


def levels(one, other):
    """The largest difference of two images, in levels of 255."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


# The image before it is rounded


def floats_of_theirs(theirs, noise, sampler, guidance_scale):
    options = {"seed": 7, "sampler": sampler, "guidance_scale": guidance_scale, "latents": noise}
    found = run_theirs(theirs, *image_and_mask(), output_type="pt", **options)
    assert found.std() > 0.05
    assert ((found > 0) & (found < 1)).float().mean() > 0.9
    return found


@torch.inference_mode()
def floats_of_ours(mine, noise, sampler, guidance_scale):
    """The run step by step; with the start noise given, the masked image's posterior is what the seed draws first."""
    known = mine.encode_image(*image_and_mask(), draws=Draws([7], mine.device), latents=False, cover="nearest")
    cond, uncond = mine.encode_prompts([PROMPT, NEGATIVE])
    sigmas = schedule(sampler, "leading", mine.family.schedule, STEPS)
    denoise = mine.denoiser(known, cond, uncond, guidance_scale=guidance_scale)
    x = find_sampler(sampler).run(denoise, schedules.start(noise, sigmas), sigmas)
    return (mine.decode(schedules.finish(x, sigmas)) / 2 + 0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def noise():
    return torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_floats(pipes, noise, sampler, guidance_scale):
    theirs, mine = pipes
    expected = floats_of_theirs(theirs, noise, sampler, guidance_scale)
    assert (floats_of_ours(mine, noise, sampler, guidance_scale) - expected).abs().max() <= TOLERANCE


def test_given_noise_gives_the_same_image(pipes, noise):
    theirs, mine = pipes
    expected = run_theirs(theirs, *image_and_mask(), seed=7, latents=noise)[0]
    assert levels(run_ours(mine, *image_and_mask(), seed=7, noise=noise).image, expected) <= ONE_LEVEL


# Broken on purpose: `mine` is a copy, `patch` pytest's monkeypatch.


def denoiser(change):
    """Change what the denoiser is built from: change(cond, uncond, options) -> the same three."""

    def apply(mine, sabotage):
        def build(unet, train_sigmas, prediction, cond, uncond, **options):
            cond, uncond, options = change(cond, uncond, options)
            return Denoiser(unet, train_sigmas, prediction, cond, uncond, **options)

        sabotage(latent_diffusion, "Denoiser", build)

    return apply


def extra(change):
    """Change the five extra channels: change(mask, masked_latents) -> two tensors."""
    return denoiser(lambda cond, uncond, options: (cond, uncond, {**options, "extra": change(*options["extra"])}))


def plan(**changes):
    """Another noise schedule."""

    def apply(mine, sabotage):
        mine.family = replace(mine.family, schedule=replace(mine.family.schedule, **changes))

    return apply


class AllChannelsScaled(nn.Module):
    """A UNet whose mask and masked latents are scaled as its noisy latents are."""

    def __init__(self, unet, sigmas):
        super().__init__()
        self.unet, self.sigmas = unet, sigmas

    def forward(self, x, t, context, vector, control):
        scale = math.hypot(1, self.sigmas[int(t[0])])
        return self.unet(torch.cat([x[:, :4], x[:, 4:] / scale], dim=1), t, context, vector)


def all_channels_scaled(mine, sabotage):
    mine.unet = AllChannelsScaled(mine.unet, mine.train_sigmas)


def start_without_latents(mine, sabotage, start=schedules.start):
    sabotage(schedules, "start", lambda noise, sigmas: start(noise, sigmas, unit_variance=False))


BREAKS = {
    "masked latents before the mask": extra(lambda mask, latents: (latents, mask)),
    "inverted mask": extra(lambda mask, latents: (1 - mask, latents)),
    "unscaled masked latents": extra(lambda mask, latents: (mask, latents / 0.21)),
    "no masked latents": extra(lambda mask, latents: (mask, 0 * latents)),
    "scaled mask and masked latents": all_channels_scaled,
    "prompts exchanged": denoiser(lambda cond, uncond, options: (uncond, cond, options)),
    "start without the variance of latents": start_without_latents,
    "steps without offset": plan(steps_offset=0),
    "another last sigma": plan(end_at_zero=True),
    "another prediction": plan(prediction="v"),
}


@pytest.mark.parametrize("broken", list(BREAKS))
def test_a_broken_run_is_seen(pipes, noise, broken, sabotage):
    theirs, mine = pipes
    mine = copy.copy(mine)
    BREAKS[broken](mine, sabotage)
    expected = floats_of_theirs(theirs, noise, "ddim", 7.5)
    assert (floats_of_ours(mine, noise, "ddim", 7.5) - expected).abs().max() > 2 * TOLERANCE


# Images from a seed alone: the order of the draws is diffusers'

RUNS = [
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "ddim", "eta": 0.5, "strength": 0.6},
    {"sampler": "ddim", "strength": 0.6},
    {"sampler": "ddim", "guidance_scale": 1.0},
    {"sampler": "ddim", "guidance_scale": 1.0, "strength": 0.3, "eta": 1.0},
    {"sampler": "euler"},
    {"sampler": "euler", "strength": 0.6},
    {"sampler": "euler_ancestral"},
    {"sampler": "euler_ancestral", "strength": 0.6},
    {"sampler": "dpmpp_2m"},
]


def name(run):
    return " ".join(map(str, run.values()))


@pytest.mark.parametrize("run", RUNS, ids=name)
def test_images(pipes, run):
    theirs, mine = pipes
    expected = run_theirs(theirs, *image_and_mask(), seed=9, **run)[0]
    assert levels(run_ours(mine, *image_and_mask(), seed=9, **run).image, expected) <= ONE_LEVEL


@pytest.mark.parametrize("run", RUNS[:4] + RUNS[6:8], ids=name)
def test_images_of_a_four_channel_model(four_channel_pipes, run):
    theirs, mine = four_channel_pipes
    expected = run_theirs(theirs, *image_and_mask(), seed=10, **run)[0]
    assert levels(run_ours(mine, *image_and_mask(), seed=10, **run).image, expected) <= ONE_LEVEL


def test_another_order_of_draws_is_seen(pipes, sabotage):
    theirs, mine = pipes

    class OneDrawMore(Draws):
        def __init__(self, seeds, device):
            super().__init__(seeds, device)
            self(torch.empty(1, 4, 8, 9))

    expected = run_theirs(theirs, *image_and_mask(), seed=9)[0]
    sabotage(repaint, "Draws", OneDrawMore)
    assert levels(run_ours(mine, *image_and_mask(), seed=9).image, expected) > 3 * ONE_LEVEL


@pytest.mark.parametrize(("height", "width"), [(65, 66), (70, 83), (71, 64)])
def test_sizes_that_are_no_multiple_of_8(pipes, height, width):
    theirs, mine = pipes
    image, mask = image_and_mask(height, width)
    padded, crop = pad_to_multiple(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None])
    hole, _ = pad_to_multiple(torch.from_numpy(np.asarray(mask).copy())[None, None])
    padded, hole = (Image.fromarray(one[0].permute(1, 2, 0).squeeze(-1).numpy()) for one in (padded, hole))
    expected = np.asarray(run_theirs(theirs, padded, hole, seed=11)[0])[crop]
    found = run_ours(mine, image, mask, seed=11).image
    assert found.size == (width, height)
    assert levels(found, expected) <= ONE_LEVEL


# What a run promises beside parity


@pytest.mark.parametrize("run", [{}, {"eta": 1.0}, {"strength": 0.6, "eta": 1.0}], ids=name)
def test_an_item_of_a_batch_is_its_single_run(pipes, run):
    _, mine = pipes
    seeds = [12, 0, 13]
    batch = run_ours(mine, *image_and_mask(), seed=seeds, **run)
    assert batch.seeds == seeds
    for seed, found in zip(seeds, batch.images, strict=True):
        assert levels(found, run_ours(mine, *image_and_mask(), seed=seed, **run).image) <= ONE_LEVEL
    assert levels(batch.images[0], batch.images[1]) > 3 * ONE_LEVEL


def test_unmasked_pixels_stay_bit_for_bit(pipes):
    _, mine = pipes
    image, mask = image_and_mask(70, 83)
    whole = np.asarray(run_ours(mine, image, mask, seed=14).image)
    pasted = np.asarray(run_ours(mine, image, mask, seed=14, paste_back=True).image)
    options = {"steps": STEPS, "seed": 14, "cover": "nearest", "progress": False}
    default = np.asarray(mine.inpaint(image, mask, PROMPT, NEGATIVE, **options).image)
    hole = np.asarray(mask) > 0
    assert np.array_equal(default, pasted)
    assert np.array_equal(pasted[~hole], np.asarray(image)[~hole])
    assert np.array_equal(pasted[hole], whole[hole])
    assert not np.array_equal(whole[~hole], np.asarray(image)[~hole])


def test_diffusers_loads_what_we_save(pipes, tmp_path):
    from diffusers import StableDiffusionInpaintPipeline

    theirs, mine = pipes
    save_diffusers(tmp_path, mine)
    again = StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.timestep_spacing == "leading"
    found, expected = (run_theirs(pipe, *image_and_mask(), seed=15)[0] for pipe in (again, theirs))
    assert levels(found, expected) <= ONE_LEVEL
