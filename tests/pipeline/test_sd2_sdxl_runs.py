"""Whole runs of SD2 and SDXL against diffusers' pipelines over the same random weights, and each guard seen to fail."""

from __future__ import annotations

import copy
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from builders import as_sd2, as_sdxl, for_text_to_image
from peers import pipeline_twin
from PIL import Image

from sdinpaint.loading import load, save_diffusers
from sdinpaint.models import clip
from sdinpaint.sampling import find_sampler, find_spacing, schedule, schedules
from sdinpaint.sampling.noise import Draws
from sdinpaint.text import conditioning

# numpy 2 says it of diffusers
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

PROMPT, NEGATIVE = "a red fox on the a", "a blue cube"
STEPS = 6
TOLERANCE = 3e-4
ONE_LEVEL = 1
"""The difference in levels of 255 where rounding falls the other way."""
SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}
COVER = "nearest"
"""How diffusers makes a mask of latents."""
NINE = ("sd2", "sd2-v", "sdxl")


def image_and_mask(height=64, width=72):
    """A smooth image with some grain, no square, and a hole that keeps to no cell of 8 pixels."""
    rows, columns = np.mgrid[:height, :width] / 64
    grain = np.random.default_rng(1).normal(0, 0.05, (height, width, 3))
    waves = [0.5 + 0.4 * np.sin(5 * rows + 3 * columns * shift + shift) for shift in range(3)]
    image = Image.fromarray((255 * (np.stack(waves, -1) + grain).clip(0, 1)).astype(np.uint8))
    mask = np.zeros((height, width), np.uint8)
    mask[13:45, 22:57] = 255
    return image, Image.fromarray(mask)


@pytest.fixture(scope="module")
def pairs(tiny, vocabulary, tmp_path_factory):
    """pairs(name) -> diffusers' pipeline, and ours as loaded from the folder that diffusers saved."""
    nine = {"sd2": as_sd2(tiny), "sd2-v": as_sd2(tiny, "v"), "sdxl": as_sdxl(tiny)}
    families = nine | {f"{name} of 4": for_text_to_image(family) for name, family in nine.items()}
    made = {}

    def pair(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("twins")
            vocabulary.save(folder / "vocabulary")
            theirs = pipeline_twin(families[name], folder / "vocabulary")
            with torch.no_grad():
                theirs.vae.decoder.conv_out.weight.mul_(0.25)  # so that few pixels are clamped to black or white
            theirs.save_pretrained(folder / "pipeline")
            made[name] = theirs, load(folder / "pipeline", device="cpu", progress=False)
            assert made[name][1].family == families[name]
        return made[name]

    return pair


@pytest.fixture(scope="module")
def noise():
    return torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(8))


def run_theirs(theirs, *, seed, sampler="ddim", spacing="leading", negative_prompt=NEGATIVE, **options):
    image, mask = image_and_mask()
    theirs.scheduler = SCHEDULERS[sampler].from_config(theirs.scheduler.config, timestep_spacing=spacing)
    return theirs(
        PROMPT,
        image=image,
        mask_image=mask,
        negative_prompt=negative_prompt,
        height=image.height,
        width=image.width,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(seed),
        **{"strength": 1.0, **options},
    ).images


@pytest.fixture(scope="module")
def floats_of_theirs(pairs, noise):
    """floats_of_theirs(name, **options) -> diffusers' image before it is rounded; computed once."""
    made = {}

    def run(name, **options):
        key = name, *options.items()
        if key not in made:
            made[key] = run_theirs(pairs(name)[0], seed=7, latents=noise, output_type="pt", **options)
            assert made[key].std() > 0.05
            assert ((made[key] > 0) & (made[key] < 1)).float().mean() > 0.9
        return made[key]

    return run


@torch.inference_mode()
def floats_of_ours(mine, noise, sampler="ddim", spacing="leading", negative_prompt=NEGATIVE):
    """The run step by step; with the start noise given, the masked image's posterior is what the seed draws first."""
    image, mask = image_and_mask()
    known = mine.encode_image(image, mask, draws=Draws([7], mine.device), latents=False, cover=COVER)
    cond, uncond = mine.encode_prompts([PROMPT, negative_prompt], (image.height, image.width))
    sigmas = schedule(sampler, spacing, mine.family.schedule, STEPS)
    denoise = mine.denoiser(known, cond, uncond, guidance_scale=7.5)
    x = schedules.start(noise, sigmas, unit_variance=find_spacing(sampler, spacing).unit_variance)
    x = find_sampler(sampler).run(denoise, x, sigmas)
    return (mine.decode(schedules.finish(x, sigmas)) / 2 + 0.5).clamp(0, 1)


RUNS = [
    ("sd2", {"sampler": "ddim"}),
    ("sd2", {"sampler": "euler"}),
    ("sd2-v", {"sampler": "ddim"}),
    ("sd2-v", {"sampler": "euler", "spacing": "trailing"}),
    ("sd2", {"negative_prompt": None}),
    ("sdxl", {"sampler": "ddim"}),
    ("sdxl", {"sampler": "euler"}),
    ("sdxl", {"sampler": "euler", "spacing": "trailing"}),
    ("sdxl", {"negative_prompt": None}),
    ("sdxl", {"negative_prompt": ""}),
]


@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_floats(pairs, noise, floats_of_theirs, name, options):
    difference = floats_of_ours(pairs(name)[1], noise, **options) - floats_of_theirs(name, **options)
    assert difference.abs().max() <= TOLERANCE


# Broken on purpose: `mine` is a copy with a text side of its own, `patch` pytest's monkeypatch.


def text(number, **changes):
    """Another configuration of a text encoder."""

    def apply(mine, sabotage):
        encoder = mine.condition.encoders[number]
        encoder.config = replace(encoder.config, **changes)

    return apply


def padding(number, pad_id):
    """Another padding for a text encoder."""

    def apply(mine, sabotage):
        tokenizers = list(mine.condition.tokenizers)
        tokenizers[number] = tokenizers[number].with_padding(pad_id)
        mine.condition.tokenizers = tuple(tokenizers)

    return apply


def sizes(order):
    """Another order of the six numbers: original height and width, crop top and left, target height and width."""

    def apply(mine, sabotage, numbers=conditioning.PictureSize.numbers):
        sabotage(conditioning.PictureSize, "numbers", lambda size: [numbers(size)[i] for i in order])

    return apply


def quick_gelu(mine, sabotage):
    for layer in mine.condition.encoders[-1].text_model.encoder.layers:
        layer.mlp.activation = clip.quick_gelu


def other_prediction(mine, sabotage):
    kind = {"eps": "v", "v": "eps"}[mine.family.schedule.prediction]
    mine.family = replace(mine.family, schedule=replace(mine.family.schedule, prediction=kind))


def empty_prompt_for_none(mine, sabotage):
    mine.condition.family = replace(mine.family, zeros_for_none=False)


def sizes_are_lost_with_the_text(mine, sabotage, call=conditioning.TextConditioner.__call__):
    def zeros(self, prompts, size):
        found = call(self, prompts, size)
        return found if prompts != [None] else replace(found, vector=0 * found.vector)

    sabotage(conditioning.TextConditioner, "__call__", zeros)


def pooled_at_the_last_position(mine, sabotage):
    sabotage(clip, "end_positions", lambda ids: torch.full((len(ids),), -1))


BREAKS = [
    ("sd2", "no final norm", text(0, final_norm=False)),
    ("sd2", "penultimate of 23 layers", text(0, skip_last=1)),
    ("sd2", "padded with the end token", padding(0, None)),
    ("sd2", "kind of gelu", quick_gelu),
    ("sd2", "v for eps", other_prediction),
    ("sd2-v", "eps for v", other_prediction),
    ("sdxl", "final norm of the first", text(0, final_norm=True)),
    ("sdxl", "final norm of the second", text(1, final_norm=True)),
    ("sdxl", "last layer of the first", text(0, skip_last=0)),
    ("sdxl", "last layer of the second", text(1, skip_last=0)),
    ("sdxl", "first padded with 0", padding(0, 0)),
    ("sdxl", "second padded with the end token", padding(1, None)),
    ("sdxl", "width before height", sizes([1, 0, 2, 3, 5, 4])),
    ("sdxl", "target before crop", sizes([0, 1, 4, 5, 2, 3])),
    ("sdxl", "pooled at the last position", pooled_at_the_last_position),
    ("sdxl", "empty prompt for none", empty_prompt_for_none),
    ("sdxl", "zeros for the sizes too", sizes_are_lost_with_the_text),
]


@pytest.mark.parametrize(("name", "what", "broken"), BREAKS, ids=[f"{name}: {what}" for name, what, _ in BREAKS])
def test_a_broken_run_is_seen(pairs, noise, floats_of_theirs, name, what, broken, sabotage):
    mine = copy.copy(pairs(name)[1])
    mine.condition = copy.deepcopy(mine.condition)
    options = {"negative_prompt": None} if name == "sdxl" else {}
    broken(mine, sabotage)
    difference = floats_of_ours(mine, noise, **options) - floats_of_theirs(name, **options)
    assert difference.abs().max() > 2 * TOLERANCE


# Images from a seed alone: the order of the draws is diffusers'


def levels(one, other):
    """The largest difference of two images, in levels of 255."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


SEEDED = [
    *((name, {"strength": strength}) for name in NINE for strength in (1.0, 0.7)),
    *((f"{name} of 4", {"strength": strength}) for name in NINE for strength in (1.0, 0.7)),
    ("sdxl", {"negative_prompt": None, "sampler": "euler"}),
    ("sdxl of 4", {"negative_prompt": None, "sampler": "euler", "strength": 0.7}),
]


@pytest.mark.parametrize(("name", "options"), SEEDED, ids=str)
def test_images(pairs, name, options):
    theirs, mine = pairs(name)
    expected = run_theirs(theirs, seed=9, **options)[0]
    options = {"negative_prompt": NEGATIVE, "steps": STEPS, "paste_back": False, "cover": COVER, **options}
    found = mine.inpaint(*image_and_mask(), PROMPT, seed=9, progress=False, **options)
    assert levels(found.image, expected) <= ONE_LEVEL
    assert found.settings["negative_prompt"] == options["negative_prompt"]


@pytest.mark.parametrize("name", ["sd2-v", "sdxl", "sd2-v of 4", "sdxl of 4"])
def test_diffusers_loads_what_we_save(pairs, tmp_path, name):
    theirs, mine = pairs(name)
    save_diffusers(tmp_path, mine)
    again = type(theirs).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.prediction_type == theirs.scheduler.config.prediction_type
    assert levels(run_theirs(again, seed=15)[0], run_theirs(theirs, seed=15)[0]) <= ONE_LEVEL
    by_itself = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    kind, task = "XL" if name.startswith("sdxl") else "", "" if name.endswith("4") else "Inpaint"
    assert type(by_itself).__name__ == f"StableDiffusion{kind}{task}Pipeline"
