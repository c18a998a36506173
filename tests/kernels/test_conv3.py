"""The forms of the CPU's convolution against float64, and where it leaves the work to torch."""

from __future__ import annotations

import importlib

import convolving
import pytest
import torch
from convolving import draw
from forming import choose
from sdinpaint_kernels import backend, conv3
from torch.nn import functional as F

own = importlib.import_module("sdinpaint_kernels.conv3")

SHAPES = {
    "tiles": [(1, 128, 160, 16, 16), (2, 160, 128, 18, 20), (3, 136, 128, 16, 34), (2, 128, 64, 8, 8)],
    "product": [(1, 128, 160, 8, 8), (2, 160, 128, 7, 5), (3, 128, 136, 1, 1)],
    "packed": [(1, 128, 160, 16, 16), (2, 9, 24, 7, 5), (3, 24, 4, 20, 34)],
}
"""Form -> inputs that it takes."""
REFUSED = {"tiles": [(1, 128, 128, 17, 32), (1, 128, 128, 16, 33), (1, 128, 128, 6, 8)], "product": [(1, 8, 8, 32, 33)]}
"""Form -> inputs that it does not take."""
TIMES = {torch.float32: 3.0, torch.bfloat16: 4.5}
"""How many times torch's own error is allowed: in bfloat16 every sum of the transforms is rounded."""


def plain(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=1)


def check(x, weight, bias):
    convolving.check(conv3, plain, x, weight, bias, times=TIMES[x.dtype])


@pytest.fixture(autouse=True)
def by_tiles(substitute):
    choose(substitute, "tiles")


@pytest.fixture
def transforms(spy):
    """The weights that are transformed, in turn."""
    return spy(own, "_transform")


@pytest.mark.parametrize("dtype", TIMES)
@pytest.mark.parametrize(("form", "shape"), [(form, shape) for form in SHAPES for shape in SHAPES[form]])
def test_every_form_is_as_exact_as_torch(form, shape, dtype, substitute):
    choose(substitute, form)
    ran, chosen = [], own.FORMS[form]

    def run(*given):
        ran.append(form)
        return chosen.run(*given)

    substitute(own, FORMS=own.FORMS | {form: chosen._replace(run=run)})
    x, weight, bias = draw(*shape, dtype)
    check(x, weight, bias)
    check(x.contiguous(memory_format=torch.channels_last), weight, None)
    assert len(ran) == 2 * backend._cpu_supports(dtype)


@pytest.mark.parametrize(("form", "shape"), [(form, shape) for form in REFUSED for shape in REFUSED[form]])
def test_what_a_form_does_not_take_the_next_one_computes(form, shape, substitute):
    choose(substitute, form)
    given = draw(*shape)
    assert torch.equal(conv3(*given), plain(*given))


def test_a_map_of_another_size_or_another_one_before_changes_nothing(substitute):
    """Weights are ordered for one size, whatever comes first."""
    choose(substitute, "packed")
    x, weight, bias = draw(1, 128, 128, 16, 16)
    first = conv3(x, weight, bias)
    other = weight.clone()
    conv3(x[..., :4, :6], other, bias)
    assert torch.equal(conv3(x, other, bias), first)


@pytest.mark.parametrize("tiles", [1, 20, 70, 10**6])
def test_it_is_the_same_for_any_number_of_tiles_at_a_time(tiles, substitute):
    substitute(own, TILES=tiles)
    check(*draw(3, 128, 128, 16, 20))


def test_it_takes_a_view_of_any_strides():
    x, weight, bias = draw(2, 128, 128, 20, 40)
    check(x[:, :, 2:-2, ::2].flip(3), weight, bias)


def test_an_item_of_a_batch_is_what_it_is_alone():
    x, weight, bias = draw(3, 128, 128, 16, 32)
    torch.testing.assert_close(conv3(x, weight, bias)[1:2], conv3(x[1:2], weight, bias), rtol=0, atol=1e-6)


def test_torch_does_nothing(transforms):
    given = draw(0, 128, 128, 16, 16)
    assert torch.equal(conv3(*given), plain(*given))
    assert not transforms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_torch_does_other_dtypes(dtype, transforms):
    given = draw(1, 128, 128, 16, 16, dtype)
    assert torch.equal(conv3(*given), plain(*given))
    assert not transforms


def test_torch_runs_where_it_is_requested(transforms, kernel_setting):
    given = draw(1, 128, 128, 16, 16)
    assert torch.equal(conv3(*given, kernels="torch"), plain(*given))
    kernel_setting("torch")
    assert torch.equal(conv3(*given), plain(*given))
    assert not transforms


@pytest.mark.parametrize("learning", range(3))
def test_gradients_flow(learning, transforms):
    given = draw(1, 128, 128, 16, 16)
    given[learning].requires_grad_()
    conv3(*given).sum().backward()
    assert given[learning].grad is not None
    assert not transforms
    with torch.no_grad():
        check(*given)
    assert transforms


def test_it_can_be_compiled_around():
    layer = torch.compile(lambda *given: conv3(*given) + 1, backend="eager", fullgraph=True)
    given = draw(1, 128, 128, 16, 16)
    assert torch.equal(layer(*given), plain(*given) + 1)


@pytest.mark.parametrize("row", range(4))
def test_a_wrong_transform_is_seen(row, sabotage):
    wrong = [list(numbers) for numbers in own.G]
    wrong[row][row % 3] += 0.01
    sabotage(own, "G", wrong)
    with pytest.raises(AssertionError):
        check(*draw(1, 128, 128, 16, 16))
