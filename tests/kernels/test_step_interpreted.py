"""The whole guided step through the Triton kernels, in the interpreter, against torch's operations and float64."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import replace

import interpreter
import pytest
import torch
from builders import fill
from sdinpaint_kernels import backend

from sdinpaint.families import SD15_INPAINT
from sdinpaint.models import UNet, fused
from sdinpaint.models.weights import pack
from sdinpaint.sampling import Conditioning, Denoiser, schedules

CONFIG = replace(
    SD15_INPAINT.unet,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    transformer_depth=(1, 0),
    context_dim=24,
    num_heads=2,
    norm_groups=8,
)


def step(unet, texts, x, extra, setting, dtype=torch.float32):
    """x0 of one step, by operations of one kind alone."""
    backend.SETTING = setting
    given = [Conditioning(text.to(dtype)) for text in texts]
    trained = schedules.train_sigmas(SD15_INPAINT.schedule)
    denoise = Denoiser(unet, trained, "eps", *given, extra=[one.to(dtype) for one in extra], dtype=dtype)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("error", message=".*although Triton was requested")
        return denoise(x.to(dtype), 1.7)


def interpreted():
    seed = interpreter.fresh_seed()
    unet = fill(UNet(CONFIG), seed).eval().requires_grad_(False)
    extra = (torch.ones(1, 1, 4, 6), torch.randn(1, 4, 4, 6))
    given = torch.randn(2, 1, 9, 24).unbind(), 1.7 * torch.randn(1, 4, 4, 6), extra
    exact = step(copy.deepcopy(unet).double(), *given, "torch", torch.float64)
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    pack(unet)
    fused.adds_bias_apart = lambda x: True

    chosen, choose = Counter(), backend.choose

    def counted(operation, *tensors, **options):
        choice = choose(operation, *tensors, **options)
        chosen[f"{operation} in {choice.name}"] += 1
        return choice

    def error(setting):
        return interpreter.relative(step(unet, *given, setting), exact)

    backend.choose = counted
    found = {"seed": seed, "torch": error("torch"), "triton": error("triton")}
    found |= {"chosen": dict(chosen), "failed": backend._failures}
    with interpreter.broken("linear_geglu_kernel", "0.7071067811865476", "0.70"):
        found["broken"] = error("triton")
    return found


@pytest.fixture(scope="module")
def found():
    return interpreter.run("test_step_interpreted")["test_step_interpreted"]


def test_the_step_through_the_kernels_is_as_exact_as_torch(found):
    assert found["triton"] <= 2 * found["torch"] + 1e-6, found


def test_every_operation_ran_in_its_kernel(found):
    assert found["failed"] == {}
    for operation in ("add_layer_norm", "attention", "conv3_add", "group_norm", "linear_geglu"):
        assert found["chosen"][f"{operation} in triton"] == found["chosen"][f"{operation} in torch"] > 0, found


def test_a_mistake_in_a_kernel_shows_in_the_step(found):
    assert found["broken"] > 100 * found["triton"], found
