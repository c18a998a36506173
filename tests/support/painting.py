"""Images, holes and runs that tests of `Pipeline.inpaint` share."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest

from sdinpaint.images.input_image import to_uint8
from sdinpaint.pipeline import patch_sampling

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


def random_image(height, width, channels=3, seed=0):
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, channels), dtype=np.uint8)


def hole(height, width):
    """A mask that keeps to no cell of 8 pixels."""
    mask = np.zeros((height, width), bool)
    mask[13 : height - 20, 22 : width - 9] = True
    return mask


IMAGE, MASK = random_image(*SIZES[0]), hole(*SIZES[0])


@contextmanager
def unrounded():
    """Give a list of the images in [0, 1], float (1, 3, 8H, 8W), that runs within it round to 8 bits."""
    images = []

    def keep(image):
        images.append((image / 2 + 0.5).clamp(0, 1))
        return to_uint8(image)

    with patch.object(patch_sampling, "to_uint8", keep):
        yield images


def inpaint(pipe, image=IMAGE, mask=MASK, prompt="a red fox", **options):
    return pipe.inpaint(image, mask, prompt, **{"steps": 3, "seed": 5, "progress": False} | options)


def pixels(image):
    return np.asarray(image).astype(int)


def levels(one, other):
    """The largest difference of two images, in levels of 255."""
    return int(np.abs(pixels(one) - pixels(other)).max())
