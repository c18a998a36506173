"""A small UNet whose every norm, attention and gate runs in an interpreted kernel, against the same in torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import interpreter
import pytest
import torch

CLOSE = 5e-6
"""Float32 through some thirty layers: torch differs by as much from itself in another memory format."""


def interpreted():
    """What ran in which implementation, and how far the outputs are apart."""
    from sdinpaint_kernels import backend

    from sdinpaint.families import SD15_INPAINT
    from sdinpaint.models import UNet

    torch.use_deterministic_algorithms(False)
    seed = interpreter.fresh_seed()
    config = replace(
        SD15_INPAINT.unet,
        model_channels=32,
        channel_mult=(1, 2),
        transformer_depth=(1, 0),
        num_res_blocks=1,
        context_dim=24,
        num_heads=2,
        norm_groups=4,
    )
    unet = UNet(config).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 9, 4, 6).contiguous(memory_format=torch.channels_last)
    inputs = x, torch.tensor([1.0, 500.0]), torch.randn(2, 7, 24)
    chosen, choose = Counter(), backend.choose

    def counted(operation, *tensors, **options):
        choice = choose(operation, *tensors, **options)
        chosen[f"{operation} in {choice.name}"] += 1
        return choice

    backend.choose = counted
    with torch.inference_mode():
        ours = unet(*inputs)
        backend.SETTING = "torch"
        theirs = unet(*inputs)
    return {
        "seed": seed,
        "chosen": chosen,
        "failed": backend._failures,
        "difference": interpreter.relative(ours, theirs.double()),
    }


@pytest.fixture(scope="module")
def found():
    return interpreter.run("test_whole_unet")["test_whole_unet"]


def test_every_operation_ran_in_its_kernel(found):
    chosen = found["chosen"]
    assert found["failed"] == {}
    for operation in ("add_layer_norm", "attention", "geglu", "group_norm"):
        assert chosen[f"{operation} in triton"] == chosen[f"{operation} in torch"] > 0, chosen


def test_the_kernels_give_what_torch_gives(found):
    assert found["difference"] <= CLOSE, found
