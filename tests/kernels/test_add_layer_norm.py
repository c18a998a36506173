"""The kernel of residual sum and LayerNorm against float64, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import importlib

import aot
import interpreter
import pytest
import torch
from sdinpaint_kernels import add_layer_norm

own = importlib.import_module("sdinpaint_kernels.add_layer_norm")


def case(dtype="float32", shape=(5, 40), *, mean=0.0, std=1.0, eps=1e-5):
    return {**locals()}


CASES = {
    **{f"{dtype}, {shape}": case(dtype, shape) for dtype in ("float32", "float16", "bfloat16")
       for shape in ((5, 320), (2, 3, 640), (3, 1280), (7, 24))},
    "quiet": case(std=3e-3),
    "quiet, smaller eps": case(std=1e-3, eps=1e-6),
    "far from zero": case(shape=(9, 320), mean=30.0, std=0.5),
}  # fmt: skip
MISTAKES = {
    "eps": ("/ C + eps", "/ C", "quiet"),
    "the mean of the row alone": ("tl.where(inside, added - mean[:, None], 0.0)", "added - mean[:, None]", "quiet"),
    "the residual": ("added += tl.load(residual", "added += 0 * tl.load(residual", "float32, (7, 24)"),
    "two passes over the row": (
        "tl.sum(centred * centred, 1) / C", "(tl.sum(added * added, 1) / C - mean * mean)", "far from zero"
    ),
}  # fmt: skip


def draw(dtype, shape, *, mean, std, eps, device="cpu"):
    """The arguments of `launch` and of `reference`."""
    dtype = getattr(torch, dtype)
    x, residual = ((torch.randn(shape, device=device) * std + mean).to(dtype) for _ in range(2))
    weight, bias = ((torch.randn(shape[-1], device=device) + offset).to(dtype) for offset in (1.0, 0.0))
    return x, residual, weight, bias, eps


def errors(arguments, tile=None):
    """The relative errors of the sum and of its norm, which is that of the sum as it was put out."""
    x, residual, weight, bias, eps = arguments
    total, normed = own.launch(*arguments, tile)
    plain, theirs = own.reference(*arguments)
    assert (total.shape, normed.shape, total.dtype, normed.dtype) == (x.shape, x.shape, x.dtype, x.dtype)
    assert torch.equal(total, plain) or x.dtype == torch.bfloat16  # which the interpreter rounds down

    def right(rounded):
        wide = (item.double() for item in (rounded, torch.zeros_like(rounded), weight, bias))
        return own.reference(*wide, eps)[1]

    return {
        "sum": interpreter.relative(total, x.double() + residual.double()),
        "torch's sum": interpreter.relative(plain, x.double() + residual.double()),
        "ours": interpreter.relative(normed, right(total)),
        "torch": interpreter.relative(theirs, right(plain)),
    }


def interpreted():
    seed = interpreter.fresh_seed()
    found = {name: errors(draw(**each)) for name, each in CASES.items()}
    found["other tiles"] = errors(draw(**case(shape=(9, 160))), own.Tile(8, 2))
    for name, (right, wrong, shown_by) in MISTAKES.items():
        with interpreter.broken("add_layer_norm_kernel", right, wrong):
            found[f"without {name}"] = _unchecked(draw(**CASES[shown_by]))
    return {"seed": seed, **found}


def _unchecked(arguments):
    """The errors of a broken kernel, whose sum may be wrong too."""
    expected = own.reference(*(item.double() if isinstance(item, torch.Tensor) else item for item in arguments))[1]
    ours, theirs = own.launch(*arguments)[1], own.reference(*arguments)[1]
    return {"ours": interpreter.relative(ours, expected), "torch": interpreter.relative(theirs, expected)}


def allowed(each, theirs):
    """Twice torch's error, one rounding of the result, and two of the mean (as a sum, and divided) of the whole row.

    The sum of x and a residual like it has twice its mean, and the square root of two times its deviation.
    """
    return 2 * theirs + interpreter.TINY[each["dtype"]] + 2 * 2**-24 * 2**0.5 * each["mean"] / each["std"]


@pytest.mark.parametrize("name", [*CASES, "other tiles"])
def test_the_kernel_is_as_exact_as_torch(name, found):
    measured, each = found[name], CASES.get(name, case())
    assert measured["ours"] <= allowed(each, measured["torch"]), (name, measured, found["seed"])
    assert measured["sum"] <= allowed(each, measured["torch's sum"]), (name, measured, found["seed"])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(name, found):
    mistaken = found[f"without {name}"]
    assert not mistaken["ours"] <= allowed(CASES[MISTAKES[name][2]], mistaken["torch"]), (name, mistaken, found["seed"])


@pytest.mark.parametrize(("model", "row"), aot.shapes("add_layer_norm"))
def test_the_grid_covers_the_rows(model, row):
    rows, width, _ = row
    with aot.recording("add_layer_norm_kernel") as launches:
        own.launch(aot.empty(rows, width), aot.empty(rows, width), aot.empty(width), aot.empty(width), 1e-5)
    (noted,) = launches
    tile = own.tile_for(width)
    assert noted.grid[0] * tile.rows >= rows > (noted.grid[0] - 1) * tile.rows
    assert noted.arguments["COLUMNS"] >= noted.arguments["C"] == width


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.empty(4, 32, dtype=torch.float64), "float64"),
        (torch.empty(32, 4).t(), "contiguous"),
        (torch.empty(4, 12), "aligned"),
        (torch.empty(1, 8192), "wide"),
        (torch.empty(0, 32), "nothing"),
    ],
)
def test_what_the_kernel_cannot_take_is_said_and_still_computed(x, why):
    weight = torch.ones(x.shape[-1], dtype=x.dtype)
    assert why in own._obstacle(x, x, weight, weight)
    total, normed = add_layer_norm(x, x, weight, weight, 1e-5)
    assert total.shape == normed.shape == x.shape


def test_a_broken_up_weight_is_left_to_torch():
    x, weight = torch.randn(3, 32), torch.randn(64)
    assert "contiguous" in own._obstacle(x, x, weight[::2], weight[:32])
    assert "contiguous" in own._obstacle(x, x, weight[:32], weight[::2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"residual": torch.ones(4, 6)}, ["(4, 6)", "(3, 8)", "stride (6, 1)"]),
        ({"weight": torch.ones(4)}, ["weight (4,)"]),
        ({"bias": torch.ones(8, 1)}, ["bias (8, 1)"]),
        ({"residual": torch.ones(3, 8, dtype=torch.float16)}, ["residual", "torch.float16"]),
        ({"residual": torch.ones(3, 8, device="meta")}, ["residual", "meta"]),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, ["torch.int64"]),
    ],
)
def test_bad_input_is_named(change, words):
    good = {"x": torch.ones(3, 8), "residual": torch.ones(3, 8), "weight": torch.ones(8), "bias": torch.ones(8)}
    with pytest.raises(ValueError) as caught:
        add_layer_norm(**good | change, eps=1e-5)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", sorted({tuple(row[:2]) for _, row in aot.shapes("add_layer_norm")}))
def test_real_shapes_on_the_gpu(shape, dtype):
    arguments = draw(**case(dtype, shape, mean=1.0), device="cuda")
    x, residual, *_ = arguments
    total, normed = own.launch(*arguments)
    expected = own.reference(*(item.double() if isinstance(item, torch.Tensor) else item for item in arguments))
    theirs = own.reference(*arguments)
    assert torch.equal(total, x + residual)
    assert (
        interpreter.relative(normed, expected[1])
        <= 2 * interpreter.relative(theirs[1], expected[1]) + interpreter.TINY[dtype]
    )
    compiled = torch.compile(add_layer_norm, fullgraph=True)
    for again in (own.launch(*arguments), add_layer_norm(*arguments, kernels="triton"), compiled(*arguments)):
        assert torch.equal(again[0], total)
        assert torch.equal(again[1], normed)
