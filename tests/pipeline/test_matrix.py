"""Samplers, modes, strengths and dtypes on the included checkpoint: users try them all."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import sdinpaint
from sdinpaint.sampling import SAMPLERS
from sdinpaint.training.scenes import object_mask, random_scene, render

STEPS = 5
STRENGTHS = 0.2, 0.4, 0.6, 0.8, 1.0
MODES = {
    "nine channels": {},
    "four channels": {},
    "soft": {"soft": True},
    "four channels, soft": {"soft": True},
    "crop": {"crop": 8, "regions": "each"},
    "crop, joined": {"crop": "auto", "blend": "poisson", "match_color": True, "fill": "blur"},
    "outpaint": {"right": 40, "top": 16},
    "vary": {},
}
DTYPES = torch.float32, torch.bfloat16, torch.float16
SIZE = 64


def scene(size=SIZE):
    """An image, the hole around one of its things, and a soft mask around that."""
    rng = np.random.default_rng(8)
    drawn = random_scene(rng)
    hole = object_mask(rng, drawn, drawn.things[0], size).astype(np.float32)
    ramp = np.where(np.arange(size) > size // 2, np.linspace(0, 1, size), 0).astype(np.float32)
    return render(drawn, size), hole, np.maximum(hole, ramp)


@pytest.fixture(scope="module")
def nine(dtype):
    return sdinpaint.load("demo", dtype=dtype, device="cpu", progress=False)


@pytest.fixture(scope="module")
def four(nine):
    """The pipeline without the channels for mask and masked image: it blends what is known into its latents."""
    family = replace(nine.family, unet=replace(nine.family.unet, in_channels=4))
    unet = copy.deepcopy(nine.unet)
    first = unet.input_blocks[0][0]
    first.weight = torch.nn.Parameter(first.weight[:, :4].contiguous(), requires_grad=False)
    unet.config = family.unet
    return sdinpaint.Pipeline(family, unet, nine.vae, nine.text, nine.tokenizer)


def turns():
    """Every mode with every sampler, and each of those with every dtype and strength, though not all with all."""
    for mode, sampler in product(range(len(MODES)), range(len(SAMPLERS))):
        turn, names = mode + sampler, ([*SAMPLERS][sampler], [*MODES][mode])
        yield torch.float32, *names, (STRENGTHS[turn % 5], STRENGTHS[(turn + 2) % 5])
        yield DTYPES[1 + turn % 2], *names, (STRENGTHS[turn % 5],)


@pytest.mark.parametrize(("dtype", "sampler", "mode", "strengths"), list(turns()), scope="module", ids=str)
def test_a_run_is_finite_exact_outside_of_the_hole_and_as_long_as_asked_for(nine, four, sampler, mode, strengths):
    for strength in strengths:
        check(four if "four" in mode else nine, sampler, mode, strength)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, scope="module", ids=str)
@pytest.mark.parametrize(("sampler", "mode"), list(product(SAMPLERS, MODES)))
def test_every_strength_in_every_dtype(nine, four, sampler, mode):
    for strength in STRENGTHS:
        check(four if "four" in mode else nine, sampler, mode, strength)


def check(pipe, sampler, mode, strength):
    options = MODES[mode]
    image, mask, soft = scene()
    finite = []

    def watch(step, x, x0):
        finite.append(bool((x.isfinite() & x0.isfinite()).all()))

    settings = {"sampler": sampler, "strength": strength, "steps": STEPS, "seed": 1, "progress": False}
    if mode == "vary":
        result = pipe.vary(image, "a red ball", on_step=watch, **settings)
    elif mode == "outpaint":
        result = pipe.outpaint(image, "a red ball", on_step=watch, **options, **settings)
    else:
        given = soft if "soft" in mode else mask
        result = pipe.inpaint(image, given, "a red ball", on_step=watch, **options, **settings)
    painting = result.repainted[0]
    assert finite == [True] * (max(1, math.floor(STEPS * strength + 1e-9)) * len(painting.boxes))
    before, after, hole = painting.item.image.rgb, np.asarray(result.image), painting.item.hole
    assert (after[~hole] == before[~hole]).all()
    assert painting.scores.known_error == 0
    assert (after[hole] != before[hole]).any()
