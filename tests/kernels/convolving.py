"""Helpers of the tests of convolutions: their inputs, and how exact they have to be."""

from __future__ import annotations

import interpreter
import torch


def draw(batch, inputs, outputs, height, width, dtype=torch.float32):
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(inputs + 7 * outputs + height)
    shapes = (batch, inputs, height, width), (outputs, inputs, 3, 3), (outputs,)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.to(dtype), (weight / 3 / inputs**0.5).to(dtype), bias.to(dtype)


def check(ours, plain, x, weight, bias, *, times):
    """ours(...) is off by no more than so many times plain(...), the worse one of its two memory formats."""
    exact = plain(*(one if one is None else one.double() for one in (x, weight, bias)))
    formats = torch.contiguous_format, torch.channels_last
    torchs = max(interpreter.relative(plain(x.contiguous(memory_format=one), weight, bias), exact) for one in formats)
    found = ours(x, weight, bias)
    assert (found.shape, found.dtype) == (exact.shape, x.dtype)
    assert interpreter.relative(found, exact) <= times * torchs
