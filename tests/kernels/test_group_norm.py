"""The GroupNorm kernels against float64, in Triton's interpreter and on a GPU; how their launcher cuts feature maps."""

from __future__ import annotations

import importlib

import aot
import interpreter
import pytest
import torch
from sdinpaint_kernels import group_norm

own = importlib.import_module("sdinpaint_kernels.group_norm")

SPLIT = own.Plan(bundle=3, width=32, rows=16, tiles=1, warps=4, one_pass=False)


def case(
    channels,
    groups,
    pixels,
    *,
    samples=1,
    dtype="float32",
    silu=False,
    addend=False,
    eps=1e-5,
    mean=0.0,
    std=1.0,
    cut=None,
):
    return {**locals()}


CASES = {
    # every number of channels per group in the released models, where one program sees all pixels
    **{
        f"whole, {width} channels a group": case(8 * width, 8, (3, 5), silu=True)
        for width in (4, 8, 10, 16, 20, 30, 40, 60, 80)
    },
    # and where many do, with a last chunk and a last bundle that are not full
    **{f"split, {width} channels a group": case(4 * width, 4, (13, 21), silu=True) for width in (10, 30, 80)},
    "float16": case(64, 8, (6, 7), samples=2, dtype="float16", silu=True, addend=True),
    "bfloat16": case(64, 8, (6, 7), samples=2, dtype="bfloat16", silu=True, addend=True),
    "split, float16": case(80, 8, (5, 7), samples=2, dtype="float16", silu=True, addend=True, cut=SPLIT),
    "split, bfloat16": case(80, 8, (5, 7), samples=2, dtype="bfloat16", silu=True, addend=True, cut=SPLIT),
    "several tiles a chunk": case(40, 4, (7, 13), cut=SPLIT._replace(tiles=2), addend=True),
    "merged by a kernel of its own": case(
        40, 4, (7, 9), samples=2, cut=SPLIT._replace(direct=1), addend=True, silu=True
    ),
    "addend, a slice": case(80, 8, (3, 5), samples=2, addend="slice"),
    "split, addend one row for all": case(40, 4, (7, 9), samples=2, addend="one row", cut=SPLIT),
    "one pixel": case(80, 8, (1, 1), samples=2),
    "quiet": case(80, 8, (6, 7), std=3e-3, eps=1e-5),
    "quiet, smaller eps": case(80, 8, (6, 7), std=1e-3, eps=1e-6),
    "split, quiet": case(80, 8, (6, 7), std=3e-3, eps=1e-5, cut=SPLIT),
    "far from zero": case(80, 8, (8, 8), mean=30.0, std=0.5, samples=2),
    "split, far from zero": case(40, 4, (7, 13), mean=30.0, std=0.5, samples=2, cut=SPLIT._replace(tiles=2)),
    "merged, far from zero": case(40, 4, (7, 9), mean=30.0, std=0.5, cut=SPLIT._replace(direct=1)),
}
MISTAKES = {
    "the shift": (
        "mask=present, other=0.0).to(tl.float32)\n    total,",
        "mask=present, other=0.0).to(tl.float32) * 0.0\n    total,",
        "split, far from zero",
    ),
    "eps in one pass": ("tl.rsqrt(variance + eps)", "tl.rsqrt(variance)", "quiet"),
    "eps in two passes": ("* CPG) + eps)", "* CPG))", "split, quiet"),
    "channels per group": ("(tl.arange(0, WIDTH) // CPG)", "(tl.arange(0, WIDTH) // (CPG + 1))", "split, quiet"),
    "the last chunk's size": ("pixels - chunk * chunk_pixels, chunk_pixels", "chunk_pixels, pixels", "split, float16"),
    "between channels": ("squares + count * between * between", "squares", "split, 30 channels a group"),
    "the addend": (
        "sample * addend_stride + channel, present)\n    base",
        "channel, present) * 0\n    base",
        "several tiles a chunk",
    ),
    "the last row": (
        "pixels) & present[None, :]\n        offset",
        "pixels - 1) & present[None, :]\n        offset",
        "split, quiet",
    ),
}
"""The mistakes: the right words, the wrong ones, and the case that must show it."""


def draw(channels, groups, pixels, *, samples, dtype, silu, addend, eps, mean, std, cut, device="cpu"):
    """The arguments of `launch` and of `reference`."""
    dtype = getattr(torch, dtype)
    x = (torch.randn(samples, channels, *pixels, device=device) * std + mean).to(dtype)
    weight, bias = ((torch.randn(channels, device=device) + offset).to(dtype) for offset in (1.0, 0.0))
    added = torch.randn(samples, channels, device=device).to(dtype) * std if addend else None
    if addend == "slice":
        added = torch.cat([added + 1, added, added + 2], 1)[:, channels : 2 * channels]
    if addend == "one row":
        added = added[:1].expand(samples, channels)
    return x.contiguous(memory_format=torch.channels_last), groups, weight, bias, eps, silu, added


def errors(arguments, cut=None):
    """Relative errors of the kernel and of torch against float64."""
    wide = [item.double() if isinstance(item, torch.Tensor) else item for item in arguments]
    expected = own.reference(*wide)
    ours = own.launch(*arguments, cut)
    assert (ours.shape, ours.dtype) == (expected.shape, arguments[0].dtype)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    return {
        "ours": interpreter.relative(ours, expected),
        "torch": interpreter.relative(own.reference(*arguments), expected),
    }


def interpreted():
    """{case: errors}, and for each mistake those of the case that must show it."""
    seed = interpreter.fresh_seed()
    found = {name: errors(draw(**each), each["cut"]) for name, each in CASES.items()}
    for name, (right, wrong, shown_by) in MISTAKES.items():
        with interpreter.broken("group_norm_kernel", right, wrong):
            found[f"without {name}"] = errors(draw(**CASES[shown_by]), CASES[shown_by]["cut"])
    return {"seed": seed, **found}


def allowed(name, found):
    """Twice torch's error; where the mean is far, what rounding it to float32 twice may cost, which torch does not."""
    each = CASES[name]
    rounding = 2**-24 * each["mean"] / each["std"]  # x - mean is off by that of the mean
    return 2 * rounding or 2 * found["torch"] + interpreter.TINY[each["dtype"]]


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_as_exact_as_torch(name, found):
    assert found[name]["ours"] <= allowed(name, found[name]), (name, found[name], found["seed"])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(name, found):
    mistaken = found[f"without {name}"]
    shown_by = MISTAKES[name][2]
    assert not mistaken["ours"] <= allowed(shown_by, mistaken), (name, mistaken, found["seed"])


# how a feature map is cut


@pytest.mark.parametrize(("model", "row"), aot.shapes("group_norm"))
def test_a_plan_covers_every_element_once_and_is_aligned(model, row):
    samples, channels, pixels, groups, *_ = row
    cut = own.plan(samples, channels, pixels, groups)
    per_group = channels // groups
    assert cut.bundle * per_group <= cut.width
    assert cut.bundle * per_group % own.ALIGNED == 0
    assert cut.chunks(pixels) * cut.rows * cut.tiles >= pixels > (cut.chunks(pixels) - 1) * cut.rows * cut.tiles
    assert cut.one_pass == (cut.rows >= pixels) or pixels > own.ONE_PASS_PIXELS
    assert cut.chunks(pixels) <= 2 * own.PROGRAMS  # what the merging kernel holds in registers


def launches(*shape, groups=32, cut=None, **options):
    with aot.recording("group_norm_kernel") as noted:
        x = aot.empty(*shape).to(memory_format=torch.channels_last)
        weight = aot.empty(shape[1])
        own.launch(x, groups, weight, weight, 1e-5, True, None, cut)
    return noted


def test_small_maps_take_one_launch_and_large_ones_two_or_three():
    (whole,) = launches(2, 1280, 8, 8)
    assert (whole.kernel.__name__, whole.grid) == ("normalise", (32, 2))
    measure, apply = launches(2, 320, 64, 64)
    assert measure.grid == apply.grid == (32, 8, 2)  # 128 pixels, 4 groups of 10 channels, one sample each
    assert [each.kernel.__name__ for each in launches(1, 128, 512, 512)] == ["measure", "merge", "apply"]


def test_the_launcher_hands_over_shapes_and_strides():
    measure, apply = launches(2, 320, 64, 64)
    for each in (measure, apply):
        assert (each.arguments["C"], each.arguments["CPG"], each.arguments["pixels"]) == (320, 10, 4096)
        assert each.arguments["x"].stride() == (320 * 4096, 1, 320 * 64, 320)
    assert apply.arguments["measured"] is measure.arguments["measured"]
    assert apply.arguments["measured"].shape == (2, 2, 32, 32)
    assert apply.arguments["SLOTS"] >= apply.arguments["chunks"] == 32
    assert apply.arguments["chunk_pixels"] == measure.arguments["ROWS"] * measure.arguments["tiles"]


def test_after_the_merging_kernel_a_sample_is_one_chunk():
    _, merge, apply = launches(1, 128, 512, 512)
    assert merge.arguments["SLOTS"] >= merge.arguments["chunks"] > own.DIRECT_CHUNKS
    assert (apply.arguments["chunks"], apply.arguments["SLOTS"], apply.arguments["chunk_pixels"]) == (1, 1, 512 * 512)


@pytest.mark.parametrize(
    ("x", "groups", "why"),
    [
        (torch.empty(1, 64, 4, 4), 8, "channels-last"),
        (torch.empty(1, 64, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last), 8, "float64"),
        (torch.empty(1, 20, 4, 4).to(memory_format=torch.channels_last), 4, "aligned"),
        (torch.empty(1, 2056, 2, 2).to(memory_format=torch.channels_last), 1, "aligned"),
        (torch.empty(0, 64, 4, 4).to(memory_format=torch.channels_last), 8, "nothing"),
        (torch.empty(1, 64, 2**13, 2**13, device="meta").to(memory_format=torch.channels_last), 8, "32-bit"),
    ],
)
def test_what_the_kernel_cannot_take_is_said(x, groups, why):
    weight = torch.empty(x.shape[1])
    assert why in own._obstacle(x, groups, weight, weight, None)


def test_a_broken_up_weight_or_addend_is_left_to_torch():
    x, weight = torch.empty(2, 32, 4, 4).to(memory_format=torch.channels_last), torch.empty(64)
    for others in ((weight[::2], weight[:32], None), (weight[:32], weight[::2], None)):
        assert "one piece" in own._obstacle(x, 8, *others)
    whole = weight[:32]
    assert "one piece" in own._obstacle(x, 8, whole, whole, torch.empty(32, 2).t())
    for addend in (torch.empty(2, 96)[:, 32:64], torch.empty(1, 32).expand(2, 32)):
        assert own._obstacle(x, 8, whole, whole, addend) is None


# the public operation


@pytest.mark.parametrize("shape", [(0, 64, 4, 4), (2, 64, 0, 4)])
def test_nothing_in_nothing_out(shape):
    x = torch.empty(shape)
    assert group_norm(x, 8, torch.ones(64), torch.zeros(64), eps=1e-5, silu=True).shape == shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(2, 64, 4)}, ["(2, 64, 4)", "stride (256, 4, 1)"]),
        ({"groups": 7}, ["7 groups", "(2, 64, 4, 4)"]),
        ({"groups": 0}, ["0 groups"]),
        ({"weight": torch.ones(32)}, ["(32,)", "64"]),
        ({"bias": torch.ones(64, 1)}, ["(64, 1)"]),
        ({"addend": torch.ones(2, 32)}, ["(2, 32)", "(2, 64)"]),
        ({"x": torch.ones(2, 64, 4, 4, dtype=torch.int64)}, ["torch.int64"]),
        ({"weight": torch.ones(64, dtype=torch.float64)}, ["weight", "torch.float64", "torch.float32"]),
        ({"bias": torch.ones(64, device="meta")}, ["bias", "meta"]),
        ({"kernels": "cuda"}, ["'cuda'", "triton"]),
    ],
)
def test_bad_input_is_named(change, words):
    good = {"x": torch.ones(2, 64, 4, 4), "groups": 8, "weight": torch.ones(64), "bias": torch.zeros(64), "eps": 1e-5}
    with pytest.raises(ValueError) as caught:
        group_norm(**good | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_torch_keeps_the_format_and_adds_before_the_norm(memory_format):
    x = torch.randn(2, 24, 5, 7).contiguous(memory_format=memory_format)
    weight, bias, addend = torch.randn(24), torch.randn(24), torch.randn(2, 24)
    out = group_norm(x, 4, weight, bias, eps=1e-5, silu=True, addend=addend)
    wide = (x + addend[:, :, None, None]).double().reshape(2, 4, -1)
    wide = (wide - wide.mean(2, keepdim=True)) / (wide.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    wide = wide.view(2, 24, 5, 7) * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(out.double(), wide * wide.sigmoid(), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=memory_format)


# on a GPU

REAL = sorted({tuple(row[:6]) for _, row in aot.shapes("group_norm")})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes_on_the_gpu(shape, dtype):
    samples, channels, pixels, groups, eps, silu = shape
    told = case(
        channels, groups, (pixels, 1), samples=samples, dtype=dtype, silu=silu, addend=silu, eps=eps, mean=1.0, std=2.0
    )
    arguments = draw(**told, device="cuda")
    assert errors(arguments)["ours"] <= {"float16": 1e-3, "bfloat16": 1e-2}[dtype]
    first, second = own.launch(*arguments), own.launch(*arguments)
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_every_path_on_the_gpu(name):
    arguments = draw(**CASES[name], device="cuda")
    found = errors(arguments, CASES[name]["cut"])
    assert found["ours"] <= allowed(name, found), found


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [(8, 8), (64, 64), (256, 256)])
def test_a_graph_replays_what_eager_computes(pixels):
    arguments = draw(**case(320, 32, pixels, samples=2, dtype="bfloat16", silu=True, addend=True), device="cuda")
    expected = own.launch(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = own.launch(*arguments)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_the_public_operation_on_the_gpu():
    x, groups, weight, bias, eps, silu, addend = draw(
        **case(320, 32, (16, 16), samples=2, dtype="float16", silu=True, addend=True), device="cuda"
    )

    def call(x, **options):
        return group_norm(x, groups, weight, bias, eps=eps, silu=silu, addend=addend, **options)

    ours = call(x, kernels="triton")
    assert torch.equal(ours, own.launch(x, groups, weight, bias, eps, silu, addend))
    torch.testing.assert_close(call(x, kernels="torch"), ours, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(call(x.contiguous()), ours, rtol=2e-2, atol=2e-2)
    assert torch.equal(torch.compile(call, fullgraph=True)(x), ours)
    x.requires_grad_()
    call(x).sum().backward()
    assert x.grad is not None
