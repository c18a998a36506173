"""Facts about single tensors that only a look at all of their values finds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """Something about one tensor of a weights file."""

    file: str
    tensor: str
    what: str
    wrong: bool
    """True where the tensor cannot be right; otherwise it is only unusual."""

    def __str__(self) -> str:
        return f"{'wrong' if self.wrong else 'note'}: {self.tensor} in {self.file}: {self.what}"
