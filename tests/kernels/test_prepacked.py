"""Prepacked weights of the CPU's convolutions are made once, and cached as long as they are true."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref

import pytest
import torch
from forming import choose
from safetensors.torch import save_file
from sdinpaint_kernels import conv3, forget, upsample_conv3
from sdinpaint_weights.reader import open_weights
from torch import nn

prepacked = importlib.import_module("sdinpaint_kernels.prepacked")

OPERATIONS = {"conv3": conv3, "upsample_conv3": upsample_conv3}


def draw():
    """x and weights that both operations prepack."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 256, 32, 32, generator=generator)
    return x, torch.randn(256, 256, 3, 3, generator=generator)


@pytest.fixture(autouse=True, params=["tiles", "packed"])
def form(request, substitute):
    """A form that prepacks."""
    choose(substitute, request.param, "packed_transposed")
    return request.param


@pytest.fixture
def made(spy):
    """The weights that are prepacked, in turn."""
    return spy(prepacked.pages, "release")


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return OPERATIONS[request.param]


def test_weights_are_prepacked_once(operation, made):
    given = draw()
    first = operation(*given)
    assert torch.equal(operation(*given), first)
    assert len(made) == 1


def test_weights_may_change_their_use(made):
    x, weight = draw()
    weight /= 48  # outputs near 1
    for operation in (conv3, upsample_conv3):
        right = operation(x, weight, kernels="torch")
        torch.testing.assert_close(operation(x, weight), right, rtol=1e-4, atol=1e-4)
    assert len(made) == 2


def in_numpy(weight):
    weight.detach().numpy()[3] *= 2


def by_an_optimizer(weight):
    weight.requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()
    weight.requires_grad_(False)


def in_inference_mode(weight):
    with torch.inference_mode():
        weight.mul_(2)


CHANGES = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.mul_(2),
    "one filter through data": lambda weight: weight.data[1].mul_(2),
    "one tap through data": lambda weight: weight.data[7, 9, 2, 1].add_(1e-3),
    "signs through data": lambda weight: weight.data[5, 1::2].neg_(),
    "exchanged through data": lambda weight: weight.data.copy_(weight.data.flip(0)),
    "through numpy": in_numpy,
    "replaced": lambda weight: setattr(weight, "data", 2 * weight.data),
    "copied into": lambda weight: weight.copy_(2 * weight),
    "an optimizer": by_an_optimizer,
    "inference mode": in_inference_mode,
}


@pytest.fixture(params=["in memory", "mapped from a file", "of inference mode"])
def weight(request, tmp_path):
    """Weights in each kind of memory that they may lie in."""
    _, weight = draw()
    if request.param == "mapped from a file":
        save_file({"before": torch.ones(3), "weight": weight}, tmp_path / "weights.safetensors")
        return nn.Parameter(open_weights(tmp_path / "weights.safetensors")["weight"], requires_grad=False)
    if request.param == "of inference mode":
        with torch.inference_mode():
            return nn.Parameter(weight.clone(), requires_grad=False)
    return nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changed_weights_are_the_ones_that_compute(name, operation, weight):
    x, _ = draw()
    with torch.inference_mode(weight.is_inference()):
        if weight.is_inference() and name in ("replaced", "an optimizer"):  # which torch refuses
            return
        for _ in range(2):  # the second change meets memory that was written to before
            before = operation(x, weight)
            CHANGES[name](weight)
            after, right = operation(x, weight), operation(x, weight, kernels="torch")
            assert float((after - right).abs().max() / right.abs().max()) < 1e-5
            assert not torch.equal(before, after)


def test_a_check_that_always_agrees_lets_old_weights_compute(operation, sabotage):
    """So the test above sees what it is there for."""
    x, weight = draw()
    before = operation(x, weight)
    sabotage(prepacked, "unchanged", lambda *_: [True])
    weight.data.mul_(2)
    assert torch.equal(operation(x, weight), before)


def test_what_is_cached_goes_with_the_weights(operation):
    x, weight = draw()
    operation(x, weight)
    form = prepacked._cache[weight].form
    kept = weakref.ref(form[0] if isinstance(form, list) else form)
    del form
    other = copy.deepcopy(weight)
    operation(x, other)
    del weight
    gc.collect()
    assert kept() is None
    assert len([one for one in prepacked._cache if one is other]) == 1
    forget(other)
    assert other not in prepacked._cache


def test_a_block_checks_once_and_sees_what_torch_counts(weight, operation, spy):
    x, _ = draw()
    before = operation(x, weight)
    if weight.is_inference():  # torch counts nothing for these
        return
    checks = spy(prepacked, "unchanged")
    with prepacked.verified([weight]):
        for _ in range(3):
            assert torch.equal(operation(x, weight), before)
        assert len(checks) == 1
        with torch.no_grad():
            weight.mul_(2)
        assert not torch.equal(operation(x, weight), before)
    weight.data.mul_(2)
    right = operation(x, weight, kernels="torch")
    assert float((operation(x, weight) - right).abs().max() / right.abs().max()) < 1e-5


def test_a_block_within_a_block_leaves_it_to_give_memory_back(operation, spy):
    given = spy(prepacked, "give_back")
    with prepacked.verified([]):
        operation(*draw())
        with prepacked.verified([]):
            pass
        assert not given
    assert len(given) == 1


def test_a_block_does_not_trust_what_changed_before(operation):
    x, weight = draw()
    before = operation(x, weight)
    weight.data.mul_(2)
    with prepacked.verified([weight]):
        assert not torch.equal(operation(x, weight), before)
