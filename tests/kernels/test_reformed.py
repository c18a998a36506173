"""What the CPU's convolutions keep of weights in another form: once, as long as it is true, and no longer."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref

import pytest
import torch
from sdinpaint_kernels import conv3, forget, upsample_conv3
from torch import nn

reformed = importlib.import_module("sdinpaint_kernels.reformed")

OPERATIONS = {"conv3": conv3, "upsample_conv3": upsample_conv3}


def draw():
    """x and weights that both operations bring into another form."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 256, 32, 32, generator=generator)
    return x, torch.randn(256, 256, 3, 3, generator=generator)


@pytest.fixture
def made(monkeypatch):
    """The weights that are brought into another form, in turn."""
    seen, real = [], reformed.give_back
    monkeypatch.setattr(reformed, "give_back", lambda weight: (seen.append(weight.shape), real(weight))[1])
    return seen


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return OPERATIONS[request.param]


def test_weights_are_reformed_once(operation, made):
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


CHANGES = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.mul_(2),
    "replaced": lambda weight: setattr(weight, "data", 2 * weight.data),
    "loaded": lambda weight: weight.copy_(2 * weight),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changed_weights_are_reformed_anew(name, operation):
    x, weight = draw()
    weight = nn.Parameter(weight, requires_grad=False)
    before = operation(x, weight)
    CHANGES[name](weight)
    torch.testing.assert_close(operation(x, weight), 2 * before)


def test_without_the_sample_a_change_through_data_goes_unseen(monkeypatch, operation):
    """So the test above sees what it is there for."""
    x, weight = draw()
    before = operation(x, weight)
    monkeypatch.setattr(torch, "equal", lambda *_: True)
    weight.data.mul_(2)
    torch.testing.assert_close(operation(x, weight), before, rtol=0, atol=0)


def test_weights_of_inference_mode_are_taken(made, operation):
    with torch.inference_mode():
        x, weight = draw()
        before = operation(x, weight)
        weight.mul_(2)
        torch.testing.assert_close(operation(x, weight), 2 * before)
    assert len(made) == 2


def test_what_is_kept_goes_with_the_weights(operation):
    x, weight = draw()
    operation(x, weight)
    kept = weakref.ref(reformed._kept[weight].form)
    other = copy.deepcopy(weight)
    operation(x, other)
    del weight
    gc.collect()
    assert kept() is None
    assert len([one for one in reformed._kept if one is other]) == 1
    forget(other)
    assert other not in reformed._kept
