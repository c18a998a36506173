"""The product that is gated before it is stored against float64, in the interpreter, compiled, and on a GPU."""

from __future__ import annotations

import importlib

import aot
import interpreter
import pytest
import torch
from sdinpaint_kernels import linear_geglu

own = importlib.import_module("sdinpaint_kernels.linear_geglu")

SMALL = own.Config(16, 16, 32, 4, 2)
CASES = {
    f"{dtype}, {shape}": (dtype, shape)
    for dtype, shape in (
        ("float32", (2, 9, 64, 24)),  # rows, and the last columns
        ("float32", (16, 40, 16)),  # channels that a step does not divide
        ("float16", (20, 32, 16)),
        ("bfloat16", (20, 32, 16)),
    )
}
MISTAKES = {
    "the root": ("0.7071067811865476", "0.70"),
    "the bias of the gate": ("bias + INNER + column", "bias + column"),
    "the weights of the gate": ("_rows(weight, INNER, column", "_rows(weight, 0, column"),
    "the last columns": ("mask=present & within[None, :]", "mask=present & (within & (column < 17))[None, :]"),
    "a step": ("range(0, C, BLOCK_K)", "range(BLOCK_K, C, BLOCK_K)"),
}


def draw(dtype, shape, device="cpu"):
    """x, weight and bias; the last number of the shape is that of gated columns."""
    *rows, channels, inner = shape
    made = (torch.randn(*rows, channels), torch.randn(2 * inner, channels) / channels**0.5, torch.randn(2 * inner))
    return [(1.5 * one).to(device, getattr(torch, dtype)) for one in made]


def errors(given, config=None):
    expected = own.reference(*(one.double() for one in given))
    ours = own.launch(*given, config)
    assert (ours.shape, ours.dtype) == (expected.shape, given[0].dtype)
    found = own.reference(*given)
    return {"ours": interpreter.relative(ours, expected), "torch": interpreter.relative(found, expected)}


def interpreted():
    seed = interpreter.fresh_seed()
    found = {name: errors(draw(*case), SMALL) for name, case in CASES.items()}
    for name, mistake in MISTAKES.items():
        with interpreter.broken("linear_geglu_kernel", *mistake):
            found[f"without {name}"] = errors(draw("float32", (9, 64, 24)), SMALL)
    return {"seed": seed, **found}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_as_exact_as_torch(name, found):
    tiny = interpreter.TINY[CASES[name][0]]
    assert found[name]["ours"] <= 2 * found[name]["torch"] + tiny, (name, found[name], found["seed"])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(name, found):
    mistaken = found[f"without {name}"]
    assert not mistaken["ours"] <= 2 * mistaken["torch"] + interpreter.TINY["float32"], (name, mistaken, found["seed"])


@pytest.mark.parametrize(("model", "row"), aot.shapes("linear_geglu"))
def test_the_grid_covers_the_output(model, row):
    rows, channels, inner, _ = row
    (noted,) = recorded(rows, channels, inner)
    config = own.CONFIG
    assert noted.grid[0] * config.block_m >= rows > (noted.grid[0] - 1) * config.block_m
    assert noted.grid[1] * config.block_n >= inner > (noted.grid[1] - 1) * config.block_n
    assert (noted.arguments["INNER"], noted.arguments["C"], noted.arguments["rows"]) == (inner, channels, rows)


def recorded(rows, channels, inner):
    with aot.recording("linear_geglu_kernel") as launches:
        own.launch(aot.empty(rows, channels), aot.empty(2 * inner, channels), aot.empty(2 * inner))
    return launches


def test_it_fits_and_uses_its_tensor_cores(tmp_path, environment):
    environment(TRITON_CACHE_DIR=tmp_path)
    (launch,) = recorded(2048, 1280, 5120)
    found = aot.resources(aot.compile_for(launch, 90))
    assert not aot.excess(found, 90), found
    assert min(found["HGMMA"], found["async_copies"], found["stores128"]) > 0, found


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.empty(4, 8, dtype=torch.float64), "float64"),
        (torch.empty(8, 4).half().t(), "contiguous"),
        (torch.empty(0, 8).half(), "nothing"),
    ],
)
def test_what_the_kernel_cannot_take_is_said(x, why):
    assert why in own._obstacle(x, torch.empty(6, 8), torch.empty(6))


def test_on_other_devices_torch_computes_it():
    x, weight, bias = draw("float64", (5, 8, 3))
    value, gate = (x @ weight.t() + bias).chunk(2, dim=1)
    assert torch.allclose(linear_geglu(x, weight, bias), value * torch.nn.functional.gelu(gate), atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", sorted({tuple(row[:3]) for _, row in aot.shapes("linear_geglu")}))
def test_real_shapes_on_the_gpu(sizes, dtype):
    given = draw(dtype, sizes, device="cuda")
    found = errors(given)
    assert found["ours"] <= 2 * found["torch"] + interpreter.TINY[dtype]
    assert torch.equal(own.launch(*given), own.launch(*given))
    assert torch.equal(linear_geglu(*given, kernels="triton"), own.launch(*given))
