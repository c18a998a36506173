"""Convolutions by large tiles against float64, alone and as forms of the operations that use them."""

from __future__ import annotations

import importlib

import convolving
import interpreter
import pytest
import torch
from convolving import draw
from forming import choose
from sdinpaint_kernels import conv3, upsample_conv3, winograd
from torch.nn import functional as F

SHAPES = [(1, 128, 160, 16, 16), (2, 160, 128, 20, 24), (3, 136, 24, 16, 36), (1, 24, 136, 64, 4)]
REFUSED = [(1, 24, 24, 18, 32), (1, 24, 24, 32, 18), (1, 24, 24, 12, 16)]
TIMES = 5.0
"""How many times torch's own error is allowed, which is least where few channels are summed."""


def plain(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=1)


def upsampled(x, weight, bias=None):
    return plain(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias)


OPERATIONS = {"conv3": (conv3, plain), "upsample_conv3": (upsample_conv3, upsampled)}


def check(name, x, weight, bias):
    ours, exact = OPERATIONS[name]
    convolving.check(ours, exact, x, weight, bias, times=TIMES)


@pytest.fixture(autouse=True)
def by_large_tiles(substitute):
    choose(substitute, "large_tiles")


@pytest.fixture
def transforms(spy):
    """The weights that are transformed, in turn."""
    return spy(winograd, "_transformed")


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_exact_as_torch(name, shape, transforms):
    x, weight, bias = draw(*shape)
    check(name, x, weight, bias)
    assert transforms
    check(name, x.contiguous(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last), None)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("numbers", [1, 160 * 20, 160 * 40, 10**9])
def test_it_is_the_same_for_any_number_of_tiles_at_a_time(name, numbers, substitute):
    substitute(winograd, NUMBERS=numbers)
    check(name, *draw(3, 128, 160, 16, 20))


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_takes_a_view_of_any_strides(name):
    x, weight, bias = draw(2, 128, 128, 20, 40)
    check(name, x[:, :, 2:-2, ::2].flip(3), weight, bias)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_default_device_changes_nothing(name):
    winograd._transforms.cache_clear()
    given = draw(1, 24, 24, 16, 16)
    with torch.device("meta"):
        found = OPERATIONS[name][0](*given)
    assert torch.equal(found, OPERATIONS[name][0](*given))


@pytest.mark.parametrize("form", ["contiguous_format", "channels_last"])
def test_it_adds_a_residual(form):
    x, weight, bias = draw(2, 128, 96, 16, 24)
    residual = torch.randn(2, 96, 16, 24).to(memory_format=getattr(torch, form))
    before = residual.clone()
    exact = plain(x.double(), weight.double(), bias.double()) + residual
    assert interpreter.relative(conv3(x, weight, bias, residual), exact) < 1e-6
    assert torch.equal(residual, before)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", REFUSED)
def test_the_next_form_computes_what_tiles_do_not_fill(name, shape, transforms):
    ours, exact = OPERATIONS[name]
    given = draw(*shape)
    torch.testing.assert_close(ours(*given), exact(*given))
    assert not any(scheme is winograd.UPSAMPLED or name == "conv3" for _, scheme, *_ in transforms)


def test_the_next_form_takes_many_weights(transforms, substitute):
    given = draw(1, 128, 128, 16, 16)
    substitute(winograd, MOST_WEIGHTS=128 * 128 - 1)
    assert torch.equal(conv3(*given), plain(*given))
    assert not transforms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_it_takes_float32_only(dtype, transforms):
    given = draw(1, 128, 128, 16, 16, dtype)
    assert torch.equal(conv3(*given), plain(*given))
    assert not transforms


def test_a_change_of_the_weights_is_seen():
    x, weight, bias = draw(1, 128, 128, 16, 16)
    first = conv3(x, weight, bias)
    weight.data.mul_(2)
    torch.testing.assert_close(conv3(x, weight, bias) - bias[:, None, None], 2 * (first - bias[:, None, None]))


def test_the_usual_points_round_worse():
    x, weight, _ = draw(1, 320, 64, 32, 32)
    exact = plain(x.double(), weight.double())
    usual = winograd.CONVOLUTION._replace(points=(0.0, 1.0, -1.0, 2.0, -2.0))
    ours, theirs = (
        interpreter.relative(winograd.by_large_tiles(x, weight, None, scheme=scheme), exact)
        for scheme in (winograd.CONVOLUTION, usual)
    )
    assert ours < 1.5e-6
    assert theirs > 1.7 * ours


@pytest.mark.parametrize(
    ("name", "scheme"), [("conv3", winograd.CONVOLUTION), ("upsample_conv3", winograd.UPSAMPLED)], ids=str
)
def test_wrong_taps_are_seen(name, scheme, sabotage):
    taps = [[list(line) for line in phase] for phase in scheme.phases]
    taps[-1][-1][-1] += 0.01
    wrong = scheme._replace(phases=tuple(tuple(map(tuple, phase)) for phase in taps))
    module = importlib.import_module(f"sdinpaint_kernels.{name}")
    given = draw(1, 128, 128, 16, 16)
    form = module.FORMS["large_tiles"]
    sabotage(module, "FORMS", module.FORMS | {"large_tiles": form._replace(run=_with(wrong))})
    with pytest.raises(AssertionError):
        check(name, *given)


def _with(scheme):
    return lambda *given: winograd.by_large_tiles(*given, scheme=scheme)
