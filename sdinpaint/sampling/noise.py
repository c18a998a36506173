"""Noise for a batch, drawn on the CPU from one generator per item."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Draws"]


class Draws:
    """Unit noise for a batch from one generator per item, so that an item's noise does not depend on the others.

    Args:
        seeds: one seed per item.
        device: where the noise is needed.
    """

    def __init__(self, seeds: Iterable[int], device: torch.device) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.device = device

    def __call__(self, like: Tensor) -> Tensor:
        """Draw noise on the CPU, so that it is the same on every device.

        Args:
            like: a tensor (B, ...).

        Returns:
            Float32 noise of its shape.
        """
        drawn = [
            torch.randn(like.shape[1:], generator=generator, dtype=torch.float32, device="cpu")
            for generator in self.generators
        ]
        return torch.stack(drawn).to(self.device)

    def of(self, items: Sequence[int]) -> Draws:
        """Return the draws of some items, which go on where they are.

        Args:
            items: indices of the items.

        Returns:
            Their draws.
        """
        part = Draws((), self.device)
        part.generators = [self.generators[item] for item in items]
        return part
