"""Convolutions that halve a feature map are computed by the kernels only where the layer is as it was made."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdinpaint.models import fused

STANDARD = {"kernel_size": 3, "stride": 2, "padding": 1}


@pytest.mark.parametrize(
    "changed",
    [
        *({}, {"padding": 0}, {"padding_mode": "circular"}, {"stride": 1}, {"stride": (2, 1)}, {"kernel_size": 1}),
        *({"dilation": 2}, {"groups": 2}, {"padding": "valid"}, {"padding": (0, 1)}, {"padding": 2}, {"bias": False}),
    ],
    ids=str,
)
def test_a_layer_that_somebody_changed_is_called(changed):
    conv = nn.Conv2d(8, 8, **STANDARD | changed)
    x = torch.randn(2, 8, 12, 10)
    torch.testing.assert_close(fused.downsample(conv, x), conv(x))


def test_hooks_see_the_layer():
    conv, seen = nn.Conv2d(8, 8, **STANDARD), []
    conv.register_forward_hook(lambda *_: seen.append(1))
    fused.downsample(conv, torch.randn(1, 8, 6, 6))
    assert seen


def test_another_layer_in_its_place_is_called():
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(fused.downsample(nn.AvgPool2d(2), x), F.avg_pool2d(x, 2))
