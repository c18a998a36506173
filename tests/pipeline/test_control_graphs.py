"""A ControlNet's recording, with one that replays by calling from its own tensors; on a GPU see test_step_gpu.py."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from builders import fill, random_pipeline, small
from closeness import apart, close, same_images
from recordings import draw

from sdinpaint.models import ControlNet, ControlNetConfig
from sdinpaint.pipeline.control import Control
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.sampling.graphs import Graphs

SIGMAS = torch.linspace(9, 0, 5, dtype=torch.float64)
IMAGE = np.random.default_rng(1).integers(0, 256, (64, 72, 3), dtype=np.uint8)
MASK = np.zeros((64, 72), bool)
MASK[13:45, 22:57] = True


@pytest.fixture(scope="module")
def net(tiny):
    family = small(tiny)
    unet = family.unet
    config = ControlNetConfig(unet=type(unet)(**{**unet.__dict__, "in_channels": 4}), hint_widths=(4, 6, 8, 10))
    return fill(ControlNet(config), 7).eval().requires_grad_(False)


def controls(net, found, **options):
    """Two that differ in their images."""
    return [Control(net, draw(seed, 1, 3, 48, 40), SIGMAS, graphs=found, **options) for seed in (10, 20)]


def given(net, seed, batch=2):
    context = draw(seed, batch, 7, net.config.unet.context_dim)
    return draw(seed + 1, batch, 4, 6, 5), torch.full((batch,), 500.0 + seed), context, None


def test_one_captured_graph_serves_all_steps_and_images(net, replays):
    found, inputs = Graphs(True), [given(net, seed) for seed in (1, 2)]
    plain, recorded = controls(net, None), controls(net, found)
    for which, step, text in ((0, 0, 0), (1, 0, 0), (1, 1, 1), (0, 2, 0), (0, 3, 1), (1, 3, 0)):
        x, t, context, vector = inputs[text]
        sigma = float(SIGMAS[step])
        ours = recorded[which](x * (step + 1), t - step, context, vector, sigma)
        expected = plain[which](x * (step + 1), t - step, context, vector, sigma)
        assert all(close(one, other) for one, other in zip(ours, expected, strict=True))
    assert replays.made == 1


def test_a_change_outside_of_a_captured_graph_captures_again(net, replays):
    found, inputs = Graphs(True), given(net, 1)
    other = fill(copy.deepcopy(net), 9)
    for count, control in enumerate(
        (
            controls(net, found)[0],
            controls(net, found, scale=0.5)[0],
            controls(other, found)[0],
        ),
        start=1,
    ):
        ours = control(*inputs, 9.0)
        expected = Control(control._net, draw(10, 1, 3, 48, 40), SIGMAS, scale=control._scale)(*inputs, 9.0)
        assert all(close(one, theirs) for one, theirs in zip(ours, expected, strict=True))
        assert replays.made == count
    controls(net, found)[0](*given(net, 1, batch=1), 9.0)
    assert replays.made == 4


def test_off_is_off(net, replays):
    control = controls(net, Graphs(True), start=0.5)[0]
    assert control(*given(net, 1), 9.0) is None
    assert replays.made == 0


@pytest.mark.parametrize("options", [{}, {"soft": True}, {"control_start": 0.4, "control_scale": 0.6}])
def test_images_are_the_same(tiny, vocabulary, net, replays, options):
    plain = random_pipeline(small(tiny), vocabulary)
    pipe = Pipeline(plain.family, plain.unet, plain.vae, plain.text, plain.tokenizer, controlnet=net)
    pipe.graphs, pipe.control_graphs = Graphs(False), Graphs(False)
    mask = MASK * np.float32(0.7)
    runs = {"steps": 4, "seed": 3, "progress": False, **options}
    expected = [np.asarray(pipe.inpaint(IMAGE, mask, text, **runs).image) for text in ("a fox", "a cube")]
    assert replays.made == 0
    pipe.graphs, pipe.control_graphs = Graphs(True), Graphs(True)
    ours = [np.asarray(pipe.inpaint(IMAGE, mask, text, **runs).image) for text in ("a fox", "a cube")]
    assert same_images(ours, expected)
    assert apart(*ours) > 1
    assert len(pipe.control_graphs._captured) == 1
