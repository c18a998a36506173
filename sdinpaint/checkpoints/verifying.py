"""Read every byte of weights files, and say what cannot be right and what is unusual, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from sdinpaint_weights.finite import is_blank, is_finite
from sdinpaint_weights.native import NativeState
from sdinpaint_weights.weights import Weights
from torch import Tensor

from sdinpaint.checkpoints.findings import Finding
from sdinpaint.errors import CheckpointError
from sdinpaint.progress import progress_bar

__all__ = ["verify"]

BLOCK = 4096
"""Bytes of a page of memory and of a block of most disks: what is lost of a file is lost in such blocks."""
FAR = 1000.0
"""A value that is this many times as far from zero as the mean one of its tensor is unusual."""
PART = 1 << 24
"""Elements that are converted at a time."""

Native = tuple[str, str]
"""A component and a native name in it."""


def verify(
    parts: Mapping[str, Weights], states: Mapping[str, NativeState], junk: Collection[str], *, progress: bool
) -> tuple[Finding, ...]:
    """Read every tensor of some weights.

    Args:
        parts: the opened weights, by any name.
        states: the components of a model that they hold, by name, where these are known.
        junk: keys that belong to no component, which can be unusual at most.
        progress: show a bar.

    Returns:
        The tensors that cannot be right, and those that are unusual.
    """
    unneeded = frozenset(junk)
    uses: dict[str, dict[str, list[Native]]] = {}
    for component, state in states.items():
        of_file = uses.setdefault(str(state.weights.path), {})
        for name, source in state.sources.items():
            of_file.setdefault(source.key, []).append((component, name))
    opened = {id(weights): weights for weights in parts.values()}.values()
    total = sum(_size(weights, key) for weights in opened for key in weights)
    found: list[Finding] = []
    with progress_bar(total, "verify", "B", show=progress, unit_scale=True) as bar:
        for weights in opened:
            known = uses.get(str(weights.path), {})
            for key in weights:
                used = key in known if states else key not in unneeded
                found += _findings(weights, key, known.get(key, []), used=used)
                bar.update(_size(weights, key))
    return tuple(found)


def _size(weights: Weights, key: str) -> int:
    entry = weights.entries[key]
    return entry.extent * entry.dtype.itemsize


def _findings(weights: Weights, key: str, natives: Sequence[Native], *, used: bool) -> Iterator[Finding]:
    """Yield what is found about one tensor, of which components and native names may be known."""
    entry = weights.entries[key]
    file = entry.storage.file
    name = file.path.name
    try:
        tensor = weights.tensor(key)
    except CheckpointError as error:
        yield Finding(name, key, error.found, wrong=True)
        return
    if tensor.numel() and tensor.is_floating_point():
        if not is_finite(tensor):
            bad = sum(int((~torch.isfinite(part)).sum()) for part in _in_parts(tensor))
            yield Finding(name, key, f"{bad} of {tensor.numel()} values are NaN or infinite", wrong=used)
        elif not any(bool(part.any()) for part in _in_parts(tensor)):
            wrong = any(is_blank(component, native, tensor.contiguous()) for component, native in natives)
            if wrong or not key.endswith("bias"):
                yield Finding(name, key, f"all {tensor.numel()} values are zero", wrong=wrong)
        else:
            yield from (Finding(name, key, what, wrong=False) for what in _unusual(tensor))
    file.release(entry.begin, _size(weights, key))  # else the file's pages fill memory


def _unusual(tensor: Tensor) -> Iterator[str]:
    step = BLOCK // tensor.dtype.itemsize
    flat = tensor.reshape(-1)
    whole = flat[: len(flat) // step * step].view(torch.uint8).reshape(-1, BLOCK)
    if empty := len(whole) - sum(int(part.any(dim=1).sum()) for part in whole.split(PART // BLOCK)):
        yield f"{empty * BLOCK} bytes in blocks of {BLOCK} are zero"
    sizes = [part.abs() for part in _in_parts(tensor)]
    farthest = max(float(size.max()) for size in sizes)
    mean = sum(float(size.sum(dtype=torch.float64)) for size in sizes) / len(flat)
    if farthest > FAR * mean:
        yield f"its largest value, {farthest:.4g}, is {farthest / mean:.0f} times as large as the mean one"


def _in_parts(tensor: Tensor) -> Iterator[Tensor]:
    for part in tensor.reshape(-1).split(PART):
        yield part.float() if part.dtype.itemsize < 4 else part
