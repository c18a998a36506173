"""Attention at every shape of the released UNets and VAEs, beside torch's fused backends forced one by one.

    python benchmarks/kernels_attention.py [shipped] [tune] [wide] [overhead]

Needs an NVIDIA GPU. Every call is first compared with float64 on the same inputs, at that very shape; then it is timed
in a captured graph of many launches, whose inputs stay in the L2 cache as far as they fit. `tune` tries every candidate
configuration of the kernel, compiled by many processes beforehand.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from sdinpaint_kernels import backend
from sdinpaint_kernels.attention import WHOLE_CONTEXT, Config, _by_rows, _config, _constants, attention, launch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sdinpaint.families import SD2_INPAINT, SD15_INPAINT, SDXL_INPAINT, UNetConfig

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results")) / "attention.jsonl"
CASES = (
    ("sd15-512", SD15_INPAINT.unet, 512),
    ("sd15-768", SD15_INPAINT.unet, 768),
    ("sd2-512", SD2_INPAINT.unet, 512),
    ("sdxl-1024", SDXL_INPAINT.unet, 1024),
)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CONTEXT = 77
BATCH = 2
BOUND = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
PEAK_FLOPS, PEAK_EXP = 790e12, 132 * 16 * 1.83e9
"""An H100's: dense matrix products as measured, and exponentials at its boost clock."""
DTYPE = torch.float16


class Shape(NamedTuple):
    """One attention of a model: so many of it run in a step."""

    model: str
    heads: int
    head_dim: int
    queries: int
    keys: int
    count: int


def shapes() -> list[Shape]:
    """Every attention of a guided step of the released UNets."""
    return [shape for name, unet, size in CASES for shape in _unet_shapes(name, unet, size)]


def _unet_shapes(name: str, unet: UNetConfig, size: int) -> Iterator[Shape]:
    last = len(unet.channel_mult) - 1
    for level, (mult, depth) in enumerate(zip(unet.channel_mult, unet.transformer_depth, strict=True)):
        count = (2 * unet.num_res_blocks + 1) * depth + (unet.middle_depth if level == last else 0)
        width = unet.model_channels * mult
        heads = unet.num_heads or width // unet.head_dim
        tokens = (size // 8 >> level) ** 2
        for keys in (tokens, CONTEXT):
            if count:
                yield Shape(name, heads, width // heads, tokens, keys, count)


def inputs(shape: Shape, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v as the models make them: views of one packed projection, or of a packed context."""
    torch.manual_seed(0)
    if shape.queries == shape.keys:
        packed = torch.randn(batch, shape.queries, 3, shape.heads, shape.head_dim, device="cuda", dtype=DTYPE)
        return packed.unbind(2)
    q = torch.randn(batch, shape.queries, shape.heads, shape.head_dim, device="cuda", dtype=DTYPE)
    k, v = torch.randn(batch, shape.keys, 2, shape.heads, shape.head_dim, device="cuda", dtype=DTYPE).unbind(2)
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last head of the last sample in float64: (N, D)."""
    q, k, v = (x[-1, :, -1].double() for x in (q, k, v))
    parts = [torch.softmax(part @ k.T / math.sqrt(q.shape[1]), dim=1) @ v for part in q.split(2048)]
    return torch.cat(parts)


def error(out: Tensor, expected: Tensor) -> float:
    """Relative L2 error of that head; NaN if anything anywhere is."""
    difference = float((out[-1, :, -1].double() - expected).norm() / expected.norm())
    return difference if bool(out.isfinite().all()) else math.nan


def seconds(call: Callable[[], Any], budget: float = 4e-3, rounds: int = 7) -> float:
    """Median seconds of one call among replays of a graph of about `budget` seconds of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        launches = max(4, min(200, round(budget / (start.elapsed_time(end) * 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(launches):
            call()
    graph.replay()
    times = []
    for _ in range(rounds):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / launches)
    return statistics.median(times)


def measure(call: Callable[[], Tensor], expected: Tensor) -> dict[str, Any]:
    """Error and microseconds of a call, or why it cannot run."""
    try:
        wrong = error(call(), expected)
        if not wrong <= BOUND[DTYPE]:
            return {"error": wrong, "failed": "wrong"}
        return {"error": wrong, "us": seconds(call) * 1e6}
    except backend.kernel_errors() as failure:  # what a backend or the compiler says is the row's content
        torch.cuda.synchronize()
        return {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0][:120]}


def torch_rows(q: Tensor, k: Tensor, v: Tensor, expected: Tensor) -> dict[str, dict[str, Any]]:
    """Torch's backends, each forced, and what torch would choose."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    def call() -> Tensor:
        return scaled_dot_product_attention(*heads_first).transpose(1, 2)

    rows = {"default": measure(call, expected)}
    for name, kind in BACKENDS.items():
        with sdpa_kernel(kind):
            rows[name] = measure(call, expected)
    return rows


def candidates(shape: Shape) -> list[Config]:
    """The configurations worth trying at a shape."""
    if shape.keys <= WHOLE_CONTEXT:
        tiles = [(64, 0, 4, 1), (128, 0, 4, 1), (128, 0, 8, 1), (256, 0, 8, 1)]
    else:
        tiles = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2)]
        if shape.head_dim > 80:
            tiles += [(64, 32, 4, 3)]
        else:
            tiles += [(64, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)]
    pads = {shape.head_dim == 40, False}
    return [Config(*tile, pad_pv=pad) for tile in tiles for pad in pads]


def compile_all(jobs: list[tuple[Shape, Config]]) -> None:
    """Run every configuration once, so that its code lies in Triton's cache."""
    for shape, config in jobs:
        try:
            launch(*inputs(shape), config)
        except backend.kernel_errors() as failure:  # the measurement fails too, and puts it into its row
            print(f"not compiled: {shape}, {config}: {type(failure).__name__}", file=sys.stderr)


def precompile(jobs: list[tuple[Shape, Config]]) -> None:
    """Let many processes fill Triton's cache."""
    unique = {
        (s.heads, s.queries == s.keys, tuple(_constants(s.head_dim, s.queries, s.keys, c).items())): (s, c)
        for s, c in jobs
    }
    workers = max(1, (os.cpu_count() or 2) - 2)
    todo = list(unique.values())
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_all, [todo[i::workers] for i in range(workers)])


def tune() -> None:
    """Every candidate at every shape; the best, and how it compares."""
    jobs = [(shape, config) for shape in shapes() for config in candidates(shape)]
    started = time.perf_counter()
    precompile(jobs)
    print(f"{len(jobs)} candidates compiled in {time.perf_counter() - started:.0f} s", flush=True)
    for shape in shapes():
        q, k, v = inputs(shape)
        expected = exact(q, k, v)
        present = _config(shape.head_dim, shape.queries, shape.keys)
        rows = {
            config: measure(lambda config=config: launch(q, k, v, config), expected)  # noqa: B023
            for config in dict.fromkeys([present, *candidates(shape)])
        }
        for config, row in rows.items():
            report({"what": "candidate", **shape._asdict(), "config": config._asdict(), **row}, show=False)
        good = {config: row["us"] for config, row in rows.items() if "us" in row}
        summary: dict[str, Any] = {"what": "tuned", **shape._asdict(), "tried": len(rows), "ran": len(good)}
        if good:
            ranked = sorted(good, key=lambda config: good[config])
            summary["best"] = [(round(good[config], 2), tuple(config)) for config in ranked[:3]]
            summary["shipped_us"] = good.get(present)
        failed = {row["failed"] for row in rows.values() if "failed" in row}
        report({**summary, "failures": sorted(failed)[:3], **compare(min(good.values(), default=math.nan), shape)})


def compare(microseconds: float, shape: Shape) -> dict[str, Any]:
    """The same shape through torch, and the floors of products and exponentials."""
    q, k, v = inputs(shape)
    rows = torch_rows(q, k, v, exact(q, k, v))
    best = min((row["us"] for row in rows.values() if "us" in row), default=math.nan)
    flops = 4 * BATCH * shape.heads * shape.queries * shape.keys * shape.head_dim
    return {
        "torch": {name: round(row["us"], 2) if "us" in row else row["failed"][:40] for name, row in rows.items()},
        "ratio": round(best / microseconds, 3),
        "tflops": round(flops / microseconds / 1e6, 1),
        "floor_us": round(max(flops / PEAK_FLOPS, flops / (4 * shape.head_dim) / PEAK_EXP) * 1e6, 2),
    }


def shipped() -> None:
    """The public operation at every shape."""
    for shape in shapes():
        q, k, v = inputs(shape)
        row = measure(lambda: attention(q, k, v, kernels="triton"), exact(q, k, v))  # noqa: B023
        report({"what": "shipped", **shape._asdict(), **row, **compare(row.get("us", math.nan), shape)})


def wide() -> None:
    """The VAE's one head of 512: torch's backends, and products of whole rows with scores in either precision."""
    for size in (512, 1024):
        shape = Shape("vae", 1, 512, (size // 8) ** 2, (size // 8) ** 2, 1)
        q, k, v = inputs(shape, batch=1)
        expected = exact(q, k, v)
        rows = torch_rows(q, k, v, expected)
        rows["rows, float32 scores"] = measure(lambda: _by_rows(q, k, v), expected)  # noqa: B023
        rows["rows, half scores"] = measure(lambda: _by_rows_half(q, k, v), expected)  # noqa: B023
        report({"what": "wide", **shape._asdict(), **rows})


def _by_rows_half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values, scale = k.squeeze(2).transpose(1, 2), v.squeeze(2), 1 / math.sqrt(q.shape[3])
    parts = [torch.softmax((part * scale) @ keys, dim=-1) @ values for part in q.squeeze(2).split(4096, dim=1)]
    return torch.cat(parts, dim=1).unsqueeze(2)


def overhead() -> None:
    """Microseconds of the CPU for a call whose work on the GPU is small."""
    q, k, v = inputs(Shape("overhead", 8, 40, 64, 64, 1))
    calls = {
        "attention, triton": lambda: attention(q, k, v, kernels="triton"),
        "attention, torch": lambda: attention(q, k, v, kernels="torch"),
        "launch alone": lambda: launch(q, k, v),
    }
    for name, call in calls.items():
        times = []
        for _ in range(50):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(20):
                call()
            times.append((time.perf_counter() - started) / 20 * 1e6)
        report({"what": "overhead", "call": name, "us": round(statistics.median(times), 1)})


def environment() -> dict[str, Any]:
    """Where the figures come from."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }


def report(row: dict[str, Any], show: bool = True) -> None:
    """Append a row, and show it."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "environment": ENVIRONMENT}) + "\n")
    if show:
        print(*row.values(), flush=True)


if __name__ == "__main__":
    ENVIRONMENT = environment()
    PARTS = {"shipped": shipped, "tune": tune, "wide": wide, "overhead": overhead}
    for part in sys.argv[1:] or ["shipped", "wide", "overhead"]:
        PARTS[part]()
