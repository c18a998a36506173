"""Results that are no images are told, whatever made them so; usual ones never are."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import sdinpaint
from sdinpaint.sampling import SAMPLERS

IMAGE = np.stack(np.broadcast_arrays(*np.mgrid[40:232:3, 20:212:3], 90), -1).astype(np.uint8)
MASK = np.zeros((64, 64), bool)
MASK[16:48, 16:48] = True


@pytest.fixture(scope="module")
def demo():
    return sdinpaint.load("demo", device="cpu", progress=False)


@pytest.fixture
def changed(demo):
    """A pipeline whose networks may be changed."""
    parts = {name: copy.deepcopy(getattr(demo, name)) for name in ("unet", "vae")}
    return sdinpaint.Pipeline(demo.family, parts["unet"], parts["vae"], demo.condition.encoders, demo.tokenizer)


def doubts(pipe, image=IMAGE, **options):
    options = {"steps": 4, "seed": 3, "progress": False} | options
    result = pipe.inpaint(image, MASK, "a red ball", **options)
    return [(remark.index, str(remark)) for remark in result.warnings if "probably burnt" in str(remark)]


def scale(model, factor):
    for weight in model.parameters():
        weight.data.mul_(factor)


def hooked(model, factor):
    [*_, last] = (layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))
    last.register_forward_hook(lambda layer, given, output: output * factor)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("unet", lambda unet: scale(unet, 10), "latents"),
        ("unet", lambda unet: scale(unet, 0), "latents"),
        ("unet", lambda unet: hooked(unet, 1e6), "latents"),
        ("vae", lambda vae: scale(vae, 0), "standard deviation of 0"),
        ("vae", lambda vae: scale(vae, 1e-3), "standard deviation"),
        ("vae", lambda vae: hooked(vae, 1e-6), "standard deviation"),
        ("vae", lambda vae: hooked(vae.decoder, 1e6), "decoded values have a root mean square"),
    ],
)
@pytest.mark.filterwarnings("ignore::sdinpaint.SdInpaintWarning")
def test_models_that_make_no_image(changed, part, change, says):
    change(getattr(changed, part))
    [(index, found)] = doubts(changed)
    assert index == 0
    assert says in found


@pytest.mark.parametrize("change", [lambda x: x * 2, lambda x: x * 0, lambda x: x + 5, lambda x: x * 1e4])
@pytest.mark.filterwarnings("ignore::sdinpaint.SdInpaintWarning")
def test_latents_that_a_callback_spoils(demo, change):
    [(index, found)] = doubts(demo, on_step=lambda step, x, x0: change(x))
    assert index == 0
    assert "latents" in found


@pytest.mark.filterwarnings("ignore::sdinpaint.SdInpaintWarning")
def test_the_image_of_a_batch_is_named(demo):
    def spoil(step, x, x0):
        return torch.cat([x[:1], x[1:2] * 100, x[2:]])

    [(index, found)] = doubts(demo, [IMAGE] * 3, on_step=spoil)
    assert index == 1
    assert found.startswith("image 2 of 3: ")


@pytest.mark.parametrize("level", [0, 127, 255])
def test_plain_images_are_not_doubted(demo, level):
    assert not doubts(demo, np.full_like(IMAGE, level), steps=10)


@pytest.mark.parametrize("options", [{"sampler": name} for name in SAMPLERS] + [{"guidance_scale": 30}, {"steps": 1}])
def test_usual_runs_are_not_doubted(demo, options):
    assert not doubts(demo, **{"steps": 8} | options)


@pytest.mark.parametrize(("rows", "count"), [(slice(16, 48), 1), (slice(0, 16), 0)], ids=["inside", "outside"])
@pytest.mark.filterwarnings("ignore::sdinpaint.SdInpaintWarning")
def test_only_what_is_repainted_counts(demo, substitute, rows, count):
    decode = demo.decode

    def spoilt(latents):
        image = decode(latents)
        image[:, :, rows] *= 100
        return image

    substitute(demo, decode=spoilt)
    assert len(doubts(demo)) == count
