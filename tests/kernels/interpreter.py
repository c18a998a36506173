"""Run kernels on the CPU, in a process of its own: Triton's interpreter must be chosen before Triton is imported."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TINY = {"float32": 2**-23, "float16": 2**-11, "bfloat16": 2**-7}
"""The error allowed beside twice torch's: one rounding of the result. The interpreter cuts bfloat16 off instead."""
PROGRAM = """
import importlib, json, sys, interpreter
modules = {name: importlib.import_module(name) for name in sys.argv[1:]}
interpreter.prepare()
print(json.dumps({name: module.interpreted() for name, module in modules.items()}))
"""


def run(*modules: str) -> dict[str, Any]:
    """Return by test module what its function `interpreted` returns, as JSON allows it, run in the interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *modules],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def prepare() -> None:
    """Fill what `torch.empty` returns with NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of exp


def fresh_seed() -> int:
    """Another seed in every run; a failing test shows it."""
    seed = int.from_bytes(os.urandom(4), "big")
    torch.manual_seed(seed)
    return seed


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error in the 2-norm; NaN where there is one in either."""
    return float((found.double() - expected).norm() / expected.norm())


@contextmanager
def broken(module: str, right: str, wrong: str) -> Iterator[None]:
    """Within it, `sdinpaint_kernels.<module>` is the same program but for one mistake."""
    name = f"sdinpaint_kernels.{module}"
    original = importlib.import_module(name)
    text = Path(original.__file__).read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{module} holds {right!r} {text.count(right)} times"
    path = Path(tempfile.gettempdir(), f"{module}_broken_{os.getpid()}.py")
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        _install(module, changed)
        yield
    finally:
        _install(module, original)
        path.unlink()


def _install(module: str, value) -> None:
    sys.modules[f"sdinpaint_kernels.{module}"] = value
    setattr(sys.modules["sdinpaint_kernels"], module, value)


def _path() -> str:
    """Where this process finds modules, the folder of these tests first."""
    return os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
