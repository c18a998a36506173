"""Compile kernels for GPUs that are not here, at the shapes of the released models: what do they take of a chip?

    python tests/kernels/aot.py     # writes benchmarks/results/aot.jsonl

A launcher runs over tensors without memory while its kernels are replaced by recorders; each distinct launch is then
compiled to machine code, whose registers, stack, shared memory and instructions are read off.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "aot.jsonl"
SHAPES = json.loads((ROOT / "tests" / "data" / "kernel_shapes.json").read_text())
CAPABILITIES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
REGISTER_FILE = 65536
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


class Launch(NamedTuple):
    """One launch of a kernel: its grid, its arguments by name, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class Recorder:
    """Stands for a kernel, and notes its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def note(*given: Any, **named: Any) -> None:
            names = self.kernel.arg_names
            arguments = dict(zip(names, given, strict=False)) | {key: named[key] for key in names if key in named}
            assert list(arguments) == names, f"{self.kernel.__name__} takes {names}, not {list(arguments)}"
            options = {key: value for key, value in named.items() if key not in names}
            self.launches.append(Launch(self.kernel, grid, arguments, options))

        return note


@contextlib.contextmanager
def recording(module: str) -> Iterator[list[Launch]]:
    """Within it, the kernels of `sdinpaint_kernels.<module>` only note that they were launched."""
    from triton.runtime import KernelInterface

    kernels = importlib.import_module(f"sdinpaint_kernels.{module}")
    found = {name: value for name, value in vars(kernels).items() if isinstance(value, KernelInterface)}
    launches: list[Launch] = []
    try:
        for name, kernel in found.items():
            setattr(kernels, name, Recorder(kernel, launches))
        yield launches
    finally:
        for name, kernel in found.items():
            setattr(kernels, name, kernel)


class Source(NamedTuple):
    """The properties that tell one compiled kernel from another."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]


def source(launch: Launch) -> Source:
    """Sort a launch's arguments as Triton's own launcher does: constants, types, and what 16 divides."""
    constant_names = {param.name for param in launch.kernel.params if param.is_constexpr}
    general = {param.name for param in launch.kernel.params if param.do_not_specialize}
    signature, constants, aligned = {}, {}, []
    for name, value in launch.arguments.items():
        if name in constant_names or value is None or (isinstance(value, int) and value == 1 and name not in general):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            aligned.append(name)  # torch aligns memory to 512 bytes
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [name] * (value % 16 == 0 and name not in general)
    options = tuple(sorted(launch.options.items()))
    return Source(launch.kernel.__name__, tuple(signature.items()), tuple(constants.items()), tuple(aligned), options)


def compile_for(launch: Launch, capability: int) -> Any:
    """Compile a launch's kernel to machine code for sm_<capability>, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    told, names = source(launch), launch.kernel.arg_names
    described = ASTSource(
        fn=launch.kernel,
        signature=dict(told.signature),
        constexprs={(names.index(name),): value for name, value in told.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in told.aligned},
    )
    return triton.compile(described, target=GPUTarget("cuda", capability, 32), options=dict(told.options))


def resources(kernel: Any) -> dict[str, int]:
    """Return what a kernel takes of a multiprocessor, and counts of the instructions that tell good code from bad."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": count(r"(?m)^\s*/\*[0-9a-f]{4,}\*/"),
        "loads": count(r"\bLDG\."),
        "loads128": count(r"\bLDG\.[A-Z0-9.]*128"),
        "async_copies": count(r"\bLDGSTS|\bUTMALDG"),
        "stores128": count(r"\bSTG\.[A-Z0-9.]*128"),
        "local": count(r"\b(LDL|STL)\b"),
        "HMMA": count(r"\bHMMA"),
        "HGMMA": count(r"\bHGMMA"),
    }


def excess(found: dict[str, int], capability: int) -> list[str]:
    """Why a kernel would not run, or not well, on its GPU; empty where all is in order."""
    limits = {
        "stack": 0,
        "local": 0,
        "registers x threads": REGISTER_FILE,
        "shared": SHARED_LIMIT[capability],
    }
    values = found | {"registers x threads": found["registers"] * found["warps"] * 32}
    return [f"{name} {values[name]} > {limit}" for name, limit in limits.items() if values[name] > limit]


def _run(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def distinct(operation: str, rows: Iterable[tuple[str, list[Any]]]) -> dict[Source, tuple[Launch, list[str]]]:
    """The distinct kernels that an operation launches -> one launch of each, and the shapes that share it."""
    found: dict[Source, tuple[Launch, list[str]]] = {}
    for name, row in rows:
        with recording(f"{operation}_kernel") as launches:
            LAUNCHERS[operation](*row)
        for launch in launches:
            found.setdefault(source(launch), (launch, []))[1].append(name)
    return found


def shapes(operation: str) -> list[tuple[str, list[Any]]]:
    """(model, row) of every shape of an operation in the released models."""
    return [(model, row) for model, table in SHAPES.items() for row in table.get(operation, ())]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_group_norm(samples: int, channels: int, pixels: int, groups: int, eps: float, silu: bool, _: int) -> None:
    """With an addend where a time embedding goes before the norm: where there is a SiLU, in the UNet."""
    from sdinpaint_kernels.group_norm import launch

    x = empty(samples, channels, pixels, 1).to(memory_format=torch.channels_last)
    weight = empty(channels)
    launch(x, groups, weight, weight, eps, silu, empty(samples, channels) if silu and eps > 1e-6 else None)


def launch_attention(batch: int, heads: int, head_dim: int, queries: int, keys: int, _: int) -> None:
    """Over views of one packed projection, or of a packed context."""
    from sdinpaint_kernels.attention import launch

    if queries == keys:
        q, k, v = empty(batch, queries, 3, heads, head_dim).unbind(2)
    else:
        q = empty(batch, queries, heads, head_dim)
        k, v = empty(batch, keys, 2, heads, head_dim).unbind(2)
    launch(q, k, v)


def launch_geglu(rows: int, columns: int, _: int) -> None:
    """Over what the first linear layer of a feed-forward puts out."""
    from sdinpaint_kernels.geglu import launch

    launch(empty(rows, columns))


def launch_add_layer_norm(rows: int, width: int, _: int) -> None:
    """Between the parts of a transformer block."""
    from sdinpaint_kernels.add_layer_norm import launch

    launch(empty(rows, width), empty(rows, width), empty(width), empty(width), 1e-5)


def launch_add_bias(samples: int, channels: int, pixels: int, _: int) -> None:
    """At the end of a residual block."""
    from sdinpaint_kernels.add_bias import launch

    x = empty(samples, channels, pixels, 1).to(memory_format=torch.channels_last)
    launch(x, x, empty(channels))


def launch_conv3_add(samples: int, channels: int, pixels: int, outputs: int, _: int) -> None:
    """At the end of a residual block."""
    from sdinpaint_kernels.conv3_add import launch

    side = round(pixels**0.5)
    x, weight, residual = (
        empty(*shape).to(memory_format=torch.channels_last)
        for shape in ((samples, channels, side, side), (outputs, channels, 3, 3), (samples, outputs, side, side))
    )
    launch(x, weight, empty(outputs), None, residual)


def launch_linear_geglu(rows: int, channels: int, inner: int, _: int) -> None:
    """The first half of a feed-forward network."""
    from sdinpaint_kernels.linear_geglu import launch

    launch(empty(rows, channels), empty(2 * inner, channels), empty(2 * inner))


LAUNCHERS: dict[str, Callable[..., None]] = {
    "attention": launch_attention,
    "group_norm": launch_group_norm,
    "geglu": launch_geglu,
    "add_layer_norm": launch_add_layer_norm,
    "add_bias": launch_add_bias,
    "conv3_add": launch_conv3_add,
    "linear_geglu": launch_linear_geglu,
}


def table(operation: str) -> Iterator[dict[str, Any]]:
    """A row for each distinct kernel of an operation and each GPU."""
    for told, (launch, names) in distinct(operation, shapes(operation)).items():
        for capability in CAPABILITIES:
            yield {
                "operation": operation,
                "kernel": told.kernel,
                "sm": capability,
                "constants": {name: value for name, value in told.constants if value is not None},
                "models": sorted(set(names)),
                **resources(compile_for(launch, capability)),
            }


def committed() -> list[dict[str, Any]]:
    """The table as it was last written."""
    return [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Write the table."""
    import triton

    with tempfile.TemporaryDirectory() as cache, TABLE.open("w", encoding="utf-8") as file:
        os.environ["TRITON_CACHE_DIR"] = cache
        for operation in LAUNCHERS:
            for row in table(operation):
                file.write(json.dumps(row | {"triton": triton.__version__}) + "\n")


if __name__ == "__main__":
    main()
