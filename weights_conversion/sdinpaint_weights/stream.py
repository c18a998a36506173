"""Write a safetensors file tensor by tensor, so that it may be larger than memory.

The safetensors library (0.8) needs all tensors in memory at once; this module writes the same bytes.

Source: the format's description, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdinpaint_weights.atomic import atomic_write
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.files import size_text
from sdinpaint_weights.finite import is_finite, nonfinite_error
from sdinpaint_weights.targets import nearest_folder

CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Dtype -> its name in the format, in the order in which the library writes them: wide ones first."""
ORDER = {dtype: place for place, dtype in enumerate(CODES)}
ALIGNMENT = 8
"""Bytes of which the first tensor's position is a multiple; each tensor is then aligned, as wide ones come first."""


@dataclass(frozen=True)
class Item:
    """One tensor to write; `produce` is called once, when the tensor is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], Tensor]
    """A function that returns the tensor in any dtype; the writer casts it to `dtype`."""
    source: object = None
    """The file that the tensor is made from, which errors name; None stands for the file that is written."""

    @property
    def size(self) -> int:
        """Return the number of bytes that the tensor takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_stream(
    path: str | os.PathLike[str],
    items: Iterable[Item],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Write a safetensors file, with a single tensor in memory at a time.

    The file replaces an older one when it is complete.

    Args:
        path: the file to write.
        items: the tensors.
        metadata: text fields for the header.
        on_bytes: called with the size of each tensor that was written, for a progress bar.

    Raises:
        CheckpointError: the disk has too little space or cannot be written to, or a value is not finite in its dtype.
    """
    path = Path(path)
    ordered = sorted(items, key=lambda item: (ORDER[item.dtype], item.name))
    header = _header(ordered, metadata)
    try:
        require_space(nearest_folder(path), len(header) + sum(item.size for item in ordered))
        with atomic_write(path) as file:
            file.write(header)
            for item in ordered:
                file.write(_bytes_of(item, path))
                if on_bytes is not None:
                    on_bytes(item.size)
    except CheckpointError:
        raise
    except OSError as error:
        raise not_written(path, error) from error


def require_space(folder: Path, needed: int) -> None:
    """Check that a disk has enough free space.

    Args:
        folder: a folder on the disk.
        needed: number of bytes to write.

    Raises:
        CheckpointError: there is too little space.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        found = f"{size_text(free)} are free on its disk"
        hint = "free some space, or choose a folder on another disk; nothing was written"
        raise CheckpointError("CKPT_NO_SPACE", folder, found, expected=size_text(needed), hint=hint)


def not_written(path: Path, error: Exception) -> CheckpointError:
    """Make the error for a file or folder that cannot be written.

    Args:
        path: the file or folder.
        error: the system's error.

    Returns:
        An error to raise, CKPT_NOT_WRITTEN.
    """
    hint = "check the disk's free space and the folder's permissions; what was there before is unchanged"
    return CheckpointError("CKPT_NOT_WRITTEN", path, f"could not be written: {error}", hint=hint)


def _header(items: list[Item], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for item in items:
        begin, end = end, end + item.size
        table[item.name] = {"dtype": CODES[item.dtype], "shape": list(item.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(ALIGNMENT, "little") + text


def _bytes_of(item: Item, path: Path) -> memoryview:
    produced = item.produce()
    if tuple(produced.shape) != item.shape:
        found = f"{item.name} was made with shape {tuple(produced.shape)}"
        raise CheckpointError("CKPT_SHAPE", item.source or path, found, expected=str(item.shape))
    ready = produced.detach().to("cpu", item.dtype).contiguous()
    if not is_finite(ready):
        raise nonfinite_error(item.source or path, item.name, ready, produced)
    return ready.reshape(-1).view(torch.uint8).numpy().data
