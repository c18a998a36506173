"""Tests of what `Pipeline.vary` promises for any weights: strength, batches, replays, and that no mask is missed."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from click.testing import CliRunner
from closeness import same_image
from PIL import Image

from sdinpaint import Pipeline, cli
from sdinpaint.cli import painting
from sdinpaint.errors import ImageError, SdInpaintWarning, SettingError
from sdinpaint.images.files import read_settings
from sdinpaint.load_options import LoadOptions
from sdinpaint.pipeline.settings import ControlSettings, MaskSettings, SamplingSettings, names_of

SIZES = (64, 72), (83, 101)
PROMPTS = ["a red fox", "a blue cube on the a"]


def random_image(height=64, width=72, channels=3, seed=0):
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, channels), dtype=np.uint8)


def vary(pipe, image=None, prompt="a red fox", *strength, **options):
    image = random_image() if image is None else image
    return pipe.vary(image, prompt, *strength, **{"steps": 3, "seed": 5, "progress": False} | options)


def levels(one, other):
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_an_item_of_a_list_is_its_single_run(either, sampler):
    images = [random_image(*size) for size in SIZES]
    together = vary(either, images, PROMPTS, seed=[4, 0], sampler=sampler)
    assert together.seeds == [4, 0]
    for i, (found, (height, width)) in enumerate(zip(together.images, SIZES, strict=True)):
        assert found.size == (width, height)
        assert levels(found, vary(either, images[i], PROMPTS[i], seed=[4, 0][i], sampler=sampler).image) <= 1
    assert levels(together.images[0], images[0]) > 20


def test_one_at_a_time_an_item_is_its_single_run(either):
    images = [random_image(), random_image(seed=1), random_image(*SIZES[1])]
    together = vary(either, images, seed=[4, 0, 9], sampler="euler_ancestral", batch_size=1)
    for image, seed, found in zip(images, together.seeds, together.images, strict=True):
        assert same_image(found, vary(either, image, seed=seed, sampler="euler_ancestral").image)
    assert levels(together.images[0], together.images[1]) > 20


@pytest.mark.parametrize("options", [{}, {"strength": 1, "sampler": "euler", "spacing": "linspace"}, {"eta": 0.5}])
def test_settings_replay_the_run(either, options):
    first = vary(either, prompt=None, negative_prompt="a fox", seed=None, **options)
    again = either.vary(random_image(), **first.settings, progress=False)
    assert np.array_equal(first.image, again.image)
    assert again.settings == first.settings
    assert not set(names_of(MaskSettings, ControlSettings)) & set(first.settings)


@pytest.mark.parametrize(("steps", "strength"), [(50, 0.58), (10, 0.6), (5, 1), (2, 0.01), (7, 0.99)])
def test_strength_runs_as_many_steps_as_it_says(either, steps, strength):
    seen = []
    vary(either, steps=steps, strength=strength, on_step=lambda step, x, x0: seen.append(step))
    assert seen == list(range(max(1, math.floor(steps * strength + 1e-9))))


def test_strength_0_returns_the_image(either):
    for channels in (3, 4):
        image = random_image(channels=channels)
        with pytest.warns(SdInpaintWarning, match="strength is 0, so the image comes back unchanged") as caught:
            assert np.array_equal(vary(either, Image.fromarray(image), strength=0).image, image)
        assert [warning.filename for warning in caught] == [__file__]


def test_little_strength_stays_nearer_to_the_image(either):
    """Two images under the same noise: the more steps run, the less of what told them apart is left."""
    one, other = random_image(), np.full_like(random_image(), 40)
    apart = [
        np.abs(
            np.subtract(*(np.asarray(vary(either, image, strength=strength).image, float) for image in (one, other)))
        )
        for strength in (0.34, 1)
    ]
    assert apart[0].mean() > apart[1].mean() > 0


def test_an_inpainting_model_varies_as_it_repaints_everything(pipe):
    everything = np.ones((64, 72), bool)
    options = {"strength": 0.7, "steps": 3, "seed": 5, "sampler": "euler_ancestral", "progress": False}
    expected = pipe.inpaint(random_image(), everything, "a red fox", **options).image
    assert same_image(vary(pipe, **options).image, expected)
    assert not same_image(vary(pipe, **options | {"seed": 6}).image, expected)


def test_the_whole_image_is_new_and_opaque(pipe):
    found = np.asarray(vary(pipe, Image.fromarray(random_image(channels=4))).image)
    assert found.shape == (64, 72, 4)
    assert (found[..., 3] == 255).all()
    assert (found[..., :3] != random_image(channels=4)[..., :3]).mean() > 0.9


def test_what_is_given(pipe):
    tensor_batch = [random_image(), random_image(seed=1)]
    assert len(vary(pipe, tensor_batch, seed=[1, 2]).images) == 2
    with pytest.raises(SettingError, match=r"2 images, .*3 prompts"):
        vary(pipe, tensor_batch, ["a", "b", "c"])
    with pytest.raises(ImageError):
        vary(pipe, 7)
    for name, value in {"strength": 1.5, "steps": 0, "sampler": "dimm", "prompt": 3}.items():
        with pytest.raises(SettingError) as caught:
            vary(pipe, **{name: value})
        assert caught.value.subject == name


def test_very_high_guidance_warns_whoever_asked(pipe):
    with pytest.warns(SdInpaintWarning, match="guidance_scale 31") as caught:
        vary(pipe, guidance_scale=31)
    assert caught[0].filename == __file__


def test_on_the_command_line(pipe, tmp_path, loads):
    loads(pipe)
    photo, out = tmp_path / "photo.png", tmp_path / "out.png"
    Image.fromarray(random_image()).save(photo)
    given = ["--prompt=a red fox", "--model=any", f"--out={out}", "--steps=3", "--seed=5", "--strength=0.7"]
    done = CliRunner().invoke(cli.main, ["vary", str(photo), *given])
    assert done.exit_code == 0, done.output
    assert np.array_equal(Image.open(out), vary(pipe, strength=0.7).image)
    assert np.array_equal(Image.open(out), pipe.vary(photo, **read_settings(out), progress=False).image)
    assert CliRunner().invoke(cli.main, ["vary", str(photo), *given, "--strength=2"]).exit_code == 3
    assert CliRunner().invoke(cli.main, ["vary", str(photo), *given, "--cover=max"]).exit_code == 2


def test_options_of_the_command_line_are_those_of_the_library():
    least = ["photo.png", "--prompt=a red fox", "--model=demo", "--out=out.png"]
    options = cli.main.commands["vary"].make_context("vary", least).params
    settings = set(options) - set(inspect.signature(painting._paint).parameters) - set(names_of(LoadOptions))
    defaults = inspect.signature(Pipeline.vary).parameters
    assert settings == set(names_of(SamplingSettings))
    assert settings | {"manifest"} <= set(defaults)
    for name in settings - {"batch_size"}:  # one image at a time is written as soon as it is done
        assert options[name] == defaults[name].default
