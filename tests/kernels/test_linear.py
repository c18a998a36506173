"""The linear layer of the CPU against float64, and where it leaves the work to torch."""

from __future__ import annotations

import importlib

import interpreter
import pytest
import torch
from forming import choose
from safetensors.torch import save_file
from sdinpaint_kernels import backend, conv3, downsample_conv3, linear, linear_geglu, prepacked, upsample_conv3
from sdinpaint_kernels.cpu_kinds import cpu_kind
from sdinpaint_weights.reader import open_weights
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
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_a_residual_is_added_before_the_sum_is_rounded(shape, outputs, dtype):
    x, weight, bias = draw(shape, outputs, dtype)
    residual = torch.randn(*shape[:-1], outputs).to(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double()) + residual.double()
    for kernels in (None, "torch"):
        found = linear(x, weight, bias, residual, kernels=kernels)
        check(found, F.linear(x, weight, bias) + residual, exact)
    if dtype == torch.bfloat16:
        assert interpreter.relative(linear(x, weight, bias, residual), exact) <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_is_part_of_the_product(dtype):
    x, weight, bias = draw((2, 7, 48), 96, dtype)

    def right(*given):
        value, gate = F.linear(*given).chunk(2, dim=-1)
        return value * F.gelu(gate)

    check(linear_geglu(x, weight, bias), right(x, weight, bias), right(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_by_their_own_weights(dtype):
    x, weights = torch.randn(16, 50, 24).to(dtype), torch.randn(16, 40, 24).to(dtype)
    torchs, exact = (torch.einsum("knc,koc->kno", a, b) for a, b in ((x, weights), (x.double(), weights.double())))
    check(torch.stack(own.products(x, own.ordered_products(weights))), torchs, exact)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def mapped(request, tmp_path):
    """Three weights of one file, which are mapped."""
    drawn = {name: torch.randn(256, 320).to(request.param) for name in "qkv"}
    save_file(drawn, tmp_path / "weights.safetensors")
    weights = open_weights(tmp_path / "weights.safetensors")
    return [weights[name] for name in "qkv"]


def draw_rows(weight, rows=9):
    return torch.randn(rows, weight.shape[1]).to(weight.dtype)


def test_weights_of_a_file_are_replaced_by_their_reordered_copy(mapped, spy):
    released = spy(prepacked.pages, "release")
    x, weight = draw_rows(mapped[0]), mapped[0]
    in_memory = linear(x, weight.clone())
    assert not released  # a copy of weights without a file would be one more
    for _ in range(2):
        assert interpreter.relative(linear(x, weight), in_memory.double()) <= torch.finfo(x.dtype).eps
    assert len(released) == backend._cpu_supports(x.dtype)
    weight.view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32).numpy()[3] = 0
    assert (linear(x, weight)[:, 3] == 0).all()


def test_several_weights_of_a_file_are_one_product(mapped, spy):
    x = draw_rows(mapped[0])
    in_memory, whole = [weight.clone() for weight in mapped], torch.cat(mapped)
    calls = {1: (mapped,), 3: (in_memory,)}, {1: (in_memory, whole)}
    for count, given in [pair for one in calls for pair in one.items()]:
        done = spy(own, "product")
        for found, weight in zip(own.joint_linear(x, *given), mapped, strict=True):
            check(found, F.linear(x, weight), F.linear(x.double(), weight.double()))
        assert len(done) == count * backend._cpu_supports(x.dtype)
    mapped[1].zero_()
    assert not own.joint_linear(x, mapped)[1].any()


@pytest.mark.parametrize("counts", [(3, 1), (1, 3), (3, 2)])
def test_the_same_weights_serve_alone_and_together(mapped, counts):
    x = draw_rows(mapped[0])
    for count in counts:
        for found, weight in zip(own.joint_linear(x, mapped[:count]), mapped, strict=False):
            check(found, F.linear(x, weight), F.linear(x.double(), weight.double()))


def test_a_gated_product_takes_weights_of_a_file(mapped):
    x, bias = draw_rows(mapped[0]), torch.zeros(256, dtype=mapped[0].dtype)
    expected = linear_geglu(x, mapped[0].clone(), bias)
    assert interpreter.relative(linear_geglu(x, mapped[0], bias), expected.double()) <= torch.finfo(x.dtype).eps


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


GAPS = {
    "every second number": lambda bias: bias.repeat_interleave(2)[::2],
    "one number": lambda bias: bias[:1].expand(16),
}


@pytest.mark.parametrize("name", GAPS)
@pytest.mark.parametrize("operation", [conv3, upsample_conv3, downsample_conv3, linear, linear_geglu])
def test_a_bias_need_not_be_contiguous(operation, name, substitute):
    choose(substitute, "packed", "packed_transposed")
    shapes = ((1, 8, 16, 16), (16, 8, 3, 3)) if "conv" in operation.__name__ else ((5, 8), (16, 8))
    x, weight, bias = (torch.randn(shape) for shape in (*shapes, (16,)))
    given = x, weight, GAPS[name](bias)
    torch.testing.assert_close(operation(*given), operation(*given, kernels="torch"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [None, "torch"])
def test_a_residual_of_another_shape_is_refused_or_repeated(kernels, substitute):
    choose(substitute, "packed")
    (x, weight, _), (image, filters) = draw((5, 8), 16), (torch.randn(2, 8, 4, 4), torch.randn(16, 8, 3, 3))
    for operation, given, shape in ((linear, (x, weight), (5, 16)), (conv3, (image, filters), (2, 16, 4, 4))):
        one, other = torch.randn(1, *shape[1:]), torch.randn(shape[0] + 1, *shape[1:])
        found = operation(*given, None, one, kernels=kernels)
        torch.testing.assert_close(found, operation(*given) + one, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match=r"size|shape"):
            operation(*given, None, other, kernels=kernels)


def test_sparse_weights_are_torch_s():
    x, weight, _ = draw((5, 8), 16)
    torch.testing.assert_close(linear(x, weight.to_sparse_csr()), F.linear(x, weight))


def test_what_the_cpu_does_not_take():
    x, weight, bias = draw((5, 8), 16)
    assert backend.on_cpu(x, weight, None)
    assert not backend.on_cpu(x, weight.double(), bias)
    assert not backend.on_cpu(x.to("meta"), weight, bias)
    with torch.autocast("cpu"):
        assert not backend.on_cpu(x, weight, bias)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not backend.on_cpu(x, weight, bias)
