"""Text conditioning as values, and how several of them are put into one batch."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdinpaint.errors import SettingError

__all__ = ["Conditioning", "spread", "stack"]


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of a UNet.

    Args:
        context: text embeddings (B, L, D).
        vector: pooled text and size conditioning (B, V) of SDXL, None for the other families.
    """

    context: Tensor
    vector: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, items: slice) -> Conditioning:
        return Conditioning(self.context[items], None if self.vector is None else self.vector[items])

    def to(self, device: torch.device) -> Conditioning:
        """Return the conditioning on a device.

        Args:
            device: the device.

        Returns:
            A conditioning whose tensors are there.
        """
        return Conditioning(self.context.to(device), None if self.vector is None else self.vector.to(device))

    def __reduce__(self) -> tuple[object, ...]:
        # torch hands a tensor to another process by a file that is gone when the first one ends
        stream = io.BytesIO()
        torch.save((self.context.detach().cpu(), None if self.vector is None else self.vector.detach().cpu()), stream)
        return _load, (stream.getvalue(),)


def _load(stored: bytes) -> Conditioning:
    return Conditioning(*torch.load(io.BytesIO(stored), weights_only=True))


def stack(conditions: Sequence[Conditioning]) -> Conditioning:
    """Put conditions one after the other along the batch.

    Contexts of different lengths are repeated to their least common multiple, which changes nothing: a softmax over
    keys that are all there n times gives each of them 1 / n of its weight.

    Args:
        conditions: one or more, of one width.

    Returns:
        One conditioning of their batches together.

    Raises:
        SettingError: their widths or vectors do not fit together.
    """
    _require_alike("context", [(one.context.shape[2],) for one in conditions])
    vectors = [one.vector for one in conditions if one.vector is not None]
    if len(vectors) not in (0, len(conditions)):
        found, expected = "given for one prompt alone", "both, or neither"
        raise SettingError("SETTING_CONDITIONS", "vector", found, expected=expected)
    _require_alike("vector", [tuple(one.shape[1:]) for one in vectors])
    length = math.lcm(*(one.context.shape[1] for one in conditions))
    contexts = [
        one.context if one.context.shape[1] == length else one.context.repeat(1, length // one.context.shape[1], 1)
        for one in conditions
    ]
    return Conditioning(torch.cat(contexts), torch.cat(vectors) if vectors else None)


def _require_alike(what: str, sizes: Sequence[tuple[int, ...]]) -> None:
    if len(set(sizes)) > 1:
        found = "widths " + " and ".join(", ".join(map(str, size)) for size in dict.fromkeys(sizes))
        raise SettingError("SETTING_CONDITIONS", what, found, expected="one width, that of the model")


def spread(what: str, stacked: Tensor, batch: int, copies: int) -> Tensor:
    """Repeat each of `copies` entries for every item of a batch.

    Args:
        what: name of the tensor, for the error.
        stacked: (copies, ...), or (batch, ...), which is returned as it is.
        batch: number of items times `copies`.
        copies: predictions per item: 2 with guidance, else 1.

    Returns:
        The tensor (batch, ...).

    Raises:
        SettingError: it has another batch.
    """
    if len(stacked) == batch:
        return stacked
    if len(stacked) != copies:
        found = f"batch {len(stacked) // copies} beside latents of batch {batch // copies}"
        raise SettingError("SETTING_BATCH", what, found, expected="the same batch, or 1")
    return stacked.repeat_interleave(batch // copies, dim=0)
