"""The sizes at which a GPU kernel was measured as faster than torch, each with the configuration that won.

faster.json is made from the rows of `tools/gpu_check.py`. A size that is not in it, or another generation of GPUs, is
left to torch, so that a kernel that nobody measured never slows a model down.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

Sizes = tuple[int, ...]
"""Numbers that tell one call of an operation from another, such as (rows, channels in, channels out)."""

Table = dict[str, dict[str, dict[str, list[int]]]]
"""Compute capability, such as "9.0" -> operation -> sizes, such as "8192 320 320 1" -> a configuration's numbers."""

TABLE = Path(__file__).with_name("faster.json")


def configuration(operation: str, sizes: Sizes, device: torch.device) -> list[int] | None:
    """Look up the configuration with which a kernel is faster than torch.

    Args:
        operation: its name.
        sizes: what tells this call from others.
        device: a GPU.

    Returns:
        The numbers of the configuration; None where the kernel was not measured as faster.
    """
    found = table().get(capability(device), {}).get(operation, {})
    return found.get(" ".join(map(str, sizes)))


def why_torch(operation: str, sizes: Sizes, x: Tensor) -> str | None:
    """Return the reason to prefer torch at a call that the kernel can take.

    Args:
        operation: its name.
        sizes: what tells this call from others.
        x: the main input.

    Returns:
        The reason; None where the kernel was measured as faster.
    """
    if torch.compiler.is_compiling():
        return "a compiler traces the model"
    if x.is_cuda and configuration(operation, sizes, x.device) is not None:
        return None
    return f"nobody measured the kernel as faster than torch at {' x '.join(map(str, sizes))}"


def capability(device: torch.device) -> str:
    """Name the generation of a GPU, which stands for its speed.

    Args:
        device: a GPU.

    Returns:
        Its compute capability, such as "9.0".
    """
    return _capability(device.index)


@functools.cache
def _capability(index: int | None) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


@functools.cache
def table() -> Table:
    """Read the table, once for a process."""
    found: Table = json.loads(TABLE.read_text(encoding="utf-8"))
    return found
