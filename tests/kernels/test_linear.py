"""The linear layer of the CPU against float64, and where it leaves the work to torch."""

from __future__ import annotations

import importlib

import interpreter
import pytest
import torch
from sdinpaint_kernels import backend, linear
from sdinpaint_kernels.cpu_kinds import cpu_kind
from torch.nn import functional as F

own = importlib.import_module("sdinpaint_kernels.linear")

SHAPES = [((1, 24), 40), ((2, 77, 48), 96), ((2, 3, 5, 8), 16), ((320,), 64)]


def draw(shape, outputs, dtype=torch.float32):
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(outputs)
    shapes = shape, (outputs, shape[-1]), (outputs,)
    return tuple(torch.randn(one, generator=generator).to(dtype) for one in shapes)


def check(ours, torchs, exact):
    assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
    least = torch.finfo(ours.dtype).eps / 2  # a sum in another order, rounded
    assert interpreter.relative(ours, exact) <= 2 * interpreter.relative(torchs, exact) + least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_it_is_as_exact_as_torch(shape, outputs, dtype):
    x, weight, bias = draw(shape, outputs, dtype)
    check(linear(x, weight, bias), F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
    check(linear(x, weight), F.linear(x, weight), F.linear(x.double(), weight.double()))


def test_it_takes_views_of_any_strides():
    x, weight, bias = draw((6, 10, 24), 40)
    x, weight = x.transpose(0, 1)[::2], weight.T.contiguous().T
    check(linear(x, weight, bias), F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_by_their_own_weights(dtype):
    x, weights = torch.randn(16, 50, 24).to(dtype), torch.randn(16, 40, 24).to(dtype)
    torchs, exact = (torch.einsum("knc,koc->kno", a, b) for a, b in ((x, weights), (x.double(), weights.double())))
    check(torch.stack(own.products(x, weights)), torchs, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_torch_does_other_dtypes(dtype):
    given = draw((5, 8), 16, dtype)
    assert torch.equal(linear(*given), F.linear(*given))


def test_torch_runs_where_it_is_requested(forbid):
    given = draw((5, 8), 16)
    forbid(backend, "on_cpu")
    assert torch.equal(linear(*given, kernels="torch"), F.linear(*given))


def test_nothing_stays_nothing():
    assert linear(*draw((2, 0, 8), 16)).shape == (2, 0, 16)


@pytest.mark.parametrize("learning", range(3))
def test_gradients_flow(learning):
    given = draw((5, 8), 16)
    given[learning].requires_grad_()
    linear(*given).sum().backward()
    assert given[learning].grad is not None


CHOSEN = {
    "torch is asked for": {"SETTING": "torch"},
    "oneDNN is missing": {"_cpu_supports": lambda dtype: False},
    "kernels are interpreted": {"INTERPRETED": True},
}


@pytest.mark.parametrize("name", CHOSEN)
def test_when_the_cpu_has_no_way_of_its_own(name, substitute):
    given = draw((5, 8), 16)
    assert backend.on_cpu(*given)
    assert backend.cpu_report().startswith(f"{cpu_kind()}, float32")
    substitute(backend, **CHOSEN[name])
    assert not backend.on_cpu(*given)
    assert backend.cpu_report().startswith("torch alone: ")


def test_what_the_cpu_does_not_take():
    x, weight, bias = draw((5, 8), 16)
    assert backend.on_cpu(x, weight, None)
    assert not backend.on_cpu(x, weight.double(), bias)
    assert not backend.on_cpu(x.to("meta"), weight, bias)
    with torch.autocast("cpu"):
        assert not backend.on_cpu(x, weight, bias)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not backend.on_cpu(x, weight, bias)
