"""Operations of a step and of decoding: all are recorded, and nothing wrong is timed."""

from __future__ import annotations

from collections import Counter

import pytest
import sdinpaint_kernels
import torch
from torch.nn import functional as F

from sdinpaint.bench import kernels
from sdinpaint.bench.cases import Case
from sdinpaint.bench.kernels import TORCH, Recorder, measure_kernels, recorded_calls, recording
from sdinpaint.bench.operations import OPERATIONS
from sdinpaint.bench.peers.systems import OURS, SdInpaint
from sdinpaint.bench.roofline import flop_count
from sdinpaint.checkpoints.opening import DEMO
from sdinpaint.errors import NumericError
from sdinpaint.models import VAE, UNet, fused, layers, unet

FIELDS = {"part", "what", "family", "dtype", "stored", "device", "size", "steps", "system", "unit", "values", "check"}
STEP, DECODE = "UNet step", "VAE decode"
OUTPUTS = {
    layers.GroupNorm: "group_norm",
    unet.SelfAttention: "attention",
    unet.CrossAttention: "attention",
    unet.GEGLU: "linear_geglu",
}
"""The modules of the UNet that put out what an operation does, or its heads side by side."""


def demo_case(rounds=1):
    given = {"family": "demo", "checkpoint": str(DEMO), "dtype": "float32", "stored": None, "device": "cpu"}
    return Case(**given, size=64, steps=1, rounds=rounds, quick=True)


@pytest.fixture(scope="module")
def calls():
    return recorded_calls(demo_case())


@pytest.fixture
def quickly(monkeypatch):
    """No clock is waited for, and no rate of the machine is measured."""
    monkeypatch.setattr(kernels, "SHORTEST", 1e-9)
    monkeypatch.setattr("sdinpaint.bench.roofline.peak_flops", lambda dtype, device: 1e12)
    monkeypatch.setattr("sdinpaint.bench.roofline.peak_bandwidth", lambda device: 1e10)
    return monkeypatch


def counted(calls, operation):
    """How often the operation put out each shape."""
    found = Counter()
    for call in calls.values():
        if call.operation == operation:
            args, options = call.on_meta()
            found[OPERATIONS[operation].plain(*args, **options).shape[1:]] += call.count
    return found


# What is recorded


def test_every_operation_of_the_library_is_known():
    about = {"Contents", "contents", "forget", "is_functional", "is_replaced", "is_transformed", "keeping_memory"}
    about |= {"lies_in", "private_maps", "release", "unchanged", "verified"}
    parts = {"layer_norm"}  # of add_layer_norm
    assert {*sdinpaint_kernels.__all__} - about - parts <= {*OPERATIONS}


def test_what_is_recorded_of_a_step_is_what_its_modules_put_out(calls):
    system = SdInpaint(demo_case())
    system.step()
    found = {name: Counter() for name in OUTPUTS.values()}

    def count(module, args, out):
        heads = (module.heads, out.shape[-1] // module.heads) if isinstance(module, unet.Attention) else out.shape[-1:]
        # a hooked UNet is given whole batches, where a plain one is given what both halves share once
        found[OUTPUTS[type(module)]][torch.Size([*out.shape[1:-1], *heads])] += 1

    for module in system.pipe.unet.modules():
        if type(module) in OUTPUTS:
            module.register_forward_hook(count)
    system.step()
    assert found == {name: counted(calls[STEP], name) for name in found}
    blocks = sum(isinstance(module, unet.TransformerBlock) for module in system.pipe.unet.modules())
    transformers = sum(isinstance(module, unet.SpatialTransformer) for module in system.pipe.unet.modules())
    added = {name: call.count for name, call in calls[STEP].items() if "+ residual" in name and "linear" in name}
    assert sum(added.values()) == 3 * blocks + transformers


def test_the_arithmetic_of_all_that_is_recorded_is_that_of_the_models(calls):
    def arithmetic(recorded):
        total = 0
        for call in recorded.values():
            args, options = call.on_meta()
            total += call.count * flop_count(lambda: OPERATIONS[call.operation].plain(*args, **options))  # noqa: B023
        return total

    family = SdInpaint(demo_case()).pipe.family
    with torch.device("meta"), torch.inference_mode():
        t, context = torch.empty(1), torch.empty(2, 77, family.unet.context_dim)
        x, latents = torch.empty(1, family.unet.in_channels, 8, 8), torch.empty(1, 4, 8, 8)
        assert arithmetic(calls[STEP]) == flop_count(lambda: UNet(family.unet)(x, t, context))
        assert arithmetic(calls[DECODE]) == flop_count(lambda: VAE(family.vae).decode(latents))


def test_calls_that_are_told_alike_are_one_and_all_is_as_it_was_afterwards():
    x = torch.randn(2, 3, 8)
    before = fused.geglu
    with recording() as calls:
        F.linear(fused.geglu(x), torch.ones(5, 4))
        F.linear(fused.geglu(x), torch.ones(5, 4))
        F.linear(fused.geglu(x), torch.ones(5, 4), torch.ones(5))
    found = {told: call.count for told, call in calls.items()}
    assert found == {"geglu 2x3x8": 3, "F.linear 2x3x4 to 5": 2, "F.linear 2x3x4 to 5 + bias": 1}
    assert fused.geglu is before


def test_what_says_how_an_operation_runs_tells_calls_apart(quickly):
    x = torch.randn(2, 3, 8)
    with recording() as calls:
        fused.geglu(x)
        fused.geglu(x, kernels="torch")
    assert list(calls) == ["geglu 2x3x8", "geglu 2x3x8, by torch"]
    quickly.setattr(kernels, "recorded_calls", lambda case: {STEP: calls})
    assert len(list(measure_kernels(demo_case(), ()))) == 4


def test_what_an_operation_calls_is_not_taken_down_beside_it():
    recorder = Recorder()
    around = recorder.watching("geglu", lambda x: F.linear(x, x))
    with recorder:
        around(torch.ones(2, 2))
    assert list(recorder.calls) == ["geglu 2x2"]


def test_what_is_drawn_lies_as_what_was_recorded():
    q, k, v = torch.randn(2, 5, 3 * 24, dtype=torch.bfloat16).unflatten(-1, (3, 4, 6)).unbind(2)
    addend = torch.randn(1, 7).expand(3, -1)
    image = torch.randn(3, 7, 4, 4).contiguous(memory_format=torch.channels_last)
    with recording() as calls:
        unet.attention(q, k, v)
        layers.group_norm(image, 7, image[0, :, 0, 0], image[1, :, 0, 0], eps=1e-5, silu=True, addend=addend)
    attention, norm = calls.values()
    assert list(calls) == ["attention 2x5x4x6 strided", "group_norm 3x7x4x4 channels-last + addend, silu"]
    args, options = norm.drawn("cpu")
    pairs = [*zip([q, k, v], attention.drawn("cpu")[0], strict=True), (image, args[0]), (addend, options["addend"])]
    for given, drawn in pairs:
        assert (drawn.shape, drawn.stride(), drawn.dtype) == (given.shape, given.stride(), given.dtype)
        assert drawn.isfinite().all()
    assert options["eps"] == 1e-5


# What is measured


def test_rows_hold_their_fields_and_those_with_most_to_do_come_first(calls, quickly):
    chosen = {where: dict(list(found.items())[:6]) for where, found in calls.items()}
    quickly.setattr(kernels, "recorded_calls", lambda case: chosen)
    rows = list(measure_kernels(demo_case(rounds=3), ()))
    ours = [row for row in rows if row["system"] == OURS]
    assert [row["what"].partition(", ")[0] for row in ours] == [STEP] * 6 + [DECODE] * 6
    assert sorted(row["what"] for row in ours) == sorted(
        f"{w}, {told}" for w, found in chosen.items() for told in found
    )
    for row in rows:
        assert row.keys() >= FIELDS | {"count", "percent_of_floor"}
        assert row["unit"] == "ms"
        assert len(row["values"]) == 3
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["percent_of_floor"] > 0
        assert (row["ratio"] is None) == (row["system"] == OURS or row["check"] == kernels.SAME)
    for where in (STEP, DECODE):
        of_it = [row for row in ours if row["what"].startswith(where)]
        times = [row["count"] * row["percent_of_floor"] * row["p50"] for row in of_it]
        assert times == pytest.approx(sorted(times, reverse=True))
    beside_torch = {row["what"] for row in rows if row["system"] == TORCH}
    left_to_torch = {row["what"] for row in ours if row["check"] == "torch's own"}
    assert beside_torch | left_to_torch == {row["what"] for row in ours}
    assert all(", F." in what for what in left_to_torch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", [name for name in sdinpaint_kernels.__all__ if name in OPERATIONS])
def test_each_operation_passes_its_check(operation, dtype, quickly):
    rows = measured(quickly, operation, dtype)
    assert [row["system"] for row in rows] == [OURS, TORCH]
    assert "bound" in rows[0]["check"]


BREAKS = {
    "a little too large": lambda out: out * 1.0001,
    "one number wrong": lambda out: put(out, 0.5),
    "one number not finite": lambda out: put(out, torch.nan),
    "wider than asked": torch.Tensor.double,
    "a row short": lambda out: out[:1],
    "a row short, but for the last": lambda out: out[:, :1],
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("operation", ["attention", "add_layer_norm"])
def test_a_broken_operation_is_refused(operation, name, quickly):
    with pytest.raises(NumericError, match=f"float32: {STEP}, {operation} 2x5x") as caught:
        measured(quickly, operation, torch.float32, BREAKS[name])
    assert caught.value.code == "BENCH_WRONG"


def put(out, value):
    """`out` with another last number."""
    out = out.clone()
    out.view(-1)[-1] += value
    return out


def measured(patch, operation, dtype, change=lambda out: out):
    """The rows of one call of an operation whose (last) output is changed."""
    x = torch.randn(2, 5, 4, 32).to(dtype)
    lines, scale, image = x.flatten(2), torch.randn(128).to(dtype), torch.randn(2, 128, 4, 6).to(dtype)
    given = {
        "attention": ((x, x, x), {}),
        "group_norm": ((image, 2, scale, scale), {"eps": 1e-5, "silu": True}),
        "geglu": ((lines,), {}),
        "add_layer_norm": ((lines, lines, scale, scale, 1e-5), {}),
        "add_bias": ((image, image, scale), {}),
        "conv3": ((image, torch.randn(128, 128, 3, 3).to(dtype), scale), {}),
        "conv3_add": (
            (image, torch.randn(128, 128, 3, 3).to(dtype), scale),
            {"residual": image, "addend": scale[None], "maps": [image], "projection": torch.randn(128, 128).to(dtype)},
        ),
        "upsample_conv3": ((image, torch.randn(128, 128, 3, 3).to(dtype), scale), {}),
        "downsample_conv3": ((image, torch.randn(128, 128, 3, 3).to(dtype), scale), {"padding": 0}),
        "linear": ((lines, torch.randn(7, 128).to(dtype)), {}),
        "joint_linear": ((lines, [torch.randn(7, 128).to(dtype) for _ in range(3)]), {}),
        "linear_geglu": ((lines, torch.randn(10, 128).to(dtype), torch.randn(10).to(dtype)), {}),
    }
    args, options = given[operation]
    right = getattr(sdinpaint_kernels, operation)

    def broken(*args, **options):
        out = right(*args, **options)
        return (*out[:-1], change(out[-1])) if isinstance(out, tuple) else change(out)

    patch.setattr(sdinpaint_kernels, operation, broken)
    patch.setattr(layers, operation, broken, raising=False)  # the models look it up among names of their own
    with recording() as calls:
        getattr(layers, operation)(*args, **options)
    patch.setattr(kernels, "recorded_calls", lambda case: {STEP: calls})
    return list(measure_kernels(demo_case(), ()))
