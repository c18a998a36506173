"""Run the attention kernel in Triton's interpreter, in a process of its own that test_attention.py starts.

Prints {case: [our relative L2 error to float64, torch's]} as JSON, and the same for kernels broken on purpose.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

module = importlib.import_module("sdinpaint_kernels.attention")  # the package's attribute of this name is the function
KERNEL = "sdinpaint_kernels.attention_kernel"
SOURCE = Path(module.__file__).with_name("attention_kernel.py")
BREAKS = {
    # case -> the text of the kernel, and what stands there instead
    "float32 1x70x77x40": ("columns[None, :] < limit, scores", "columns[None, :] >= 0, scores"),
    "float32 1x64x256x64": ("v, start + columns", "v, columns"),
    "float32 2x64x64x64": ("scores * SCALE - (higher * SCALE)[:, None]", "scores - higher[:, None]"),
    "float32 2x100x144x40": ("out0 * shrink[:, None]", "out0"),
    "float32 1x40x200x160": ("k += batch * k_batch + head * K_HEAD", "k += batch * k_batch + head * K_TOKEN"),
    "float32 1x130x192x80": ("scores = tl.dot(q1, tl.trans(k1), scores)", "scores = scores"),
    "float32 1x16x16x8": (
        "(rows[:, None] < limit) & (columns[None, :] < D)\n    tl.store",
        "rows[:, None] < 9\n    tl.store",
    ),
}


SHAPES = (
    (2, 64, 64, 64),  # the whole context at once, nothing masked
    (1, 70, 77, 40),  # the whole context in two tiles; both products in two
    (1, 33, 77, 160),
    (2, 100, 144, 40),  # tiles, then a masked one
    (1, 130, 192, 80),
    (1, 40, 200, 160),
    (1, 64, 256, 40),  # tiles alone
    (1, 64, 256, 80),
    (1, 64, 256, 64),
    (1, 16, 16, 8),  # the smallest head, padded
    (1, 20, 130, 56),
)
"""(B, N, M, D): every path of the kernel, each with the fewest programs that show it."""
HALF = (SHAPES[1], SHAPES[4], SHAPES[9])
"""Cases in half precision: the context at once and tile by tile, both masked, heads in two parts and padded."""
CASES = {
    f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}": (dtype, *shape)
    for dtype, shapes in ((torch.float32, SHAPES), (torch.float16, HALF), (torch.bfloat16, HALF))
    for shape in shapes
}


def errors(dtype: torch.dtype, batch: int, queries: int, keys: int, head_dim: int) -> list[float]:
    """Relative L2 errors of the kernel and of torch on three heads that are views of packed projections."""
    heads = 3
    if queries == keys:
        q, k, v = torch.randn(batch, queries, 3, heads, head_dim).to(dtype).unbind(2)
    else:
        q = torch.randn(batch, queries, heads, head_dim).to(dtype)
        k, v = torch.randn(batch, keys, 2, heads, head_dim).to(dtype).unbind(2)
    exact = _torch(q.double(), k.double(), v.double())
    found = module.launch(q, k, v), _torch(q, k, v)
    return [float((out.double() - exact).norm() / exact.norm()) for out in found]


def _torch(*heads: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads)).transpose(1, 2)


def broken(old: str, new: str, folder: Path) -> object:
    """The kernel's module with `new` in the place of `old`."""
    source = SOURCE.read_text()
    assert source.count(old) == 1, old
    path = folder / f"broken_{abs(hash(new))}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def main() -> None:
    """Run the cases; the output is NaN until the kernel writes it."""
    torch.manual_seed(torch.seed())
    module._empty = lambda q, k, v: torch.full(q.shape, torch.nan, dtype=q.dtype)
    found = {name: errors(*case) for name, case in CASES.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, (old, new) in BREAKS.items():
            sys.modules[KERNEL] = broken(old, new, Path(folder))
            found[f"broken {name}"] = errors(*CASES[name])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
