"""The strided convolution of the CPU against float64, and where it leaves the work to torch."""

from __future__ import annotations

import convolving
import interpreter
import pytest
import torch
from convolving import draw
from safetensors.torch import save_file
from sdinpaint_kernels import backend, downsample_conv3, prepacked
from sdinpaint_weights.reader import open_weights
from torch.nn import functional as F

SHAPES = [(1, 24, 40, 16, 16), (2, 96, 32, 17, 13), (3, 8, 4, 1, 2)]
TIMES = 3.0
"""How many times torch's own error is allowed: oneDNN sums in another order on each kind of processor."""


def plain(x, weight, bias=None, padding=1):
    return F.conv2d(x, weight, bias, stride=2, padding=padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_exact_as_torch(shape, dtype):
    x, weight, bias = draw(*shape, dtype)
    convolving.check(downsample_conv3, plain, x, weight, bias, times=TIMES)
    convolving.check(downsample_conv3, plain, x.to(memory_format=torch.channels_last), weight, None, times=TIMES)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_file_are_replaced_by_their_reordered_copy(dtype, padding, tmp_path, spy):
    released = spy(prepacked.pages, "release")
    x, weight, bias = draw(2, 64, 64, 15, 16, dtype)
    in_memory = downsample_conv3(x, weight, bias, padding)
    assert not released  # a copy of weights without a file would be one more
    save_file({"weight": weight}, tmp_path / "weights.safetensors")
    mapped = open_weights(tmp_path / "weights.safetensors")["weight"]
    for _ in range(2):
        found = downsample_conv3(x, mapped, bias, padding)
        assert interpreter.relative(found, in_memory.double()) <= 8 * torch.finfo(dtype).eps  # sums in another order
    assert len(released) == backend._cpu_supports(dtype)
    mapped.zero_()
    assert torch.equal(downsample_conv3(x, mapped, bias, padding), bias[:, None, None].expand_as(found))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_torch_does_other_dtypes(dtype):
    given = draw(1, 8, 8, 6, 6, dtype)
    assert torch.equal(downsample_conv3(*given), plain(*given))


def test_torch_runs_where_it_is_requested(forbid):
    given = draw(1, 8, 8, 6, 6)
    forbid(backend, "on_cpu")
    assert torch.equal(downsample_conv3(*given, kernels="torch"), plain(*given))


def test_nothing_stays_nothing():
    assert downsample_conv3(*draw(0, 8, 4, 6, 6)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("learning", range(3))
def test_gradients_flow(learning):
    given = draw(1, 8, 8, 6, 6)
    given[learning].requires_grad_()
    downsample_conv3(*given).sum().backward()
    assert given[learning].grad.abs().sum() > 0
