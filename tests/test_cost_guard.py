"""No work costs more than is recorded in data/costs.json: operations, memory, arithmetic and runs of models."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import as_sd2, as_sdxl, fill, for_text_to_image, random_pipeline, small
from costs import (
    DRIFT,
    FALL,
    FELL,
    MODELS,
    RECORDED,
    SUMS,
    TORCH,
    Recorder,
    falls,
    measure,
    pytest_terminal_summary,
    rises,
)
from sdinpaint_kernels import forms
from torch.nn import functional as F

from sdinpaint.models import ControlNet, ControlNetConfig, fused, guarded_vae, layers, prepared_unet, unet
from sdinpaint.pipeline.control import Control
from sdinpaint.pipeline.patch_sampling import PatchSampling
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.sampling import Known, schedules
from sdinpaint.sampling.step_runner import StepRunner
from sdinpaint.text.conditioning import TextConditioner

PROMPT = "a red fox"
SIZE = 64, 72
"""Height and width in pixels."""
PIXELS = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
HOLE = np.zeros(SIZE, np.float32)
HOLE[20:44, 22:57] = 1
RAMP = np.broadcast_to(np.linspace(0, 1, SIZE[1], dtype=np.float32), SIZE)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGE, LATENTS = draw(1, 1, 3, *SIZE), draw(2, 1, 4, 8, 9)


@pytest.fixture(scope="module", autouse=True)
def plain_forms():
    """Convolutions in torch's own form: others differ by the kind of the processor, and check their weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "ranked", lambda *_: (forms.PLAIN,))
        yield


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


# Each function takes a pipeline and returns the work that is measured


def step(pipe):
    """One denoising step with guidance and precomputed text conditioning."""
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
    return lambda pipe: lambda: pipe.inpaint(PIXELS, mask, PROMPT, **options)


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
def test_work_costs_no_more_than_recorded(pipes, recorded, name, record_property):
    before, found = recorded["costs"].get(name, {}), cost(pipes, name)
    same_torch = recorded["torch"] == TORCH
    record_property(name, found)
    record_property(FELL, [f"{name}: {line}" for line in falls(before, found, same_torch=same_torch)])
    assert rises(before, found, same_torch=same_torch) == []


def test_every_recorded_cost_is_measured(recorded):
    assert set(recorded["costs"]) == set(WORK)
    assert set().union(*recorded["costs"].values()) >= {*MODELS.values(), *SUMS}


@pytest.mark.parametrize("name", ["step, SD1", "decode"])
def test_costs_do_not_depend_on_the_number_of_threads(pipes, name):
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(cost(pipes, name))
    torch.set_num_threads(before)
    assert found[0] == found[1]


# What is counted


def test_views_and_operations_in_place_take_no_memory():
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


def test_cached_results_cost_nothing():
    assert measure(functools.cache(lambda: torch.ones(3))) == {"flops": 0}


# What is reported


COST = {"UNet": 2, "operations": 1000, "bytes": 10_000, "flops": 50_000, "aten.cat": 40, "aten.add": 400}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"aten.cat": 41, "aten.add": 399}, "aten.cat grew from 40 to 41"),
        ({"aten.clone": 1}, "aten.clone grew from 0 to 1"),
        ({"bytes": 10_001}, "bytes grew from 10000 to 10001"),
        ({"bytes": 5000, "UNet": 1}, ""),
    ],
)
def test_every_figure_that_grew_is_named(change, said):
    lines = rises(COST, COST | change)
    assert [line.startswith(said) for line in lines] == ([True] if said else [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"bytes": round(10_000 * (1 - FALL))}, []),
        ({"bytes": round(10_000 * (1 - FALL)) - 1}, ["bytes fell from 10000 to 9699"]),
        ({"UNet": 1, "aten.cat": 41}, ["UNet fell from 2 to 1"]),
    ],
)
def test_every_figure_that_fell_far_is_named(change, said):
    assert falls(COST, COST | change) == said


def test_under_another_torch_single_operations_are_not_compared():
    def grown(**change):
        return rises(COST, COST | change, same_torch=False)

    lower = {"aten.cat": 1, "operations": 900, "bytes": 9000, "flops": 40_000}
    assert grown(**{**lower, "aten.cat": 1000, "aten.clone": 7, "operations": 1040}) == []
    assert grown(operations=round(1000 * (1 + DRIFT)) + 1)[0].startswith("operations grew from 1000 to 1051")
    assert grown(UNet=3)[0].startswith("UNet grew from 2 to 3")
    assert falls(COST, COST | lower, same_torch=False) == []
    assert falls(COST, COST | {"UNet": 1}, same_torch=False) == ["UNet fell from 2 to 1"]


def outcome(when, **found):
    return pytest.TestReport("guard", ("", 0, ""), {}, "failed", None, when, user_properties=list(found.items()))


def test_costs_are_recorded_even_where_the_guard_fails():
    recorder = Recorder()
    for report in (outcome("setup"), outcome("call", encode=COST, **{FELL: ["bytes fell"]}), outcome("teardown")):
        recorder.pytest_runtest_logreport(report)
    assert recorder.costs == {"encode": COST}


@pytest.mark.parametrize("lines", [[], ["decode: bytes fell from 2 to 1"]])
def test_the_summary_of_a_run_lists_the_costs_that_fell(lines):
    written = []
    terminal = SimpleNamespace(section=written.append, write_line=written.append)
    terminal.stats = {"passed": [outcome("call", decode=COST, **{FELL: lines}), outcome("teardown")]}
    pytest_terminal_summary(terminal)
    assert written[1:] == lines
    assert [FELL in line for line in written[:1]] == [True] * len(lines)


# Broken on purpose


def twice(owner, name):
    """Replace a function by two calls of it."""
    once = getattr(owner, name)
    return owner, name, lambda *given, **options: (once(*given, **options), once(*given, **options))[1]


def fed(owner, name, change):
    """Replace a forward by one that changes its input first."""
    forward = getattr(owner, name)
    return owner, name, lambda self, x, *rest: forward(self, change(x), *rest)


def forgetful():
    """Let the denoiser precompute the text conditioning in every step."""
    call = StepRunner.__call__
    return StepRunner, "__call__", lambda self, x, sigma: self._batches.clear() or call(self, x, sigma)


def always_joined(x, batch):
    return torch.cat([x] * max(batch // len(x), 1))


BREAKS = {
    "a needless clone": ("step, SD1", lambda: fed(layers.GroupNorm, "forward", torch.clone), ["aten.clone", "bytes"]),
    "a needless cat": ("step, SDXL", lambda: (unet, "repeated", always_joined), ["aten.cat", "bytes"]),
    "weights joined in every step": ("step, SD2", lambda: (fused, "joined", torch.cat), ["aten.cat", "bytes"]),
    "guidance halves that share nothing": (
        "step, SD1",
        lambda: fed(prepared_unet.PreparedUNet, "__call__", lambda x: torch.cat([x, x])),
        ["flops", "bytes"],
    ),
    "more precision than asked": (
        "texts, SD1",
        lambda: fed(torch.nn.LayerNorm, "forward", lambda x: x.double().float()),
        ["aten.to", "bytes"],
    ),
    "text conditioning computed in every step": ("inpaint", forgetful, ["aten.linear", "flops"]),
    "the image encoded again": ("inpaint", lambda: twice(Pipeline, "sample_latents"), ["VAE encoder", "flops"]),
    "the masked image encoded again": (
        "inpaint, strength 0.5",
        lambda: twice(PatchSampling, "_masked_latents"),
        ["VAE encoder", "aten.conv2d"],
    ),
    "the image decoded again": ("inpaint, crop", lambda: twice(Pipeline, "decode"), ["VAE decoder", "flops"]),
    "texts encoded again": ("texts, SDXL", lambda: twice(TextConditioner, "__call__"), ["text encoder", "flops"]),
    "the UNet run again": (
        "inpaint, 4 channels",
        lambda: twice(prepared_unet.PreparedUNet, "__call__"),
        ["UNet", "operations"],
    ),
    "the ControlNet run again": ("step, ControlNet", lambda: twice(Control, "__call__"), ["ControlNet", "bytes"]),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_needless_work_is_named(pipes, recorded, sabotage, broken):
    name, change, wasted = BREAKS[broken]
    before = recorded["costs"][name]
    sabotage(*change())
    after = cost(pipes, name)
    said = rises(before, after)
    for figure in wasted:
        assert any(line.startswith(f"{figure} grew from {before.get(figure, 0)} to {after[figure]}") for line in said)


def test_a_check_left_out_is_reported_as_a_fall(pipes, recorded, sabotage):
    sabotage(guarded_vae, "_is_finite", lambda outputs: True)
    before, found = recorded["costs"]["decode"], cost(pipes, "decode")
    assert f"aten.isfinite fell from {before['aten.isfinite']} to 0" in falls(before, found)
    assert rises(before, found) == []
