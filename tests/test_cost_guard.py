"""No piece of work asks more of torch than is recorded in data/costs.json: operations, memory, arithmetic, models."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import as_sd2, as_sdxl, fill, for_text_to_image, random_pipeline, small
from costs import DRIFT, FALL, MODELS, RECORDED, SUMS, TORCH, Recorder, complaints, measure
from torch.nn import functional as F

from sdinpaint.models import ControlNet, ControlNetConfig, fused, layers, prepared_unet, unet
from sdinpaint.pipeline.control import Control
from sdinpaint.pipeline.patch_sampling import PatchSampling
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.sampling import Known, schedules
from sdinpaint.sampling.step_runner import StepRunner
from sdinpaint.text.conditioning import TextConditioner

PROMPT = "a red fox"
SIZE = 64, 72
"""Height and width in pixels."""
PICTURE = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
HOLE = np.zeros(SIZE, np.float32)
HOLE[20:44, 22:57] = 1
RAMP = np.broadcast_to(np.linspace(0, 1, SIZE[1], dtype=np.float32), SIZE)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGE, LATENTS = draw(1, 1, 3, *SIZE), draw(2, 1, 4, 8, 9)


@pytest.fixture(scope="module")
def pipes(tiny, vocabulary):
    """Random pipelines of each kind, and of the narrowest ones for whole runs."""
    families = {
        "SD1": tiny,
        "SD2": as_sd2(tiny),
        "SDXL": as_sdxl(tiny),
        "small": small(tiny),
        "small, 4 channels": for_text_to_image(small(tiny)),
    }
    pipes = {name: random_pipeline(family, vocabulary) for name, family in families.items()}
    for name in ("SD1", "small"):
        pipe = pipes[f"{name}, ControlNet"] = copy.copy(pipes[name])
        config = ControlNetConfig(unet=replace(pipe.family.unet, in_channels=4), hint_widths=(5, 7, 11, 13))
        pipe.controlnet = fill(ControlNet(config), 7).eval().requires_grad_(False)
    return pipes


# Each makes of a pipeline the work that is measured


def step(pipe):
    """One of a run, with guidance, for a text that is prepared."""
    sigmas = schedules.linspace(pipe.train_sigmas, 30)
    control = pipe.controlnet and Control(pipe.controlnet, IMAGE, sigmas)
    known = Known((LATENTS[:, :1] > 0).float(), LATENTS)
    denoise = pipe.denoiser(known, *pipe.encode_prompts([PROMPT, ""]), control=control)
    levels = iter(sigmas.tolist())
    return lambda: denoise(LATENTS, next(levels))


def prepare(pipe):
    conditions = pipe.encode_prompts([PROMPT, ""])
    context = torch.cat([one.context for one in conditions])
    vector = None if conditions[0].vector is None else torch.cat([one.vector for one in conditions])
    return lambda: pipe.unet.prepare(context, vector)


def texts(pipe):
    return lambda: pipe.encode_prompts([PROMPT, ""])


def encode(pipe):
    return lambda: pipe.sample_latents(IMAGE)


def decode(pipe):
    return lambda: pipe.decode(LATENTS)


def inpaint(mask=HOLE, **options):
    """Two steps, whatever the strength."""
    options = {"steps": 2, "seed": 5, "progress": False} | options
    return lambda pipe: lambda: pipe.inpaint(PICTURE, mask, PROMPT, **options)


WORK = {
    "step, SD1": ("SD1", step),
    "step, SD2": ("SD2", step),
    "step, SDXL": ("SDXL", step),
    "step, ControlNet": ("SD1, ControlNet", step),
    "prepare, SD1": ("SD1", prepare),
    "prepare, SDXL": ("SDXL", prepare),
    "texts, SD1": ("SD1", texts),
    "texts, SDXL": ("SDXL", texts),
    "encode": ("SD1", encode),
    "decode": ("SD1", decode),
    "inpaint": ("small", inpaint()),
    "inpaint, strength 0.5": ("small", inpaint(strength=0.5, steps=4)),
    "inpaint, soft": ("small", inpaint(RAMP, soft=True)),
    "inpaint, crop": ("small", inpaint(crop=8)),
    "inpaint, 4 channels": ("small, 4 channels", inpaint()),
    "inpaint, 4 channels, soft": ("small, 4 channels", inpaint(RAMP, soft=True)),
    "inpaint, ControlNet": ("small, ControlNet", inpaint()),
}


def cost(pipes, name):
    kind, work = WORK[name]
    return measure(work(pipes[kind]))


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORDED.read_text())


@pytest.mark.parametrize("name", WORK)
def test_nothing_costs_more_than_it_did(pipes, recorded, name, record_property):
    found = cost(pipes, name)
    record_property(name, found)
    assert complaints(recorded["costs"].get(name, {}), found, same_torch=recorded["torch"] == TORCH) == []


def test_all_that_is_recorded_is_measured(recorded):
    assert set(recorded["costs"]) == set(WORK)
    assert set().union(*recorded["costs"].values()) >= {*MODELS.values(), *SUMS}


@pytest.mark.parametrize("name", ["step, SD1", "decode"])
def test_the_number_of_threads_changes_nothing(pipes, name):
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(cost(pipes, name))
    torch.set_num_threads(before)
    assert found[0] == found[1]


# What is counted


def test_views_and_what_is_written_in_place_take_no_memory():
    x = torch.zeros(3, 4)
    operations = {"aten.t": 1, "aten.slice": 1, "aten.add_": 1}
    assert measure(lambda: x.t()[1:].add_(1)) == {**operations, "operations": 3, "bytes": 0, "flops": 0}
    assert measure(lambda: x.reshape(4, 3))["bytes"] == 0
    assert measure(lambda: x.t().reshape(12))["bytes"] == 12 * 4
    assert measure(lambda: x.topk(2))["bytes"] == 3 * 2 * (4 + 8)
    assert measure(lambda: x.double().clone())["bytes"] == 2 * 12 * 8


def test_products_are_counted_as_two_for_each_multiplication():
    x, weight, image, kernel = draw(1, 5, 7), draw(2, 3, 7), draw(3, 1, 2, 8, 9), draw(4, 6, 2, 3, 3)
    q, k = draw(5, 2, 3, 11, 5), draw(6, 2, 3, 13, 5)
    assert measure(lambda: F.linear(x, weight, weight[:, 0]))["flops"] == 2 * (5 * 7 * 3)
    assert measure(lambda: F.conv2d(image, kernel, padding=1))["flops"] == 2 * (8 * 9 * 2 * 6 * 9)
    assert measure(lambda: F.scaled_dot_product_attention(q, k, k))["flops"] == 2 * 2 * (2 * 3 * 11 * 13 * 5)


def test_what_is_kept_from_the_first_time_is_free():
    assert measure(functools.cache(lambda: torch.ones(3))) == {"flops": 0}


# What is said of it


COST = {"UNet": 2, "operations": 1000, "bytes": 10_000, "flops": 50_000, "aten.cat": 40, "aten.add": 400}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"aten.cat": 41, "aten.add": 399}, "aten.cat grew from 40 to 41"),
        ({"aten.clone": 1}, "aten.clone grew from 0 to 1"),
        ({"bytes": 10_001}, "bytes grew from 10000 to 10001"),
        ({"bytes": round(10_000 * (1 - FALL))}, ""),
        ({"bytes": round(10_000 * (1 - FALL)) - 1}, "bytes fell from 10000 to 9699, cheaper now: run `python tests/"),
        ({"UNet": 1}, "UNet fell from 2 to 1, cheaper now"),
    ],
)
def test_every_figure_that_grew_or_fell_is_named(change, said):
    lines = complaints(COST, COST | change)
    assert [line.startswith(said) for line in lines] == ([True] if said else [])


def test_under_another_torch_single_operations_are_its_own_affair():
    def said(**change):
        return complaints(COST, COST | change, same_torch=False)

    assert said(**{"aten.cat": 1000, "aten.clone": 7, "operations": 1040, "bytes": 9000, "flops": 40_000}) == []
    assert said(operations=round(1000 * (1 + DRIFT)) + 1)[0].startswith("operations grew from 1000 to 1051")
    assert said(UNet=3)[0].startswith("UNet grew from 2 to 3")


def test_what_does_not_pass_is_what_is_recorded():
    recorder = Recorder()
    for when, found in (("setup", {}), ("call", {"encode": COST}), ("teardown", {})):
        report = pytest.TestReport("guard", ("", 0, ""), {}, "failed", None, when, user_properties=found.items())
        recorder.pytest_runtest_logreport(report)
    assert recorder.costs == {"encode": COST}


# Broken on purpose


def twice(owner, name):
    """As before, but done two times."""
    once = getattr(owner, name)
    return owner, name, lambda *given, **options: (once(*given, **options), once(*given, **options))[1]


def fed(owner, name, change):
    """As before, but what the model or layer is given is changed first."""
    forward = getattr(owner, name)
    return owner, name, lambda self, x, *rest: forward(self, change(x), *rest)


def forgetful():
    """A denoiser that prepares the text in every step."""
    call = StepRunner.__call__
    return StepRunner, "__call__", lambda self, x, sigma: self._batches.clear() or call(self, x, sigma)


def always_joined(x, batch):
    return torch.cat([x] * max(batch // len(x), 1))


BREAKS = {
    "a needless clone": ("step, SD1", lambda: fed(layers.GroupNorm, "forward", torch.clone), ["aten.clone", "bytes"]),
    "a needless cat": ("step, SDXL", lambda: (unet, "repeated", always_joined), ["aten.cat", "bytes"]),
    "weights joined in every step": ("step, SD2", lambda: (fused, "joined", torch.cat), ["aten.cat", "bytes"]),
    "halves that share nothing": (
        "step, SD1",
        lambda: fed(prepared_unet.PreparedUNet, "__call__", lambda x: torch.cat([x, x])),
        ["flops", "bytes"],
    ),
    "more precision than asked": (
        "texts, SD1",
        lambda: fed(torch.nn.LayerNorm, "forward", lambda x: x.double().float()),
        ["aten.to", "bytes"],
    ),
    "the text prepared in every step": ("inpaint", forgetful, ["aten.linear", "flops"]),
    "the picture encoded again": ("inpaint", lambda: twice(Pipeline, "sample_latents"), ["VAE encoder", "flops"]),
    "the masked picture encoded again": (
        "inpaint, strength 0.5",
        lambda: twice(PatchSampling, "_masked_latents"),
        ["VAE encoder", "aten.conv2d"],
    ),
    "the picture decoded again": ("inpaint, crop", lambda: twice(Pipeline, "decode"), ["VAE decoder", "flops"]),
    "texts encoded again": ("texts, SDXL", lambda: twice(TextConditioner, "__call__"), ["text encoder", "flops"]),
    "the UNet asked again": (
        "inpaint, 4 channels",
        lambda: twice(prepared_unet.PreparedUNet, "__call__"),
        ["UNet", "operations"],
    ),
    "the ControlNet asked again": ("step, ControlNet", lambda: twice(Control, "__call__"), ["ControlNet", "bytes"]),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_done_in_vain_is_named(pipes, recorded, monkeypatch, broken):
    name, change, wasted = BREAKS[broken]
    before = recorded["costs"][name]
    monkeypatch.setattr(*change())
    after = cost(pipes, name)
    said = complaints(before, after)
    for figure in wasted:
        assert any(line.startswith(f"{figure} grew from {before.get(figure, 0)} to {after[figure]}") for line in said)


def test_what_is_spared_is_to_be_recorded(pipes, recorded, monkeypatch):
    monkeypatch.setattr("sdinpaint.models.guarded_vae._is_finite", lambda outputs: True)
    before = recorded["costs"]["decode"]["aten.isfinite"]
    said = complaints(recorded["costs"]["decode"], cost(pipes, "decode"))
    assert any(line.startswith(f"aten.isfinite fell from {before} to 0, cheaper now") for line in said)
