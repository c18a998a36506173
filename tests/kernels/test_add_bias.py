"""The kernel that adds two maps and a bias against float64, in Triton's interpreter, compiled, and on a GPU."""

from __future__ import annotations

import importlib

import aot
import interpreter
import pytest
import torch
from sdinpaint_kernels import add_bias

own = importlib.import_module("sdinpaint_kernels.add_bias")

CASES = {
    f"{dtype}, {shape}": (dtype, shape)
    for dtype in ("float32", "float16", "bfloat16")
    for shape in ((2, 40, 5, 7), (1, 128, 9, 3), (3, 320, 2, 2))
}
MISTAKES = {
    "the bias": ("other=0.0).to(tl.float32) + added", "other=0.0).to(tl.float32)"),
    "the last row": ("row < rows - first", "row < rows - first - 1"),
}
REAL = [(2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 8, 8), (2, 640, 64, 64), (1, 128, 512, 512), (1, 512, 64, 64)]


def draw(dtype, shape, device="cpu"):
    """x, h and bias."""
    maps = torch.randn(2, *shape, device=device).to(getattr(torch, dtype))
    x, h = (one.contiguous(memory_format=torch.channels_last) for one in maps)
    return x, h, torch.randn(shape[1], device=device).to(x.dtype)


def errors(given, tile=None):
    expected = own.reference(*(one.double() for one in given))
    ours = own.launch(*given, tile)
    assert (ours.shape, ours.dtype) == (expected.shape, given[0].dtype)
    return {
        "ours": interpreter.relative(ours, expected),
        "torch": interpreter.relative(own.reference(*given), expected),
    }


def interpreted():
    seed = interpreter.fresh_seed()
    found = {name: errors(draw(*each)) for name, each in CASES.items()}
    found["other tiles"] = errors(draw("float32", (1, 160, 3, 3)), own.Tile(2, 32))
    for name, (right, wrong) in MISTAKES.items():
        with interpreter.broken("add_bias_kernel", right, wrong):
            found[f"without {name}"] = errors(draw("float32", (2, 40, 5, 7)))
    return {"seed": seed, **found}


@pytest.mark.parametrize("name", [*CASES, "other tiles"])
def test_the_kernel_is_as_exact_as_torch(name, found):
    tiny = interpreter.TINY[CASES.get(name, ("float32",))[0]]
    assert found[name]["ours"] <= 2 * found[name]["torch"] + tiny, (name, found[name], found["seed"])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(name, found):
    mistaken = found[f"without {name}"]
    assert not mistaken["ours"] <= 2 * mistaken["torch"] + interpreter.TINY["float32"], (name, mistaken, found["seed"])


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
@pytest.mark.parametrize("channels", [320, 1280])
def test_it_fits_and_loads_wide(channels, capability, tmp_path, environment):
    environment(TRITON_CACHE_DIR=tmp_path)
    x = aot.empty(2, channels, 64, 64).to(memory_format=torch.channels_last)
    with aot.recording("add_bias_kernel") as launches:
        own.launch(x, x, aot.empty(channels))
    (noted,) = launches
    tile = own.tile_for(channels)
    assert noted.grid[0] * tile.rows >= 2 * 64 * 64 > (noted.grid[0] - 1) * tile.rows
    assert noted.grid[1] * tile.columns == channels
    found = aot.resources(aot.compile_for(noted, capability))
    assert not aot.excess(found, capability), found
    assert found["loads128"] >= 4, found
    assert found["stores128"] >= 2, found


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (draw("float64", (1, 8, 2, 3)), "float64"),
        ([one.contiguous() for one in draw("float32", (1, 8, 2, 3))], "channels-last"),
        (draw("float32", (1, 12, 2, 3)), "aligned"),
        (draw("float32", (0, 8, 2, 3)), "nothing"),
    ],
)
def test_what_the_kernel_cannot_take_is_said_and_still_computed(given, why):
    assert why in own._obstacle(*given)
    x, h, bias = given
    assert torch.equal(add_bias(*given), x + (h + bias.view(1, -1, 1, 1)))


@pytest.mark.parametrize("wrong", [{"h": (1, 8, 3, 2)}, {"bias": (7,)}, {"x": (8, 2, 3), "h": (8, 2, 3)}])
def test_bad_input_is_named(wrong):
    shapes = {"x": (1, 8, 2, 3), "h": (1, 8, 2, 3), "bias": (8,), **wrong}
    with pytest.raises(ValueError) as caught:
        add_bias(**{name: torch.ones(shape) for name, shape in shapes.items()})
    assert all(str(shape) in str(caught.value) for shape in shapes.values())


def test_it_has_gradients():
    given = [one.double().requires_grad_() for one in draw("float32", (2, 3, 2, 2))]
    assert torch.autograd.gradcheck(add_bias, given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes_on_the_gpu(shape, dtype):
    given = draw(dtype, shape, device="cuda")
    found = errors(given)
    assert found["ours"] <= 2 * found["torch"] + interpreter.TINY[dtype]
    assert torch.equal(add_bias(*given, kernels="triton"), own.launch(*given))
    assert torch.equal(torch.compile(add_bias, fullgraph=True)(*given), own.launch(*given))
