"""Weights: their layout in memory, writing to them, and tracking whether they changed.

Everything derived from weights (another form, a fingerprint, a copy in another dtype) is stored with a `Snapshot` of
them, and `holds()` is checked before it is used. Edits by any of torch's ordinary means are noticed: in place, through
`.data`, through numpy, by `load_state_dict`, or by an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, Protocol, Self, runtime_checkable

import torch
from sdinpaint_kernels import (
    Contents,
    contents,
    forget,
    is_replaced,
    lies_in,
    private_maps,
    release,
    unchanged,
    verified,
)
from torch import Tensor, nn

from sdinpaint.errors import SettingError

__all__ = ["Contents", "Model", "Packed", "Snapshot", "all_weights", "backed_by_files", "contents", "forget_derived"]
__all__ += ["Places", "is_replaced", "joined", "pack", "point_to", "release", "unchanged", "verified", "write"]

ALIGNED = 64
"""The alignment of weights in bytes, as torch aligns memory; at other addresses products may round differently."""


@runtime_checkable
class Packed(Protocol):
    """A layer that multiplies by several weights at once."""

    def packed(self) -> Sequence[nn.Linear]:
        """Return the linear layers whose weights are contiguous in memory, in order."""


class Model(nn.Module):
    """A network that packs its weights again when it is moved, cast, copied or unpickled; values do not change."""

    def _apply(self, fn: object, recurse: bool = True) -> Self:
        """Apply a conversion, as `to`, `cuda` and `half` do, and pack the result."""
        nn.Module._apply(self, fn, recurse)
        pack(self)
        return self

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore from pickle or deepcopy, and pack the weights."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        pack(self)


class Snapshot:
    """The identity and contents of some weights at one moment, without a copy of the numbers.

    Args:
        weights: the weights.
        owners: what tells them apart, where the numbers of a parameter are looked at in another tensor.
    """

    def __init__(self, weights: Iterable[Tensor], owners: Iterable[object] | None = None) -> None:
        weights = list(weights)
        self._which, self._contents = list(map(id, weights if owners is None else owners)), contents(weights)

    def holds(
        self, weights: Iterable[Tensor], owners: Iterable[object] | None = None, *, read_devices: bool = True
    ) -> bool:
        """Tell whether these are the same weights with the same numbers, bit for bit.

        Weights in ordinary memory are read, at the speed of memory; weights that are mapped from a file are not.

        Args:
            weights: weights in the same order as at the start, for example from `all_weights`.
            owners: as at the start.
            read_devices: also read weights on a GPU, which waits for the GPU. Without it, writes through `.data` or
                numpy go unnoticed there.

        Returns:
            True if nothing changed.
        """
        weights = list(weights)
        return self._which == list(map(id, weights if owners is None else owners)) and all(
            unchanged(self._contents, weights, read_devices=read_devices)
        )


def all_weights(module: nn.Module) -> Iterator[Tensor]:
    """Yield every parameter and buffer once.

    Args:
        module: a network, or a part of one.

    Returns:
        An iterator over parameters, then buffers.
    """
    return chain(module.parameters(), module.buffers())


@torch.no_grad()
def write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into weights in place, cast to the dtype and device of the weights.

    Args:
        module: a network of a pipeline, or a part of one.
        values: tensors of the same shapes, by the names of `module.state_dict()`; names may be left out.

    Raises:
        SettingError: a name is not in the module, or a shape differs; nothing is written then.
    """
    weights = dict(chain(module.named_parameters(), module.named_buffers()))
    for name, value in values.items():
        if name not in weights:
            found, hint = f"no weight of this {type(module).__name__}", "names are those of module.state_dict()"
            raise SettingError("SETTING_WEIGHT", name, found, expected="the name of a weight", hint=hint)
        if value.shape != weights[name].shape:
            found, expected = f"shape {tuple(value.shape)}", f"shape {tuple(weights[name].shape)}"
            raise SettingError("SETTING_WEIGHT", name, found, expected=expected)
    for name, value in values.items():
        weights[name].copy_(value)


def backed_by_files(weights: Sequence[Tensor]) -> list[bool]:
    """Tell for each weight whether a file backs its memory, which can then be given back.

    Args:
        weights: the weights.

    Returns:
        True for each that lies in a private mapping of a file.
    """
    maps = private_maps()
    return [lies_in(weight, maps) for weight in weights]


def point_to(weight: Tensor, data: Tensor) -> None:
    """Move a weight to other memory, and drop the cached forms of it.

    Args:
        weight: a parameter.
        data: a tensor of its shape, which becomes its memory.
    """
    forget(weight)
    weight.data = data


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Make weights that are read together contiguous, and on a GPU make convolutions channels-last.

    Weights on the meta device, and those of replaced layers, stay as they are. So do those that are mapped from a file,
    as products take them in an order of their own.

    Args:
        model: a network, or a part of one.
    """
    maps = private_maps()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.is_cuda:
            point_to(module.weight, module.weight.data.contiguous(memory_format=torch.channels_last))
        elif isinstance(module, Packed):
            layers = module.packed()
            if all(type(layer) is nn.Linear and not lies_in(layer.weight, maps) for layer in layers):
                _pack([layer.weight for layer in layers])


def _pack(weights: list[Any]) -> None:
    alike = {(weight.device, weight.dtype, weight.shape[1:], type(weight)) for weight in weights}
    if len(alike) > 1 or weights[0].is_meta or type(weights[0]) is not nn.Parameter:
        return
    if any(weight.is_inference() for weight in weights):  # torch cannot move these and keep its write count
        return
    if joined(weights) is not None and weights[0].data_ptr() % ALIGNED == 0:
        return
    with torch.inference_mode(False):
        block = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, block.split([len(weight) for weight in weights]), strict=True):
        before = weight.data
        point_to(weight, part)
        release(before)


def joined(weights: Sequence[Tensor]) -> Tensor | None:
    """View weights that `pack` made contiguous as one matrix.

    Args:
        weights: matrices (O, C), in the order in which they were packed.

    Returns:
        The matrix (sum of O, C). None if they are not contiguous, or need gradients, which the view would not pass on.
    """
    first, memory = weights[0], weights[0].untyped_storage().data_ptr()
    in_order = all(
        after.data_ptr() == before.data_ptr() + before.nbytes
        and after.untyped_storage().data_ptr() == memory
        and after.dtype == before.dtype
        for before, after in pairwise(weights)
    )
    differentiable = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    unviewable = first.is_inference() and not torch.is_inference_mode_enabled()
    if not in_order or differentiable or unviewable or not all(weight.is_contiguous() for weight in weights):
        return None
    return first.as_strided((sum(len(one) for one in weights), *first.shape[1:]), first.stride())


class Places:
    """The addresses of a model's weights, for captured CUDA graphs, which read the weights there.

    Checking it costs almost nothing. It also keeps the memory on a GPU from being reused in the meantime.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = list(model.parameters())
        self.key, self._versions = _addresses(weights), _versions(weights)
        self._held = [weight.untyped_storage() for weight in weights if weight.is_cuda]

    def hold(self, model: nn.Module) -> bool:
        """Tell whether the weights are still at these addresses, and torch counted no write to them.

        Args:
            model: the same model.

        Returns:
            True if both hold.
        """
        weights = list(model.parameters())
        return (self.key, self._versions) == (_addresses(weights), _versions(weights))


def _addresses(weights: Sequence[Tensor]) -> str:
    return str([weight.data_ptr() for weight in weights])


def _versions(weights: Sequence[Tensor]) -> list[int]:
    return [0 if weight.is_inference() else weight._version for weight in weights]


def forget_derived(*weights: Tensor) -> None:
    """Drop the cached forms of these weights; they are made again when needed.

    Args:
        *weights: parameters.
    """
    for weight in weights:
        forget(weight)
