"""Boxes of whole pixels."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Box"]


class Box(NamedTuple):
    """The pixels from `left` to before `right` and from `top` to before `bottom`, as in Pillow's `crop`."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.bottom - self.top, self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        """The slices of rows and columns that index an array (H, W)."""
        return slice(self.top, self.bottom), slice(self.left, self.right)
