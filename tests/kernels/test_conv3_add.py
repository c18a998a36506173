"""The convolution kernel against float64, in Triton's interpreter, compiled, and on a GPU."""

from __future__ import annotations

import importlib

import aot
import interpreter
import pytest
import torch
from sdinpaint_kernels import conv3, conv3_add, faster

own = importlib.import_module("sdinpaint_kernels.conv3_add")

SMALL = own.Config(32, 32, 32, 4, 2, 1)
SPLIT = SMALL._replace(block_m=16, block_n=16, split=5)
CASES = {
    # name -> dtype, (B, C, H, W, O), what is added, channels of the maps, configuration
    "bias": ("float32", (1, 32, 4, 5, 24), "bias", (), SMALL),
    "nothing": ("float32", (1, 64, 5, 7, 16), "", (), SMALL),
    "9 channels to 4": ("float32", (1, 9, 3, 5, 4), "bias", (), SMALL),
    "all": ("float32", (2, 32, 4, 5, 24), "bias addend residual", (), SMALL),
    "one map": ("float32", (1, 32, 3, 5, 16), "bias", (40,), SMALL),
    "two maps": ("float32", (1, 32, 4, 5, 16), "bias addend", (32, 64), SMALL),
    "split": ("float32", (2, 32, 3, 3, 24), "bias addend residual", (), SPLIT),
    "split, two maps": ("float32", (1, 32, 3, 5, 16), "addend", (64, 32), SPLIT),
    "float16": ("float16", (2, 32, 2, 4, 16), "bias addend residual", (), SPLIT),
    "bfloat16": ("bfloat16", (2, 32, 4, 4, 16), "bias residual", (32, 32), SMALL),
}
MISTAKES = {
    # name -> the text of the kernel, what stands there instead, and the case that shows it
    "the upper edge": ("(above >= 0)", "(above >= -1)", "bias"),
    "the right edge": ("(left < width)", "(left <= width)", "bias"),
    "a neighbour": ("pixel + down * width + right", "pixel + down * width - right", "bias"),
    "channels beyond the last": ("if C % BLOCK_K:", "if False:", "one map"),
    "the last steps": ("SPLIT - 1) // SPLIT", "0) // SPLIT", "split"),
    "a part": ("tl.static_range(SPLIT)", "tl.static_range(SPLIT - 1)", "split"),
    "the residual": ("if residual is not None", "if residual is None", "all"),
    "the sample of the addend": ("sample = (pixel // area)[:, None]", "sample = (0 * pixel)[:, None]", "split"),
    "the second map": ("C2, 1, C1, C1 + C2", "C2, 1, 0, C1 + C2", "split, two maps"),
}


def nhwc(*shape, dtype, device="cpu"):
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def draw(dtype, shape, added, widths, device="cpu"):
    """The arguments of `launch` but its configuration."""
    batch, inputs, height, width, outputs = shape
    like = {"dtype": getattr(torch, dtype), "device": device}
    x = nhwc(batch, inputs, height, width, **like)
    weight = nhwc(outputs, inputs, 3, 3, **like) / (3 * inputs**0.5)
    maps = [nhwc(batch, one, height, width, **like) for one in widths]
    given = {
        "bias": torch.randn(outputs, device=device).to(x.dtype),
        "addend": torch.randn(batch, 2 * outputs, device=device).to(x.dtype)[:, outputs:],
        "residual": nhwc(batch, outputs, height, width, **like),
    }
    projection = (torch.randn(outputs, sum(widths), device=device) / sum(widths) ** 0.5).to(x.dtype) if maps else None
    return x, weight, *(given[name] if name in added else None for name in given), maps, projection


def doubled(given):
    return [
        [each.double() for each in one] if isinstance(one, list) else one if one is None else one.double()
        for one in given
    ]


def errors(given, config=None):
    expected = own.reference(*doubled(given))
    ours = own.launch(*given, config)
    assert (ours.shape, ours.dtype) == (expected.shape, given[0].dtype)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    found = own.reference(*given)
    return {"ours": interpreter.relative(ours, expected), "torch": interpreter.relative(found, expected)}


def interpreted():
    seed = interpreter.fresh_seed()
    found = {name: errors(draw(*case), config) for name, (*case, config) in CASES.items()}
    for name, (right, wrong, case) in MISTAKES.items():
        with interpreter.broken("conv3_add_kernel", right, wrong):
            *drawn, config = CASES[case]
            found[f"without {name}"] = errors(draw(*drawn), config)
    return {"seed": seed, **found}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_as_exact_as_torch(name, found):
    tiny = interpreter.TINY[CASES[name][0]]
    assert found[name]["ours"] <= 2 * found[name]["torch"] + tiny, (name, found[name], found["seed"])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(name, found):
    mistaken = found[f"without {name}"]
    assert not mistaken["ours"] <= 2 * mistaken["torch"] + interpreter.TINY["float32"], (name, mistaken, found["seed"])


def recorded(batch, inputs, pixels, outputs, widths=(), added="bias"):
    """The launches at a size of the released models."""

    def nothing(*shape):
        return aot.empty(*shape).to(memory_format=torch.channels_last)

    side = round(pixels**0.5)
    maps = [nothing(batch, one, side, side) for one in widths]
    projection = aot.empty(outputs, sum(widths)) if maps else None
    residual = nothing(batch, outputs, side, side) if "residual" in added else None
    x, weight = nothing(batch, inputs, side, side), nothing(outputs, inputs, 3, 3)
    with aot.recording("conv3_add_kernel") as launches:
        own.launch(x, weight, aot.empty(outputs), None, residual, maps, projection)
    return launches


@pytest.mark.parametrize(("model", "row"), aot.shapes("conv3_add"))
def test_every_output_and_every_step_has_a_program(model, row):
    batch, inputs, pixels, outputs, _ = row
    first, *adding = recorded(*row[:4])
    grid, given = first.grid, first.arguments
    assert grid[0] * given["BLOCK_N"] >= outputs > (grid[0] - 1) * given["BLOCK_N"]
    assert grid[1] * given["BLOCK_M"] >= batch * pixels > (grid[1] - 1) * given["BLOCK_M"]
    assert grid[2] == given["SPLIT"]
    assert bool(adding) == (given["SPLIT"] > 1)
    for one in adding:
        assert one.grid[0] * one.arguments["COLUMNS"] >= outputs
        assert one.grid[1] * one.arguments["ROWS"] >= batch * pixels
    if inputs % 64 == 0:
        assert given["BLOCK_K"] == 64
    programs = grid[0] * grid[1] * grid[2]
    assert (
        programs >= 2 * 132 / 3 or given["SPLIT"] * own.LEAST_STEPS > 9 * inputs // given["BLOCK_K"] - own.LEAST_STEPS
    )


def test_it_fits_and_uses_its_tensor_cores(tmp_path, environment):
    environment(TRITON_CACHE_DIR=tmp_path)
    found = [aot.resources(aot.compile_for(launch, 90)) for launch in recorded(2, 640, 1024, 640)]
    for one in found:
        assert not aot.excess(one, 90), one
        assert one["stores128"] >= 2, one
    convolving, adding = found
    assert min(convolving["HGMMA"], convolving["async_copies"], adding["loads128"]) > 0, found


def plain(*shape, **options):
    return torch.ones(*shape, **options).contiguous(memory_format=torch.channels_last)


WEIGHT = plain(8, 4, 3, 3)


@pytest.mark.parametrize(
    ("x", "given", "why"),
    [
        (plain(1, 4, 3, 3).double(), {}, "float64"),
        (torch.ones(1, 4, 3, 3).half(), {}, "channels-last"),
        (plain(1, 4, 3, 3).half(), {"maps": [torch.ones(1, 4, 3, 3)]}, "channels-last"),
        (plain(1, 4, 3, 3).half(), {"bias": torch.ones(16)[::2]}, "one piece"),
        (plain(1, 4, 3, 3).half(), {"addend": torch.ones(1, 16)[:, ::2]}, "one piece"),
        (plain(0, 4, 3, 3).half(), {}, "nothing"),
    ],
)
def test_what_the_kernel_cannot_take_is_said(x, given, why):
    names = ("bias", "addend", "residual", "maps", "projection")
    empty = {"maps": []}
    assert why in own._obstacle(x, WEIGHT, *(given.get(name, empty.get(name)) for name in names))


def test_on_other_devices_torch_computes_it():
    x, weight, *added = draw("float64", (2, 8, 3, 4, 6), "bias addend residual", (3, 5))
    bias, addend, residual, maps, projection = added
    given = {"addend": addend, "residual": residual, "maps": maps, "projection": projection}
    found = conv3_add(x, weight, bias, **given)
    shortcut = torch.einsum("bchw,oc->bohw", torch.cat(maps, 1), projection)
    expected = torch.nn.functional.conv2d(x, weight, bias, padding=1) + addend[:, :, None, None] + shortcut + residual
    assert torch.allclose(found, expected, atol=1e-12)
    leaves = [one.detach().requires_grad_() for one in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(lambda x, w, b, r: conv3_add(x, w, b, residual=r), leaves)


def test_a_size_that_nobody_measured_is_left_to_torch(monkeypatch):
    table = {"9.0": {"conv3_add": {"32 4 8 1": [64, 64, 64, 4, 4, 2]}}}
    monkeypatch.setattr(faster, "table", lambda: table)
    monkeypatch.setattr(faster, "_capability", lambda index: "9.0")
    on_gpu = torch.device("cuda", 0)
    assert own.Config(*faster.configuration("conv3_add", (32, 4, 8, 1), on_gpu)).split == 2
    assert faster.configuration("conv3_add", (32, 4, 8, 0), on_gpu) is None
    assert faster.configuration("linear_geglu", (32, 4, 8, 1), on_gpu) is None
    monkeypatch.setattr(faster, "_capability", lambda index: "8.0")
    assert faster.configuration("conv3_add", (32, 4, 8, 1), on_gpu) is None
    assert "32 x 4 x 8 x 1" in faster.why_torch("conv3_add", (32, 4, 8, 1), torch.ones(1))


def test_the_committed_table_holds_configurations():
    operations = {
        "conv3_add": own.Config,
        "linear_geglu": importlib.import_module("sdinpaint_kernels.linear_geglu").Config,
    }
    for by_operation in faster.table().values():
        for operation, rows in by_operation.items():
            for sizes, config in rows.items():
                assert len(sizes.split()) == (4 if operation == "conv3_add" else 3)
                operations[operation](*config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", sorted({tuple(row[:4]) for _, row in aot.shapes("conv3_add")}))
def test_real_shapes_on_the_gpu(sizes, dtype):
    batch, inputs, pixels, outputs = sizes
    side = round(pixels**0.5)
    given = draw(dtype, (batch, inputs, side, side, outputs), "bias residual", (), device="cuda")
    found = errors(given)
    assert found["ours"] <= 2 * found["torch"] + interpreter.TINY[dtype]
    x, weight, bias, _, residual, *_ = given
    launched = own.launch(*given)
    assert torch.equal(launched, own.launch(*given))
    assert torch.equal(conv3_add(x, weight, bias, residual=residual, kernels="triton"), launched)
    assert torch.equal(conv3(x, weight, kernels="triton"), own.launch(x, weight))
