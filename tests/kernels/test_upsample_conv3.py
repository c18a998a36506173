"""Upsampling and convolution in one against float64, and where they are left apart."""

from __future__ import annotations

import importlib

import convolving
import pytest
import torch
from convolving import draw
from forming import choose
from sdinpaint_kernels import backend, upsample_conv3
from torch.nn import functional as F

own = importlib.import_module("sdinpaint_kernels.upsample_conv3")

IN_ONE = [(1, 24, 40, 32, 32), (2, 96, 32, 33, 47), (3, 8, 4, 64, 20)]
APART = {
    "nothing": ((0, 24, 40, 32, 32), ()),
    "another size": ((1, 24, 40, 32, 32), (63, 64)),
    "three times": ((1, 24, 40, 32, 32), (96, 96)),
}
DTYPES = (torch.float32, torch.bfloat16)


def plain(x, weight, bias=None, size=()):
    size = size or tuple(2 * side for side in x.shape[2:])
    return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)


def check(x, weight, bias):
    convolving.check(upsample_conv3, plain, x, weight, bias, times=2)


@pytest.fixture(autouse=True)
def form(substitute):
    choose(substitute, "packed_transposed")


@pytest.fixture
def laid_out(spy):
    """The weights that are laid out, in turn."""
    return spy(own, "_transposed_kernel")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IN_ONE)
def test_it_is_as_exact_as_torch(shape, dtype, laid_out):
    x, weight, bias = draw(*shape, dtype)
    check(x, weight, bias)
    check(x.contiguous(memory_format=torch.channels_last), weight, None)
    assert len(laid_out) == backend._cpu_supports(dtype)


def test_it_takes_a_view_of_any_strides(laid_out):
    x, weight, bias = draw(2, 24, 40, 36, 64)
    check(x[:, :, 2:-2, ::2].flip(3), weight, bias)
    assert laid_out


def test_channels_last_stays():
    x, weight, bias = draw(2, 24, 40, 32, 32)
    out = upsample_conv3(x.contiguous(memory_format=torch.channels_last), weight, bias)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", APART)
def test_torch_does_the_rest(name, laid_out):
    shape, size = APART[name]
    given = draw(*shape)
    assert torch.equal(upsample_conv3(*given, size), plain(*given, size))
    assert not laid_out


def test_torch_runs_where_it_is_requested(laid_out, kernel_setting):
    given = draw(*IN_ONE[0])
    assert torch.equal(upsample_conv3(*given, kernels="torch"), plain(*given))
    kernel_setting("torch")
    assert torch.equal(upsample_conv3(*given), plain(*given))
    assert not laid_out


@pytest.mark.parametrize("learning", range(3))
def test_gradients_flow(learning, laid_out):
    given = draw(*IN_ONE[0])
    given[learning].requires_grad_()
    upsample_conv3(*given).sum().backward()
    assert given[learning].grad is not None
    assert not laid_out


def test_it_can_be_compiled_around():
    layer = torch.compile(lambda *given: upsample_conv3(*given) + 1, backend="eager", fullgraph=True)
    given = draw(*IN_ONE[0])
    assert torch.equal(layer(*given), plain(*given) + 1)


@pytest.mark.parametrize("row", range(4))
def test_a_wrong_sum_of_weights_is_seen(row, sabotage):
    wrong = [list(numbers) for numbers in own.SUMMED]
    wrong[row][row % 3] += 0.01
    sabotage(own, "SUMMED", wrong)
    with pytest.raises(AssertionError):
        check(*draw(*IN_ONE[0]))
