"""Rooflines: which operations are counted, and which rates are measured."""

from __future__ import annotations

import statistics

import pytest
import torch
from sdinpaint_kernels.linear import linear
from torch.nn import functional as F

from sdinpaint.bench import roofline
from sdinpaint.bench.roofline import Roofline, flop_count, peak_bandwidth, peak_flops
from sdinpaint.bench.timing import timed


@pytest.fixture
def brief(monkeypatch):
    """Rates that are measured quickly, and kept for no other test."""
    small = {"SECONDS": 0.02, "SIDES": {"cpu": (128, 256)}, "MAPS": {"cpu": (4, 8)}, "COPIED": {"cpu": 2**20}}
    for name, value in small.items():
        monkeypatch.setattr(roofline, name, value)
    yield monkeypatch
    forget()


def forget():
    roofline._peak_flops.cache_clear()
    roofline._peak_bandwidth.cache_clear()


def empty(*shape, device="cpu", dtype=torch.float32):
    return torch.empty(shape, device=device, dtype=dtype)


# What is counted


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_convolutions_count_two_for_each_multiplication(device, dtype):
    def of(*shape):
        return empty(*shape, device=device, dtype=dtype)

    heads, keys, tokens = of(2, 3, 11, 5), of(2, 3, 13, 5), of(2, 11, 3, 5).transpose(1, 2)
    counts = {
        2 * 2 * 5 * 7 * 3: lambda: F.linear(of(2, 5, 7), of(3, 7), of(3)),
        2 * 2 * 8 * 9 * 4 * 6 * 9: lambda: F.conv2d(of(2, 4, 8, 9), of(6, 4, 3, 3), of(6), padding=1),
        2 * 2 * 4 * 5 * 2 * 6 * 9: lambda: F.conv2d(of(2, 4, 8, 9), of(6, 2, 3, 3), stride=2, padding=1, groups=2),
        2 * 2 * 5 * 7 * 11: lambda: of(2, 5, 7) @ of(2, 7, 11),
        4 * 2 * 3 * 11 * 13 * 5: lambda: F.scaled_dot_product_attention(heads, keys, keys),
        4 * 2 * 3 * 11 * 11 * 5: lambda: F.scaled_dot_product_attention(tokens, tokens, tokens),
        0: lambda: F.gelu(of(2, 3)) + F.group_norm(of(2, 4, 3), 2).sum(),
    }
    for expected, call in counts.items():
        assert flop_count(call) == expected
        with torch.inference_mode():
            assert flop_count(call) == expected


def test_products_that_torch_does_not_count_are_counted_too():
    assert flop_count(lambda: linear(empty(2, 5, 7), empty(3, 7), empty(3))) == 2 * 2 * 5 * 7 * 3
    q, k = empty(2, 11, 3, 5), empty(2, 13, 3, 5)
    assert flop_count(lambda: torch.ops.sdinpaint.attention(q, k, k)) == 4 * 2 * 3 * 11 * 13 * 5
    a, b = (empty(*shape, device="meta", dtype=torch.bfloat16) for shape in ((2, 5, 7), (2, 7, 11)))
    assert flop_count(lambda: torch.bmm(a, b, out_dtype=torch.float32)) == 2 * 2 * 5 * 7 * 11


def test_without_our_formulas_attention_would_count_as_nothing(monkeypatch):
    monkeypatch.setattr(roofline, "ALSO_PRODUCTS", {})
    heads = empty(2, 3, 11, 5)
    assert flop_count(lambda: F.scaled_dot_product_attention(heads, heads, heads)) == 0


# What the machine reaches


def test_a_product_takes_no_less_than_its_roofline(brief):
    a, b = torch.randn(2, 256, 256)
    run = timed(lambda: a @ b, "cpu")

    def percent():
        forget()
        line = Roofline(flops=2 * 256**3, bytes=3 * a.nbytes, dtype=a.dtype, device="cpu")
        return line.percent(statistics.median(run() for _ in range(20)))

    assert any(0 < percent() <= 110 for _ in range(5))  # others on the machine may come and go meanwhile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_measured_once_for_a_number_of_threads(brief, dtype):
    assert peak_flops(dtype, "cpu") > 1e7
    assert peak_bandwidth("cpu") > 1e7
    brief.setattr(roofline, "_fastest", lambda call, device: 1.0)
    assert peak_flops(dtype, "cpu") > 1e7
    assert peak_bandwidth("cpu") > 1e7
    brief.setattr(torch, "get_num_threads", lambda: 77)
    assert peak_flops(dtype, "cpu") == 2 * 2 * 16 * 320 * 320 * 9  # of the first convolution: it is slow, so no larger
    assert peak_bandwidth("cpu") == 2 * 2**20


def test_the_roofline_is_the_longer_of_arithmetic_and_traffic(monkeypatch):
    monkeypatch.setattr(
        roofline, "peak_flops", lambda dtype, device: {torch.float32: 100.0, torch.bfloat16: 200.0}[dtype]
    )
    monkeypatch.setattr(roofline, "peak_bandwidth", lambda device: 10.0)

    def seconds(flops, moved, dtype=torch.float32):
        return Roofline(flops=flops, bytes=moved, dtype=dtype, device="cpu").seconds

    assert seconds(600, 20) == 6
    assert seconds(600, 20, torch.bfloat16) == 3
    assert seconds(100, 20) == 2
    assert seconds(0, 20) == 2
    assert Roofline(flops=600, bytes=0, dtype=torch.float32, device="cpu").percent(8) == 75


def test_what_has_no_arithmetic_needs_no_rate_of_it(monkeypatch):
    monkeypatch.setattr(roofline, "peak_flops", None)
    monkeypatch.setattr(roofline, "peak_bandwidth", lambda device: 10.0)
    assert Roofline(flops=0, bytes=5, dtype=torch.float16, device="cpu").seconds == 0.5
