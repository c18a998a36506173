"""GroupNorm, GEGLU and add-LayerNorm at every shape of the released models, beside torch and inductor.

    python benchmarks/kernels.py [group_norm] [geglu] [add_layer_norm] [overhead] [--quick | --tune] [--out FILE]

Needs an NVIDIA GPU. Every call is first compared with float64 on the same inputs, at that very shape. Then it is timed
in a captured graph of many calls over inputs and outputs that together do not fit into the L2 cache; the figure is the
median over replays. `--quick` leaves out inductor and the rarer shapes; `--tune` times the kernel's variants only.
Percentages are of the time in which a plain copy, measured first, moves the bytes that must be read and written once.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sdinpaint_kernels import backend
from torch import Tensor

ROOT = Path(__file__).parents[1]
SHAPES = json.loads((ROOT / "tests" / "data" / "kernel_shapes.json").read_text())
COLD_BYTES = 256 * 2**20  # several times the L2 cache
ROUNDS = 15
BOUND = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
DTYPE = torch.bfloat16
WORKERS = 12
TUNED = frozenset({"sd15_512", "sdxl_1024", "vae_dec_512"})


class Case(NamedTuple):
    """One shape of an operation: what it is called, how to draw its inputs, and how often a model has it."""

    operation: str
    shape: tuple[Any, ...]
    models: tuple[str, ...]
    count: int


def module(operation: str) -> Any:
    """The module of an operation; the package itself holds the function of the same name."""
    return importlib.import_module(f"sdinpaint_kernels.{operation}")


def cases(operation: str) -> list[Case]:
    """Every distinct shape of an operation in the released models, and its largest count in a step."""
    found: dict[tuple[Any, ...], tuple[list[str], int]] = {}
    for model, table in SHAPES.items():
        for *shape, count in table.get(operation, ()):
            names, most = found.get(tuple(shape), ([], 0))
            found[tuple(shape)] = ([*names, model], max(most, count))
    return [Case(operation, shape, tuple(names), most) for shape, (names, most) in found.items()]


# what is timed: inputs, bytes, and implementations by name


def draw(case: Case) -> tuple[Any, ...]:
    """Inputs of the operation's `reference`, in its order."""
    if case.operation == "group_norm":
        samples, channels, pixels, groups, eps, silu = case.shape
        x = (torch.randn(samples, channels, pixels, 1, device="cuda") * 2 + 1).to(DTYPE)
        weight, bias = (torch.randn(channels, device="cuda", dtype=DTYPE) for _ in range(2))
        return x.contiguous(memory_format=torch.channels_last), groups, weight, bias, eps, silu, None
    rows, width = case.shape
    x = torch.randn(rows, width, device="cuda", dtype=DTYPE)
    if case.operation == "geglu":
        return (x,)
    weight, bias = (torch.randn(width, device="cuda", dtype=DTYPE) for _ in range(2))
    return x, torch.randn_like(x), weight, bias, 1e-5


def moved(case: Case) -> int:
    """The bytes that must be read and written once."""
    size = DTYPE.itemsize
    if case.operation == "group_norm":
        return 2 * size * case.shape[0] * case.shape[1] * case.shape[2]
    return size * case.shape[0] * case.shape[1] * {"geglu": 3, "add_layer_norm": 8}[case.operation] // 2


def implementations(case: Case, inductor: bool) -> dict[str, Callable[..., Any]]:
    """Ours, torch's, and inductor's."""
    own = module(case.operation)
    found = {"triton": own.launch, "torch": own.reference}
    if case.operation == "group_norm":
        found["torch, channels first"] = functools.partial(_channels_first, own.reference)
    if inductor:
        torch._dynamo.reset()
        found["inductor"] = torch.compile(own.reference, dynamic=False, fullgraph=True)
    return found


def _channels_first(reference: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """Over the same memory as if it were channels-first: other numbers, and no layout to convert."""
    return reference(x.permute(0, 2, 3, 1).view(x.shape), *others)


# timing


def graph_seconds(call: Callable[..., Any], inputs: list[tuple[Any, ...]], rounds: int = ROUNDS) -> float:
    """Median seconds of one call, in a graph of one call for each of the inputs, all outputs kept."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(*inputs[0])
        call(*inputs[-1])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*each) for each in inputs]
    seconds = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(inputs))
    del kept
    return statistics.median(seconds[2:])


def rotated(case: Case) -> list[tuple[Any, ...]]:
    """Enough inputs that none is in the cache when its turn comes, and at least eight calls in a graph."""
    first = draw(case)
    copies = max(2, min(64, -(-COLD_BYTES // moved(case))))
    inputs = [first]
    for _ in range(copies - 1):
        inputs.append(tuple(item.clone() if isinstance(item, Tensor) and item.ndim > 1 else item for item in first))
    return inputs * -(-8 // copies)


def tensors(out: Any) -> list[Tensor]:
    """An operation's outputs as a list."""
    return list(out) if isinstance(out, tuple) else [out]


def expected(inputs: tuple[Any, ...], operation: str) -> list[Tensor]:
    """What the operation puts out in float64."""
    wide = [item.double() if isinstance(item, Tensor) else item for item in inputs]
    return tensors(module(operation).reference(*wide))


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error, in the 2-norm, of an operation's outputs; NaN where there is one in them."""
    return max(float((ours.double() - right).norm() / right.norm()) for ours, right in zip(found, wanted, strict=True))


@functools.cache
def ceilings() -> dict[str, float]:
    """What this GPU reaches: bytes read and written by a copy, and operations of a large matrix product."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copied = graph_seconds(lambda: target.copy_(source), [()] * 4)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplied = graph_seconds(lambda: a @ b, [()] * 4)
    return {"bytes_per_second": 2 * source.nbytes / copied, "matmul_flops": 2 * 8192**3 / multiplied}


@functools.cache
def environment() -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    smi = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    driver = subprocess.run(smi, capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(),
        "driver, power, clock": driver.stdout.strip(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(DTYPE).removeprefix("torch."),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


class Report:
    """Appends rows to a file, and shows them."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, row: dict[str, Any]) -> None:
        """Append one row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "environment": environment()}) + "\n")
        print(json.dumps(row), flush=True)


def measured(
    call: Callable[..., Any], inputs: list[tuple[Any, ...]], case: Case, wanted: list[Tensor]
) -> dict[str, Any]:
    """Error and time of one implementation at one shape; no time where it is wrong."""
    out = tensors(call(*inputs[0]))
    wrong = error(out, wanted) if out[0].stride() == wanted[0].stride() else 0.0  # channels first: other numbers
    row: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "error": wrong}
    if not wrong <= BOUND[DTYPE]:
        return row | {"problem": "wrong"}
    seconds = graph_seconds(call, inputs)
    floor = moved(case) / ceilings()["bytes_per_second"]
    return row | {
        "us": round(seconds * 1e6, 2),
        "floor_us": round(floor * 1e6, 2),
        "percent": round(100 * floor / seconds),
    }


def compare(operation: str, report: Report, quick: bool) -> None:
    """Every implementation at every shape; inductor's, slow to compile, where the shape matters most."""
    chosen = [case for case in cases(operation) if case.count >= 5 or not quick]
    in_parallel([(case, ()) for case in chosen])
    by_model = ([case for case in chosen if model in case.models] for model in TUNED)
    heaviest = [max(group, key=lambda case: case.count * moved(case)) for group in by_model if group]
    for case in chosen:
        inputs = rotated(case)
        wanted = expected(inputs[0], operation)
        rows = {}
        for name, call in implementations(case, inductor=not quick and case in heaviest).items():
            row = measured(call, inputs, case, wanted)
            rows[name] = row
            ratios = {
                f"over {other}": round(row["us"] / rows[other]["us"], 3)
                for other in rows
                if "us" in rows[other] and other != name and "us" in row
            }
            report({"implementation": name, "models": case.models, "count": case.count, **row, **ratios})


# variants of the kernels


def variants(case: Case) -> Iterator[tuple[Any, ...]]:
    """What may follow the inputs in a call of `launch`; the shipped choice first."""
    own = module(case.operation)
    if case.operation == "geglu":
        yield from (
            (own.Tile(*each),) for each in ((4, 256, 4), *itertools.product((1, 2, 4, 8), (256, 512, 1024), (4, 8)))
        )
    elif case.operation == "add_layer_norm":
        yield (own.tile_for(case.shape[1]),)
        yield from ((own.Tile(*each),) for each in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)))
    else:
        yield from ((cut,) for cut in plans(own, *case.shape[:4]))


def plans(own: Any, samples: int, channels: int, pixels: int, groups: int) -> Iterator[Any]:
    """One pass where the tile may fit, and two passes over tiles of several shapes."""
    shipped = own.plan(samples, channels, pixels, groups)
    per_group = channels // groups
    yield shipped
    smallest = own._smallest_bundle(per_group)
    fitting = list(range(smallest, groups + 1, smallest))
    rows = backend.power_of_two(pixels)
    for size, warps in itertools.product(fitting[:2], (2, 4, 8, 16)):
        width = backend.power_of_two(size * per_group)
        if pixels <= 1024 and 256 * warps <= rows * width <= 2048 * warps:
            yield own.Plan(size, width, rows, 1, warps, one_pass=True)
    if pixels < 256:
        return
    for width in (64, 128, 256):
        size = max((size for size in fitting if size * per_group <= width), default=None)
        if size is None:
            continue
        for (elements, warps), programs in itertools.product(
            ((4096, 4), (8192, 4), (8192, 8), (16384, 8)), (264, 528, 1056)
        ):
            rows = elements // width
            tiles = backend.power_of_two(-(-samples * -(-groups // size) * pixels // rows // programs) or 1)
            if rows <= pixels:
                cut = own.Plan(size, width, rows, tiles, warps, one_pass=False)
                yield cut
                if programs == 528 and elements == 8192:
                    yield cut._replace(direct=0)


def tune(operation: str, report: Report) -> None:
    """Every variant of the kernel at the shapes that take the most time."""
    chosen = [case for case in cases(operation) if case.count >= 2 and not TUNED.isdisjoint(case.models)]
    if operation == "group_norm":
        chosen = [case for case in chosen if case.shape[5]]
    jobs = [(case, extra) for case in chosen for extra in dict.fromkeys(variants(case))]
    failed = in_parallel(jobs)
    for case, group in itertools.groupby(jobs, key=lambda job: job[0]):
        inputs, rows = rotated(case), []
        wanted = expected(inputs[0], operation)
        for job in group:
            told = {"operation": operation, "shape": case.shape, "variant": job[1][0]._asdict()}
            if job in failed:
                report(told | {"problem": failed[job]})
                continue
            rows.append(measured(functools.partial(_launch, operation, job[1]), inputs, case, wanted) | told)
            report(rows[-1])
        timed = [row for row in rows if "us" in row]
        best = min(timed, key=lambda row: row["us"])
        report(
            {
                "operation": operation,
                "shape": case.shape,
                "shipped_us": timed[0]["us"],
                "best_us": best["us"],
                "best": best["variant"],
            }
        )


def _launch(operation: str, extra: tuple[Any, ...], *inputs: Any) -> Any:
    return module(operation).launch(*inputs, *extra)


def in_parallel(jobs: list[tuple[Case, tuple[Any, ...]]]) -> dict[tuple[Case, tuple[Any, ...]], str]:
    """Run each launch once in one of several processes, so that Triton's cache holds it -> what failed."""
    with multiprocessing.get_context("spawn").Pool(min(WORKERS, len(jobs))) as pool:
        found = pool.starmap(_try, jobs, chunksize=1)
    return {job: problem for job, problem in zip(jobs, found, strict=True) if problem}


def _try(case: Case, extra: tuple[Any, ...]) -> str | None:
    from triton.errors import TritonError

    try:
        _launch(case.operation, extra, *draw(case))
        torch.cuda.synchronize()
    except (TritonError, RuntimeError) as failure:
        return f"{type(failure).__name__}: {failure}"[:300]
    return None


def overhead(report: Report) -> None:
    """Microseconds of the host for one eager call of the public operation, and of torch's."""
    for operation, shape in (
        ("group_norm", (2, 320, 64, 32, 1e-5, True)),
        ("group_norm", (2, 320, 4096, 32, 1e-5, True)),
        ("geglu", (64, 2560)),
        ("add_layer_norm", (64, 320)),
    ):
        inputs = draw(Case(operation, shape, (), 1))
        for name, call in (("triton", module(operation)._operation), ("torch", module(operation).reference)):
            with torch.inference_mode():
                for _ in range(20):
                    call(*inputs)
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(200):
                    call(*inputs)
                seconds = time.perf_counter() - start
                torch.cuda.synchronize()
            report(
                {
                    "operation": operation,
                    "shape": shape,
                    "implementation": name,
                    "host_us": round(seconds / 200 * 1e6, 1),
                }
            )


def main(arguments: Iterable[str] | None = None) -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ("group_norm", "geglu", "add_layer_norm")
    parser.add_argument("what", nargs="*", choices=(*known, "overhead", []), default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.jsonl")
    asked = parser.parse_args(arguments)
    report = Report(asked.out)
    torch.manual_seed(0)
    with torch.inference_mode():
        report({"ceilings": ceilings()})
        for operation in asked.what or (*known, "overhead"):
            if operation == "overhead":
                overhead(report)
            elif asked.tune:
                tune(operation, report)
            else:
                compare(operation, report, asked.quick)


if __name__ == "__main__":
    main()
