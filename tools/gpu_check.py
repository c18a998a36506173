"""Check and time the GPU kernels that are not chosen by default, beside what they replace, in at most five minutes.

    python tools/gpu_check.py --rows gpu.jsonl --table kernels/sdinpaint_kernels/faster.json
    python tools/gpu_check.py --dry     # the whole program over tiny sizes, without a GPU

It checks each kernel against float64 at the sizes of the released models, tries its configurations in CUDA graphs, and
prints a table. With --table it writes the sizes at which a kernel was faster. Then it times a guided step and decoding,
as they are and with these kernels, beside their goals. PYTHONPATH names the three source folders.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch  # noqa: E402
from sdinpaint_kernels import backend, faster  # noqa: E402
from torch import Tensor  # noqa: E402

from sdinpaint.bench.kernels import milliseconds  # noqa: E402
from sdinpaint.bench.report.rows import append, measured, spread  # noqa: E402
from sdinpaint.bench.timing import interleaved, median_ratio  # noqa: E402
from sdinpaint.families import SD15_INPAINT, SDXL_INPAINT  # noqa: E402
from sdinpaint.models import VAE, UNet  # noqa: E402
from sdinpaint.models.guarded_vae import GuardedVAE  # noqa: E402
from sdinpaint.models.weights import pack  # noqa: E402
from sdinpaint.sampling import Conditioning, Denoiser, schedules  # noqa: E402
from sdinpaint.sampling.graphs import Graphs  # noqa: E402

SHAPES = Path(__file__).parents[1] / "tests" / "data" / "kernel_shapes.json"
MODELS = ("sd15_512", "sdxl_1024", "vae_dec_512", "vae_dec_1024")
DEVICE, DTYPE = ("cpu", torch.float32) if DRY else ("cuda", torch.bfloat16)
ROUNDS = 1 if DRY else 3
COLD_BYTES, MOST_COPIES = 2**28, 64
"""Bytes of inputs over which calls on a GPU rotate: several times the L2 cache, as in a network."""
WORTH_IT = 0.97
"""The ratio to torch's time below which a kernel counts as faster: the others differ by no more than the noise."""
FEW, SEVERAL = 512, 2048
"""Pixels up to which many and some ways to split a sum are tried."""
SLACK = {torch.float32: 2**-22, torch.bfloat16: 2**-7}
"""The error allowed beside twice torch's: one rounding of the result."""
TINY = {
    "conv3_add": [[1, 32, 16, 32, 2], [2, 64, 8, 32, 1]],
    "linear_geglu": [[8, 32, 16, 1]],
}
GOALS = {"SD 1.5 step at 512": 4.6, "SDXL step at 1024": 24.0, "VAE decode at 512": 5.0, "VAE decode at 1024": 20.0}
"""Milliseconds."""


@dataclass(frozen=True)
class Call:
    """A call of an operation at sizes of a released model."""

    operation: str
    batch: int
    sizes: tuple[int, ...]
    """The numbers that `sizes` of the operation's module gives."""
    count: int
    """How often a step or decoding makes it, in the models that have it."""
    models: str
    halves: bool = False
    """True where the projected channels are two maps, which torch concatenates first; the models do not do so yet."""

    @property
    def module(self) -> Any:
        """The module of the operation."""
        return import_module(f"sdinpaint_kernels.{self.operation}")

    @property
    def told(self) -> str:
        """The name in the table."""
        return f"{self.operation} {' '.join(map(str, self.sizes))}" + ", two maps" * self.halves

    def drawn(self) -> list[Any]:
        """Draw the arguments of `launch` and `reference`: all but the configuration."""
        generator = torch.Generator(DEVICE).manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE)

        if self.operation == "linear_geglu":
            rows, channels, inner = self.sizes
            return [normal(rows, channels), normal(2 * inner, channels) / channels**0.5, normal(2 * inner)]
        pixels, channels, outputs, added = self.sizes
        side = round((pixels // self.batch) ** 0.5)

        def image(width: int) -> Tensor:
            return normal(self.batch, width, side, side).contiguous(memory_format=torch.channels_last)

        weight = (normal(outputs, channels, 3, 3) / (3 * channels**0.5)).contiguous(memory_format=torch.channels_last)
        if added <= 1:
            residual = image(outputs) if added else None
            bias = normal(outputs) if added else None  # without a residual, the norm that follows adds the bias
            return [image(channels), weight, bias, None, residual, [], None]
        maps = [image(added - outputs), image(outputs)] if self.halves else [image(added)]
        projection = normal(outputs, added) / added**0.5
        return [image(channels), weight, normal(outputs), normal(1, outputs), None, maps, projection]

    def candidates(self) -> list[Any]:
        """List the configurations that are tried, the shipped one first."""
        own = self.module
        if DRY:
            return [own.Config(16, 16, 32, 4, 2), own.Config(32, 16, 16, 4, 2)]
        if self.operation == "linear_geglu":
            tiles = [
                (128, 64, 64, 8, 4),
                (128, 128, 64, 8, 3),
                (256, 64, 64, 8, 3),
                (64, 128, 64, 8, 3),
                (128, 64, 128, 8, 2),
            ]
            return [own.CONFIG, *(own.Config(*tile) for tile in tiles)]
        shipped = own.config_for(self.sizes[0], self.sizes[2])
        tiles = [(128, 128, 64, 8, 3), (128, 64, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)]
        splits = (0, 4, 8, 16) if self.sizes[0] <= FEW else (0, 2, 4) if self.sizes[0] <= SEVERAL else (0,)
        large = [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3)] if self.sizes[0] > FEW else []
        few = [*product(tiles, splits), *product(large, (0,))]
        return list(dict.fromkeys([shipped, *(own.Config(*tile, split) for tile, split in few)]))


def calls() -> list[Call]:
    """List the calls, those with the most arithmetic in all first."""
    tables = {"tiny": TINY} if DRY else {name: json.loads(SHAPES.read_text())[name] for name in MODELS}
    found: dict[tuple[Any, ...], Call] = {}

    def add(operation: str, batch: int, sizes: tuple[int, ...], count: int, model: str, halves: bool = False) -> None:
        known = found.get((operation, sizes, halves))
        models = model if known is None else f"{known.models} {model}"
        made = Call(operation, batch, sizes, count + (known.count if known else 0), models, halves)
        found[operation, sizes, halves] = made

    for model, table in tables.items():
        for batch, channels, area, outputs, count in table["conv3_add"]:
            pixels = batch * area
            add("conv3_add", batch, (pixels, channels, outputs, 0), count, model)
            if channels == outputs:
                add("conv3_add", batch, (pixels, channels, outputs, 1), count, model)
            elif min(channels, outputs) >= 32:  # the block's second convolution takes in its shortcut
                add("conv3_add", batch, (pixels, outputs, outputs, channels), count, model)
                if channels > outputs and batch > 1:  # in a UNet's decoder
                    add("conv3_add", batch, (pixels, outputs, outputs, channels), count, model, halves=True)
        for rows, channels, inner, count in table.get("linear_geglu", ()):
            add("linear_geglu", 1, (rows, channels, inner), count, model)

    def work(call: Call) -> int:
        first, channels, outputs, *added = call.sizes
        return call.count * first * outputs * (9 * channels + sum(added) if added else 2 * channels)

    return sorted(found.values(), key=work, reverse=True)


def compile_one(call: Call, config: Any) -> None:
    """Compile a configuration in this process, into the cache that all processes share."""
    try:
        call.module.launch(*call.drawn(), config)
        torch.cuda.synchronize()
    except backend.kernel_errors():
        pass  # it is tried again, and left out, by the process that measures


def compile_all(work: Sequence[tuple[Call, Any]], until: float) -> None:
    """Compile everything, in as many processes as there are cores."""
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))
    wait([pool.submit(compile_one, *one) for one in work], timeout=until - time.monotonic())
    pool.shutdown(cancel_futures=True)


def error(found: Tensor, exact: Tensor) -> float:
    """Return the relative error in the 2-norm."""
    return float((found.double() - exact).norm() / exact.norm())


def doubled(given: Any) -> Any:
    """Convert arguments to float64."""
    return [doubled(one) for one in given] if isinstance(given, list) else None if given is None else given.double()


def copies_of(given: list[Any]) -> int:
    """Return how many copies of the arguments a GPU's cache does not hold."""
    tensors = [one for part in given for one in (part if isinstance(part, list) else [part]) if one is not None]
    return 1 if DRY else min(MOST_COPIES, -(-COLD_BYTES // sum(one.nbytes for one in tensors)))


def tuned(call: Call, configs: Sequence[Any]) -> tuple[list[dict[str, Any]], Any, float]:
    """Check and time one call; return its rows, the fastest configuration and its ratio to torch."""
    given = call.drawn()
    own = call.module
    exact = own.reference(*doubled(given))
    torchs = error(own.reference(*given), exact)
    bound = 2 * torchs + SLACK[DTYPE]
    copies = [given, *(call.drawn() for _ in range(copies_of(given) - 1))]
    runs = {"torch": [partial(own.reference, *one) for one in copies]}
    checks, by_name, wrong = {"torch": f"off by {torchs:.1e}"}, {}, []
    for config in configs:
        try:
            off = error(own.launch(*given, config), exact)
        except backend.kernel_errors() as failed:
            print(f"  {call.told}: {tuple(config)} does not run: {str(failed).splitlines()[0][:80]}")
            continue
        if not off <= bound:
            wrong.append(f"{call.told}: {tuple(config)} is off by {off:.1e}, more than {bound:.1e}")
            continue
        runs[str(tuple(config))] = [partial(own.launch, *one, config) for one in copies]
        checks[str(tuple(config))], by_name[str(tuple(config))] = f"off by {off:.1e} (bound {bound:.1e})", config
    del exact
    WRONG.extend(wrong)
    values = interleaved({name: milliseconds(run, DEVICE) for name, run in runs.items()}, ROUNDS)
    fields = {
        "family": call.models,
        "dtype": str(DTYPE).removeprefix("torch."),
        "stored": None,
        "device": DEVICE,
        "size": 0,
    }
    ratios = {name: median_ratio(taken, values["torch"]) for name, taken in values.items()}
    rows = [
        measured(
            "gpu", call.told, fields, name, taken, "ms", check=checks[name], of_torch=ratios[name], count=call.count
        )
        for name, taken in values.items()
    ]
    best = min(by_name, key=lambda name: ratios[name], default=None)
    return rows, by_name.get(best), ratios.get(best, 1.0) if best else 1.0


WRONG: list[str] = []
"""Descriptions of results that were wrong."""


def kernels(options: argparse.Namespace, until: float) -> faster.Table:
    """Check and time the kernels; return the table of the sizes at which they are faster."""
    listed = calls()
    work = [(call, config) for call in listed for config in call.candidates()]
    if not DRY:
        compile_all(work, time.monotonic() + (until - time.monotonic()) / 2)
    where = "none" if DRY else faster.capability(torch.device(DEVICE))
    table: faster.Table = {where: {}}
    print(f"{'operation, sizes':42} {'count':>5} {'torch us':>9} {'ours us':>9} {'ratio':>6}  configuration")
    for call in listed:
        if time.monotonic() > until:
            print(f"{call.told:42} left out: no time")
            continue
        with torch.inference_mode():
            rows, best, ratio = tuned(call, call.candidates())
        for row in rows:
            append(options.rows, row)
        took = {row["system"]: 1e3 * row["p50"] for row in rows}
        ours = took.get(str(tuple(best))) if best else None
        print(
            f"{call.told:42} {call.count:5} {took['torch']:9.1f} {ours or 0:9.1f} {ratio:6.2f}  {tuple(best or ())}",
            flush=True,
        )
        if best is not None and ratio < WORTH_IT and not call.halves:
            table[where].setdefault(call.operation, {})[" ".join(map(str, call.sizes))] = list(best)
    return table


def networks() -> Iterator[tuple[str, Any]]:
    """Yield the networks with random weights by name, each as a function that runs it once in a captured graph."""
    families = {"SD 1.5 step at 512": (SD15_INPAINT, 64), "SDXL step at 1024": (SDXL_INPAINT, 128)}
    for name, (family, full_side) in families.items():
        config, side = (smaller(family.unet), 4) if DRY else (family.unet, full_side)
        unet = made(UNet, config)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE, dtype=DTYPE)

        vectors = [None if config.vector_dim is None else normal(1, config.vector_dim) for _ in range(2)]
        texts = [Conditioning(normal(1, 77, config.context_dim), vector) for vector in vectors]
        extra = normal(1, 1, side, side), normal(1, 4, side, side)
        x = torch.randn(1, 4, side, side, device=DEVICE)
        trained = schedules.train_sigmas(family.schedule)

        def step(
            unet: Any = unet, trained: Any = trained, texts: Any = texts, extra: Any = extra, x: Tensor = x
        ) -> Any:
            denoise = Denoiser(unet, trained, "eps", *texts, extra=extra, dtype=DTYPE, graphs=Graphs(True))
            return lambda: denoise(x, 2.0)

        yield name, step
    for name, side in (("VAE decode at 512", 64), ("VAE decode at 1024", 128)):
        config = replace(SD15_INPAINT.vae, channels=32) if DRY else SD15_INPAINT.vae
        guarded = GuardedVAE(made(VAE, config))
        latents = torch.randn(1, 4, *(2 * [2 if DRY else side]), device=DEVICE)

        def decode(guarded: GuardedVAE = guarded, latents: Tensor = latents) -> Any:
            graphs = Graphs(True)
            return lambda: guarded.decode(latents, graphs=graphs)

        yield name, decode


def smaller(config: Any) -> Any:
    """Shrink a UNet for a dry run."""
    levels = len(config.channel_mult)
    deep = tuple(min(1, depth) for depth in config.transformer_depth)
    heads = {"num_heads": 2} if config.num_heads else {"head_dim": 16}
    sizes = {"model_channels": 32, "num_res_blocks": 1, "context_dim": 16, "transformer_depth": deep, "middle_depth": 1}
    return replace(config, **sizes, **heads, channel_mult=(1,) * levels)


def made(kind: Any, config: Any) -> Any:
    """Make a network with random weights on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            network = kind(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    pack(network)
    return network


def timed_networks(options: argparse.Namespace, table: faster.Table, until: float) -> None:
    """Time the networks as they are, and with the kernels that were found to be faster, beside their goals."""
    known = dict(faster.table())
    if DRY:
        backend.SETTING = "torch"
    for name, prepare in networks():
        if time.monotonic() > until:
            print(f"{name:42} left out: no time")
            continue
        runs = {}
        with torch.inference_mode():
            for system, used in (("as shipped", known), ("with the faster kernels", table)):
                faster.table().clear()
                faster.table().update(used)
                runs[system] = prepare()
                runs[system]()  # captured now, with this table
            values = interleaved({system: events(run) for system, run in runs.items()}, ROUNDS)
        fields = {
            "family": name,
            "dtype": str(DTYPE).removeprefix("torch."),
            "stored": None,
            "device": DEVICE,
            "size": 0,
        }
        for system, taken in values.items():
            row = measured("gpu", name, fields, system, taken, "ms", check="random weights", goal=GOALS[name])
            append(options.rows, row)
            took = spread(taken)["p50"]
            reached = "reached" if took <= GOALS[name] else "not reached"
            print(f"{name:24} {system:24} {took:8.2f} ms, goal {GOALS[name]:.1f} ms: {reached}", flush=True)


def events(run: Any) -> Any:
    """Time several runs together, by the GPU's clock where there is one."""
    times = 1 if DRY else 10

    def taken() -> float:
        if DRY:
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    return taken


def main() -> int:
    """Run; exit with 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes, in Triton's interpreter")
    parser.add_argument(
        "--rows", type=Path, default=Path("gpu.jsonl"), help="file of JSON lines that rows are added to"
    )
    parser.add_argument("--table", type=Path, help="write the sizes at which a kernel is faster to this file")
    parser.add_argument("--most-seconds", type=float, default=285.0)
    options = parser.parse_args()
    started = time.monotonic()
    table = kernels(options, started + 0.6 * options.most_seconds)
    if options.table is not None:
        options.table.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    timed_networks(options, table, started + options.most_seconds)
    print("\n".join(WRONG) or "every result is right", f"({time.monotonic() - started:.0f} s)")
    return bool(WRONG)


if __name__ == "__main__":
    raise SystemExit(main())
