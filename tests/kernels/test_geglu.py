"""The GEGLU kernel against float64, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import importlib

import aot
import interpreter
import pytest
import torch
from sdinpaint_kernels import geglu

own = importlib.import_module("sdinpaint_kernels.geglu")

CASES = {
    f"{dtype}, {shape}": (dtype, shape)
    for dtype in ("float32", "float16", "bfloat16")
    for shape in ((2, 7, 48), (9, 1280), (1, 16))
}
MISTAKES = {
    "the root": ("0.7071067811865476", "0.70"),
    "the order of the halves": (
        "value * (0.5 * gate * (1.0 + tl.erf(gate",
        "gate * (0.5 * value * (1.0 + tl.erf(value",
    ),
    "the last row": ("row < rows - first", "row < rows - first - 1"),
}


def draw(dtype, shape, device="cpu"):
    return (torch.randn(shape, device=device) * 2).to(getattr(torch, dtype))


def errors(x, tile=own.TILE):
    expected = own.reference(x.double())
    ours = own.launch(x, tile)
    assert (ours.shape, ours.dtype) == (expected.shape, x.dtype)
    return {"ours": interpreter.relative(ours, expected), "torch": interpreter.relative(own.reference(x), expected)}


def interpreted():
    seed = interpreter.fresh_seed()
    found = {name: errors(draw(*each)) for name, each in CASES.items()}
    found["other tiles"] = errors(draw("float32", (9, 160)), own.Tile(2, 32, 4))
    for name, (right, wrong) in MISTAKES.items():
        with interpreter.broken("geglu_kernel", right, wrong):
            found[f"without {name}"] = errors(draw("float32", (9, 64)))
    return {"seed": seed, **found}


@pytest.mark.parametrize("name", [*CASES, "other tiles"])
def test_the_kernel_is_as_exact_as_torch(name, found):
    tiny = interpreter.TINY[CASES.get(name, ("float32",))[0]]
    assert found[name]["ours"] <= 2 * found[name]["torch"] + tiny, (name, found[name], found["seed"])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(name, found):
    mistaken = found[f"without {name}"]
    assert not mistaken["ours"] <= 2 * mistaken["torch"] + interpreter.TINY["float32"], (name, mistaken, found["seed"])


@pytest.mark.parametrize(("model", "row"), aot.shapes("geglu"))
def test_the_grid_covers_the_output(model, row):
    with aot.recording("geglu_kernel") as launches:
        out = own.launch(aot.empty(*row[:2]))
    (noted,) = launches
    rows, inner = out.shape
    assert (rows, inner) == (row[0], row[1] // 2)
    assert noted.grid[0] * own.TILE.rows >= rows > (noted.grid[0] - 1) * own.TILE.rows
    assert noted.grid[1] * own.TILE.columns >= inner > (noted.grid[1] - 1) * own.TILE.columns
    assert (noted.arguments["INNER"], noted.arguments["rows"]) == (inner, rows)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.empty(4, 32, dtype=torch.float64), "float64"),
        (torch.empty(32, 4).t(), "contiguous"),
        (torch.empty(4, 24), "aligned"),
        (torch.empty(0, 32), "nothing"),
    ],
)
def test_what_the_kernel_cannot_take_is_said_and_still_computed(x, why):
    assert why in own._obstacle(x)
    assert geglu(x).shape == (x.shape[0], x.shape[1] // 2)


@pytest.mark.parametrize("x", [torch.ones(()), torch.ones(3, 5), torch.ones(3, 4, dtype=torch.int32)])
def test_bad_input_is_named(x):
    with pytest.raises(ValueError) as caught:
        geglu(x)
    assert all(str(word) in str(caught.value) for word in (tuple(x.shape), x.stride(), x.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", sorted({tuple(row[:2]) for _, row in aot.shapes("geglu")}))
def test_real_shapes_on_the_gpu(shape, dtype):
    x = draw(dtype, shape, device="cuda")
    found = errors(x)
    assert found["ours"] <= 2 * found["torch"] + interpreter.TINY[dtype]
    assert torch.equal(own.launch(x), own.launch(x))
    assert torch.equal(geglu(x, kernels="triton"), own.launch(x))
    assert torch.equal(torch.compile(geglu, fullgraph=True)(x), own.launch(x))
