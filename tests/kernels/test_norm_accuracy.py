"""Norms against float64 where E[x^2] - E[x]^2, a mean in float32, or a long sum is not good enough.

All errors are the largest one over the largest magnitude of the right result. In torch, 2e-6 is allowed in float32: 32
roundings of 2^-24, for the sums of a band (three levels of sixteen numbers, of whose roundings most cancel) and for the
four operations on a value. In float16 and bfloat16 it is one rounding of the result.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from sdinpaint_kernels import add_layer_norm, group_norm, moments
from torch.nn import functional as F

own = importlib.import_module("sdinpaint_kernels.group_norm")
rows = importlib.import_module("sdinpaint_kernels.add_layer_norm")

ALLOWED = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""float64 sees the ratio of mean to deviation squared, 1e6 at most here, of 2^-53, through the deviation."""
LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
KINDS = ("ordinary", "far mean", "half flat", "half far", "outlier", "constant group", "own means")
GROUPS, EPS = 4, 1e-6


def draw(kind, shape=(2, 24, 40, 12), dtype=torch.float32):
    """A map, or rows of channels, of which the values are hard in one way."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    half = shape[2] // 2
    if kind == "far mean":
        x = 0.1 * x + 100
    elif kind == "half flat":
        x[:, :, half:] = 0.73
    elif kind == "half far":
        x = 0.1 * x
        x[:, :, :half] += 100
    elif kind == "outlier":  # where the shift of its channel is found
        x = 0.01 * x + 3
        x[:, 0, 0] += 1000
    elif kind == "constant group":
        x[:, : shape[1] // GROUPS] = 7.3
    elif kind == "own means":
        x = 0.01 * x + 10 * torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2)) % 7
    return x.to(dtype)


def coefficients(channels, dtype):
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(channels, generator=generator) + offset).to(dtype) for offset in (1.0, 0.0)]


def right_groups(x, weight, bias, addend=None, groups=GROUPS):
    """GroupNorm in float64, by its definition."""
    wide = x.double() if addend is None else x.double() + addend.double()[:, :, None, None]
    grouped = wide.unflatten(1, (groups, -1))
    centred = grouped - grouped.mean((2, 3, 4), keepdim=True)
    normed = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + EPS).sqrt()).flatten(1, 2)
    return normed * weight.double()[:, None, None] + bias.double()[:, None, None]


def right_rows(x, weight, bias):
    """LayerNorm in float64, by its definition."""
    centred = x.double() - x.double().mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return normed * weight.double() + bias.double()


def error(found, right):
    return float((found.double() - right).abs().max() / right.abs().max())


@pytest.fixture
def bands(substitute):
    """Several bands, of which the last is smaller, though the maps are small."""
    substitute(moments, BAND=3000)
    substitute(own, MIN_BANDED=0)


# in torch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["bands", "at once"])
def test_group_norm_is_exact(way, kind, dtype, layout, request):
    if way == "bands":
        request.getfixturevalue("bands")
    x, (weight, bias) = draw(kind, dtype=dtype).contiguous(memory_format=LAYOUTS[layout]), coefficients(24, dtype)
    before = x.clone()
    addend = torch.linspace(-3, 3, 48).view(2, 24).to(dtype)
    for added in (None, addend):
        right = right_groups(x, weight, bias, added)
        for silu in (False, True):
            out = group_norm(x, GROUPS, weight, bias, eps=EPS, silu=silu, addend=added)
            assert error(out, F.silu(right) if silu else right) <= ALLOWED[dtype]
            assert (out.dtype, out.stride()) == (dtype, x.stride())
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["half flat", "far mean"])
def test_large_maps_are_as_exact(kind, layout):
    x = draw(kind, (1, 8, 768, 512)).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = coefficients(8, torch.float32)
    right = right_groups(x, weight, bias)
    assert error(group_norm(x, GROUPS, weight, bias, eps=EPS), right) <= ALLOWED[torch.float32]
    if layout == "channels-last":
        # The data are hard enough: torch fails by far.
        assert error(F.group_norm(x, GROUPS, weight, bias, EPS), right) > 10 * ALLOWED[torch.float32]


@pytest.mark.parametrize("kind", ["far mean", "outlier"])
def test_torch_fails_channels_last(kind):
    x, (weight, bias) = draw(kind).contiguous(memory_format=torch.channels_last), coefficients(24, torch.float32)
    right = right_groups(x, weight, bias)
    assert error(F.group_norm(x, GROUPS, weight, bias, EPS), right) > 4 * ALLOWED[torch.float32]


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kind", ["half flat", "far mean"])
def test_group_norm_is_exact_with_several_threads(kind, threads, bands):
    """Each adds up its own part of a band."""
    x, (weight, bias) = draw(kind).contiguous(memory_format=torch.channels_last), coefficients(24, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = group_norm(x, GROUPS, weight, bias, eps=EPS)
    finally:
        torch.set_num_threads(before)
    assert error(out, right_groups(x, weight, bias)) <= ALLOWED[torch.float32]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ALLOWED)
def test_the_result_takes_the_memory_of_x_only_where_that_is_allowed(dtype, layout, bands):
    x, (weight, bias) = draw("ordinary", dtype=dtype), coefficients(24, dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    expected = group_norm(x, GROUPS, weight, bias, eps=EPS, silu=True)
    assert expected.data_ptr() != x.data_ptr()
    for needed in (True, False):  # autograd needs x, whoever else does not
        given = x.clone().requires_grad_(needed)
        out = group_norm(given, GROUPS, weight, bias, eps=EPS, silu=True, overwrite=True)
        assert error(out.detach(), expected.double()) <= 2 * ALLOWED[dtype]
        assert torch.equal(given, x) is needed
        assert (out.data_ptr() == given.data_ptr()) is not needed


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_memory_format_is_that_of_x(samples, layout):
    """A convolution takes the strides of a single sample, which are of no use otherwise, for a memory format."""
    x = draw("ordinary").contiguous(memory_format=LAYOUTS[layout])[:samples]
    weight, bias = coefficients(24, torch.float32)
    for part in (x, x[:, :, 3:9], x[:, :, :, 2:7]):
        for needed in (False, True):
            out = group_norm(part.detach().requires_grad_(needed), GROUPS, weight, bias, eps=EPS)
            assert out.stride() == torch.empty(part.shape).to(memory_format=LAYOUTS[layout]).stride()
            assert error(out.detach(), right_groups(part, weight, bias)) <= ALLOWED[torch.float32]


@pytest.mark.parametrize("height", [1, 2, 3, 9])
def test_tiny_maps_are_exact(height):
    weight, bias = coefficients(24, torch.float32)
    for kind in ("ordinary", "far mean", "constant group"):
        x = draw(kind, (2, 24, height, 1)).contiguous(memory_format=torch.channels_last)
        out = group_norm(x, GROUPS, weight, bias, eps=EPS)
        assert error(out, right_groups(x, weight, bias)) <= ALLOWED[torch.float32]


def test_huge_equal_values_have_no_variance_below_zero():
    x, weight = torch.full((1, 8, 9, 7), 1.1e9), torch.ones(8)
    assert (group_norm(x, GROUPS, weight, weight, eps=EPS) - 1).abs().max() <= ALLOWED[torch.float32]


def test_without_the_shift_the_moments_are_lost(sabotage):
    """Sums about zero instead of about the mean fail."""
    sub = torch.sub
    sabotage(torch, "sub", lambda x, centre, out: sub(x, torch.zeros_like(centre), out=out))
    x = draw("far mean")
    found = moments.measure(x)
    right = x.double().var((2, 3), correction=0)
    assert error(found.variance + found.mean - found.mean, right) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_parts_merge(kind):
    x = draw(kind)
    parts = [moments.measure(part) for part in x.split(7, dim=2)]
    whole = moments.merge(parts)
    wide = x.double()
    assert whole.pixels == x[0, 0].numel()
    # float64's own 1e-12 of the mean beside 1e-6 of the deviation
    assert ((whole.mean - wide.mean((2, 3))).abs() <= 1e-6 * wide.std((2, 3)) + 1e-12 * wide.abs().amax((2, 3))).all()
    torch.testing.assert_close(whole.variance, wide.var((2, 3), correction=0), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_group_norm_are_exact(kind, layout):
    """Gradients are sums of upstream times a normalised x, each exact to 2e-6; the addend's are what x's sum up to."""
    x, (weight, bias) = draw(kind).contiguous(memory_format=LAYOUTS[layout]), coefficients(24, torch.float32)
    upstream, addend = draw("ordinary").flip(3), torch.linspace(-3, 3, 48).view(2, 24)

    def differentiate(norm, *given):
        given = [item.requires_grad_() for item in given]
        out = norm(*given)
        return out, torch.autograd.grad(out, given, upstream.to(out.dtype))

    def ours(x, weight, bias, addend):
        return group_norm(x, GROUPS, weight, bias, eps=EPS, addend=addend)

    given = x, weight, bias, addend
    out, found = differentiate(ours, *[item.clone() for item in given])
    expected, right = differentiate(right_groups, *[item.double() for item in given])
    assert error(out.detach(), expected.detach()) <= ALLOWED[torch.float32]
    assert out.stride() == x.stride()
    for each, wanted in zip(found[:3], right[:3], strict=True):
        assert error(each, wanted) <= ALLOWED[torch.float32]
    assert float((found[3] - right[3]).abs().max() / right[0].abs().sum((2, 3)).max()) <= ALLOWED[torch.float32]


@pytest.mark.parametrize("take", ["trace", "export", "compile", "jvp", "fake", "meta", "threads", "default dtype"])
def test_other_ways_to_call_it(take):
    x, (weight, bias) = draw("ordinary").contiguous(memory_format=torch.channels_last), coefficients(24, torch.float32)

    def call(x):
        return group_norm(x, GROUPS, weight.to(x.device), bias.to(x.device), eps=EPS, silu=True)

    class Module(torch.nn.Module):
        def forward(self, x):
            return call(x)

    expected = call(x)
    if take == "meta":
        assert call(x.to("meta")).stride() == expected.stride()
    elif take == "fake":
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert call(mode.from_tensor(x)).stride() == expected.stride()
    elif take == "jvp":
        tangent = draw("half flat")
        _, found = torch.func.jvp(call, (x,), (tangent,))
        step = 1e-3
        torch.testing.assert_close(
            found, (call(x + step * tangent) - call(x - step * tangent)) / (2 * step), rtol=0, atol=5e-3
        )
    elif take == "threads":
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3 - min(before, 2))
            torch.testing.assert_close(call(x), expected)
        finally:
            torch.set_num_threads(before)
    elif take == "default dtype":
        try:
            torch.set_default_dtype(torch.float64)
            assert torch.equal(call(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        made = {
            "trace": lambda: torch.jit.trace(call, (x,)),
            "export": lambda: torch.export.export(Module(), (x,)).module(),
            "compile": lambda: torch.compile(call, backend="aot_eager", fullgraph=True),
        }[take]()
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_add_layer_norm_is_exact(kind, dtype):
    # every row is hard: its first half is flat, its first number an outlier, all of it constant ...
    x = draw(kind, (2, 8, 64)).to(dtype) if kind != "constant group" else torch.full((2, 8, 64), 7.3, dtype=dtype)
    weight, bias = coefficients(64, dtype)
    total, normed = add_layer_norm(x, torch.zeros_like(x), weight, bias, EPS)
    assert torch.equal(total, x)
    assert error(normed, right_rows(x, weight, bias)) <= ALLOWED[dtype]


def test_torch_fails_rows():
    x, (weight, bias) = draw("far mean", (2, 8, 320)), coefficients(320, torch.float32)
    assert error(F.layer_norm(x, (320,), weight, bias, EPS), right_rows(x, weight, bias)) > 4 * ALLOWED[torch.float32]


# the kernels


def interpreted():
    """Return {norm and kind: [its error, mean over deviation at the most, additions behind a mean]} in float32."""
    found = {}
    split = own.Plan(bundle=2, width=16, rows=16, tiles=1, warps=4, one_pass=False)
    cuts = {"one pass": None, "split": split, "merged": split._replace(direct=1)}
    for kind in KINDS:
        x, (weight, bias) = draw(kind, (1, 32, 12, 5)), coefficients(32, torch.float32)
        x = x.contiguous(memory_format=torch.channels_last)
        right, ratio = right_groups(x, weight, bias), _ratio(x.unflatten(1, (GROUPS, -1)).flatten(2))
        for name, cut in cuts.items():
            out = own.launch(x, GROUPS, weight, bias, EPS, False, None, cut)
            found[f"group_norm, {name}, {kind}"] = [error(out, right), ratio, 60 + 8]
        x, (weight, bias) = draw(kind, (2, 8, 64)), coefficients(64, torch.float32)
        _, normed = rows.launch(x, torch.zeros_like(x), weight, bias, EPS)
        found[f"add_layer_norm, {kind}"] = [error(normed, right_rows(x, weight, bias)), _ratio(x), 64]
    return found


def _ratio(x):
    wide = x.double()
    return float((wide.mean(-1).abs() / (wide.var(-1, correction=0) + EPS).sqrt()).max())


def test_the_kernels_are_exact_but_for_the_rounding_of_a_mean(found):
    """They keep means in float32, which at most each addition behind a mean, and the division, rounds by 2^-24."""
    for name, (measured, ratio, additions) in found.items():
        assert measured <= ALLOWED[torch.float32] + (additions + 1) * 2**-24 * ratio, (name, measured, ratio)
