"""The dtypes of tensors in files, known by name and size, so that headers are read without importing torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["STORED", "StoredDtype"]


@dataclass(frozen=True)
class StoredDtype:
    """The dtype of the elements of a tensor in a file."""

    name: str
    """The name of torch's dtype, such as "float16"."""
    itemsize: int
    """Bytes of one element."""

    @property
    def is_floating_point(self) -> bool:
        """Tell whether the elements are floating point numbers."""
        return "float" in self.name

    @property
    def torch(self) -> torch.dtype:
        """Return torch's dtype."""
        found: Any = getattr(importlib.import_module("torch"), self.name)
        return found

    def __str__(self) -> str:
        return self.name


_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
STORED = {name: StoredDtype(name, size) for name, size in _BYTES.items()}
"""Every dtype that weights files may have, by its name."""
