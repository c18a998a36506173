"""An image holds what makes it again: the same one, or an error that says what is missing or different."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import random_pipeline, small
from closeness import same_image
from PIL import Image

from sdinpaint.errors import CheckpointError, ImageError, SdInpaintError, SettingError
from sdinpaint.images.files import read_settings, save_png
from sdinpaint.replaying import replay

RNG = np.random.default_rng(2)
IMAGE = RNG.integers(0, 256, (64, 72, 3), dtype=np.uint8)
MASK = np.zeros((64, 72), np.uint8)
MASK[10:50, 20:44] = 255
SHORT = {"steps": 2, "seed": 4, "progress": False}
MADE = {
    "plain": {},
    "soft": {"soft": True},
    "crop": {"crop": 8, "regions": "each", "blend": "poisson", "match_color": True},
    "fill": {"strength": 0.5, "fill": "noise", "sampler": "euler_ancestral"},
}


@pytest.fixture
def files(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    return tmp_path


def saved(result, folder):
    return result.save(folder / "out.png")[0]


def made(pipe, files, **options):
    return pipe.inpaint(files / "photo.png", files / "mask.png", "a red fox", **SHORT, **options)


@pytest.mark.parametrize("options", MADE.values(), ids=list(MADE))
def test_an_inpainted_image_is_made_again(pipe, files, options):
    again = replay(saved(made(pipe, files, **options), files), pipe, progress=False)
    assert again.identical
    assert (again.changed, again.largest, again.differences) == (0, 0, [])


def test_so_are_others(pipe, files):
    varied = pipe.vary(files / "photo.png", "a red fox", **SHORT)
    extended = pipe.outpaint(files / "photo.png", "a red fox", right=24, top=8, overlap=8, crop=8, **SHORT)
    sized = pipe.outpaint(files / "photo.png", "a red fox", size=(80, 80), anchor="left", fill="reflect", **SHORT)
    for result in (varied, extended, sized):
        assert replay(saved(result, files), pipe, progress=False).identical


def test_each_of_several(pipe, files):
    result = pipe.inpaint([IMAGE, IMAGE[:56]], [MASK, MASK[:56]], ["a fox", "a cube"], steps=2, progress=False)
    for index, (path, size) in enumerate(zip(result.save(files / "out.png"), (64, 56), strict=True)):
        assert path.name == f"out-{index + 1}.png"
        assert replay(path, pipe, image=IMAGE[:size], progress=False).largest <= 1


def test_an_image_that_was_changed_since_is_told_from_the_first(pipe, files):
    path = saved(made(pipe, files), files)
    settings = read_settings(path)
    pixels = np.array(Image.open(path))
    pixels[20, 30, 1] ^= 64
    save_png(Image.fromarray(pixels), path, settings)
    again = replay(path, pipe, progress=False)
    assert (again.identical, again.changed, again.largest) == (False, 1, 64)


def test_other_weights_are_named(pipe, files, tiny, vocabulary):
    path = saved(made(pipe, files), files)
    other = random_pipeline(small(tiny), vocabulary)
    with torch.no_grad():
        other.vae.load_state_dict(pipe.vae.state_dict())
        other.unet.load_state_dict(pipe.unet.state_dict())
        other.unet.out[2].bias[0] += 1
    with pytest.raises(CheckpointError) as caught:
        replay(path, other, progress=False)
    assert caught.value.code == "MANIFEST_WEIGHTS"
    assert "unet" in caught.value.found
    assert "vae" not in caught.value.found


def test_the_mask_is_in_the_image_and_the_photo_is_not(pipe, files):
    path = saved(made(pipe, files), files)
    (files / "mask.png").unlink()
    assert replay(path, pipe, progress=False).identical
    (files / "photo.png").rename(files / "moved.png")
    with pytest.raises(SettingError) as caught:
        replay(path, pipe, progress=False)
    assert caught.value.code == "MANIFEST_INPUT_MISSING"
    assert "photo.png" in str(caught.value)
    assert replay(path, pipe, image=files / "moved.png", progress=False).identical


def test_a_soft_mask_of_8_bits_is_in_the_image_too(pipe, files):
    soft = np.tile(np.linspace(0, 255, 72).astype(np.uint8), (64, 1))
    Image.fromarray(soft).save(files / "mask.png")
    path = saved(made(pipe, files, soft=True), files)
    (files / "mask.png").unlink()
    assert replay(path, pipe, progress=False).identical


@pytest.mark.parametrize("argument", ["image", "mask"])
def test_another_image_or_mask_is_refused(pipe, files, argument):
    path = saved(made(pipe, files), files)
    other = {"image": IMAGE ^ 1, "mask": np.roll(MASK, 1, axis=1)}[argument]
    with pytest.raises(SettingError) as caught:
        replay(path, pipe, progress=False, **{argument: other})
    assert (caught.value.code, caught.value.subject) == ("MANIFEST_INPUT", argument)


def test_what_no_file_holds_is_given_again(pipe, files):
    noise = torch.randn(1, 4, 8, 9)
    path = saved(made(pipe, files, noise=noise), files)
    with pytest.raises(SettingError, match="noise"):
        replay(path, pipe, progress=False)
    assert replay(path, pipe, noise=noise, progress=False).identical
    with pytest.raises(SettingError, match="without a noise"):
        replay(saved(made(pipe, files), files), pipe, noise=noise, progress=False)


def test_the_model_is_found_by_its_stored_name(files):
    import sdinpaint

    demo = sdinpaint.load("demo", device="cpu", progress=False)
    path = saved(made(demo, files), files)
    again = replay(path, progress=False)
    assert same_image(again.result.image, Image.open(path))
    assert again.differences == []


@pytest.mark.parametrize("broken", ["no settings", "no manifest", "a future form", "a setting unknown here"])
def test_broken_ones(pipe, files, broken):
    path = saved(made(pipe, files), files)
    settings = read_settings(path)
    if broken == "no settings":
        Image.fromarray(IMAGE).save(path)
    else:
        if broken == "no manifest":
            del settings["manifest"]
        elif broken == "a future form":
            settings["manifest"]["form"] = 99
        else:
            settings["wobble"] = 1
        save_png(Image.open(path), path, settings)
    with pytest.raises(SdInpaintError) as caught:
        replay(path, pipe, progress=False)
    assert isinstance(caught.value, ImageError if broken == "no settings" else SettingError)
    assert caught.value.expected
    assert caught.value.hint
