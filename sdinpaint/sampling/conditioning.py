"""Text conditioning as values, and how several of them are put into one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from safetensors.torch import load, save
from torch import Tensor

from sdinpaint.errors import SettingError

__all__ = ["Conditioning", "spread", "stack"]


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of a UNet.

    Args:
        context: text embeddings (B, L, D).
        vector: pooled text and size conditioning (B, V) of SDXL, None for the other families.
        others: further sources that cross-attention attends to, each (B, L', D) with its weight.
    """

    context: Tensor
    vector: Tensor | None = None
    others: tuple[tuple[Tensor, float], ...] = ()

    @property
    def sources(self) -> list[tuple[Tensor, float]]:
        """All that cross-attention attends to: the text with weight 1, then the others."""
        return [(self.context, 1.0), *self.others]

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, items: slice) -> Conditioning:
        return self._mapped(lambda one: one[items])

    def to(self, device: torch.device) -> Conditioning:
        """Return the conditioning on a device.

        Args:
            device: the device.

        Returns:
            A conditioning whose tensors are there.
        """
        return self._mapped(lambda one: one.to(device))

    def __reduce__(self) -> tuple[object, ...]:
        # torch hands a tensor to another process by a file that is gone when the first one ends
        names = {"context": self.context} | ({} if self.vector is None else {"vector": self.vector})
        names |= {str(number): one for number, (one, _) in enumerate(self.others)}
        stored = save({name: one.detach().cpu().clone().contiguous() for name, one in names.items()})
        return _load, (stored, [weight for _, weight in self.others])

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        vector = None if self.vector is None else function(self.vector)
        return Conditioning(function(self.context), vector, tuple((function(one), by) for one, by in self.others))


def _load(stored: bytes, weights: list[float]) -> Conditioning:
    tensors = load(stored)
    others = tuple((tensors[str(number)], weight) for number, weight in enumerate(weights))
    return Conditioning(tensors["context"], tensors.get("vector"), others)


def stack(conditions: Sequence[Conditioning]) -> Conditioning:
    """Put conditions one after the other along the batch.

    Contexts of different lengths are repeated to their least common multiple, which changes nothing: a softmax over
    keys that are all there n times gives each of them 1 / n of its weight.

    Args:
        conditions: one or more, of one width.

    Returns:
        One conditioning of their batches together.

    Raises:
        SettingError: their widths, vectors or weights do not fit together.
    """
    _require_alike("context", "widths", [source.shape[2] for one in conditions for source, _ in one.sources])
    vectors = [one.vector for one in conditions if one.vector is not None]
    if len(vectors) not in (0, len(conditions)):
        found, expected = "given for one prompt alone", "both, or neither"
        raise SettingError("SETTING_CONDITIONS", "vector", found, expected=expected)
    _require_alike("vector", "widths", [one.shape[1] for one in vectors])
    sources = []
    for same in zip_longest(*(one.sources for one in conditions)):
        weights = [source[1] for source in same if source is not None]
        _require_alike("context", "weights of one source", weights)
        # a source of zeros adds nothing to attention, whose values have no bias
        contexts = [
            one.context.new_zeros(len(one), 1, one.context.shape[2]) if source is None else source[0]
            for one, source in zip(conditions, same, strict=True)
        ]
        sources.append((_joined(contexts), weights[0]))
    return Conditioning(sources[0][0], torch.cat(vectors) if vectors else None, tuple(sources[1:]))


def _joined(contexts: Sequence[Tensor]) -> Tensor:
    """Join contexts (B, L, D) of any lengths along the batch, each repeated to the least common multiple."""
    length = math.lcm(*(one.shape[1] for one in contexts))
    return torch.cat([one if one.shape[1] == length else one.repeat(1, length // one.shape[1], 1) for one in contexts])


def _require_alike(what: str, kind: str, found: Sequence[object]) -> None:
    if len(set(found)) > 1:
        shown = f"{kind} " + " and ".join(map(str, dict.fromkeys(found)))
        raise SettingError("SETTING_CONDITIONS", what, shown, expected=f"the same {kind} in all conditions")


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
