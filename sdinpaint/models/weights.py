"""The owner of weights: how they lie in memory, how they are written, and whether what is derived from them holds.

Whatever is derived from weights (another form, a fingerprint, a copy in another dtype) is kept beside a `Snapshot` of
them and asked `holds()` before it is used. An edit by any of torch's ordinary ways, in place, through `.data`, through
numpy, by `load_state_dict` or by an optimizer, is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, Protocol, Self, runtime_checkable

import torch
from sdinpaint_kernels import Contents, contents, forget, release, unchanged
from torch import Tensor, nn

from sdinpaint.errors import SettingError

__all__ = ["Contents", "Model", "Packed", "Snapshot", "all_weights", "contents", "forget_derived", "joined", "pack"]
__all__ += ["Places", "point_to", "release", "unchanged", "write"]

ALIGNED = 64
"""Bytes, to a multiple of which a weight begins, as torch's own memory does: products may round in another order at
other addresses."""


@runtime_checkable
class Packed(Protocol):
    """A layer that multiplies by several weights at once."""

    def packed(self) -> Sequence[nn.Linear]:
        """Return the linear layers whose weights lie one after the other, in order."""


class Model(nn.Module):
    """A network whose weights are laid out anew whenever it is moved, cast, copied or unpickled; values stay."""

    def _apply(self, fn: object, recurse: bool = True) -> Self:
        """Do what `to`, `cuda` and `half` ask for."""
        nn.Module._apply(self, fn, recurse)
        pack(self)
        return self

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take what pickle and deepcopy hand over."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        pack(self)


class Snapshot:
    """Some weights at one moment, without a copy of them; as `all_weights` yields those of a module."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        weights = list(weights)
        self._which, self._contents = list(map(id, weights)), contents(weights)

    def holds(self, weights: Iterable[Tensor], *, read_devices: bool = True) -> bool:
        """Tell whether these are the very same weights and hold the same numbers, bit for bit.

        It reads what is not mapped from a file, at the speed of memory; on a GPU only with `read_devices`, because that
        means to wait for it. Without, it misses there what was written through `.data` or numpy.
        """
        weights = list(weights)
        return self._which == list(map(id, weights)) and all(
            unchanged(self._contents, weights, read_devices=read_devices)
        )


def all_weights(module: nn.Module) -> Iterator[Tensor]:
    """Yield every parameter and buffer once."""
    return chain(module.parameters(), module.buffers())


@torch.no_grad()
def write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into weights, where they lie; casts them to the weights' dtype and device.

    Args:
        module: a network of a pipeline, or a part of one.
        values: by the names of `module.state_dict()`, tensors of the same shapes; not all names need be there.

    Raises:
        SettingError: for a name that the module does not have, or another shape; nothing is written then.
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


def point_to(weight: Tensor, data: Tensor) -> None:
    """Let a weight lie in other memory from now on; what was derived from it is forgotten."""
    forget(weight)
    weight.data = data


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Lay weights that are read at once one after the other, and on a GPU make convolutions channels-last.

    Weights on the meta device, and those of layers that were replaced, stay as they are.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.is_cuda:
            point_to(module.weight, module.weight.data.contiguous(memory_format=torch.channels_last))
        elif isinstance(module, Packed):
            layers = module.packed()
            if all(type(layer) is nn.Linear for layer in layers):
                _pack([layer.weight for layer in layers])


def _pack(weights: list[Any]) -> None:
    alike = {(weight.device, weight.dtype, weight.shape[1:], type(weight)) for weight in weights}
    if len(alike) > 1 or weights[0].is_meta or type(weights[0]) is not nn.Parameter:
        return
    if any(weight.is_inference() for weight in weights):  # torch lets nobody move these without losing its count
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
    """Return weights (O, C) that `pack` laid one after the other as one (sum of O, C); None where they are not.

    None also where they need gradients, which the whole would not pass on to its parts.
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
    """Where a model's weights are, for what reads them by their addresses, as a captured CUDA graph does.

    It costs next to nothing, and keeps memory of a GPU from going to others meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = list(model.parameters())
        self.key, self._versions = _addresses(weights), _versions(weights)
        self._held = [weight.untyped_storage() for weight in weights if weight.is_cuda]

    def hold(self, model: nn.Module) -> bool:
        """Tell whether the weights are there still, and torch saw nobody write to them."""
        weights = list(model.parameters())
        return (self.key, self._versions) == (_addresses(weights), _versions(weights))


def _addresses(weights: Sequence[Tensor]) -> str:
    return str([weight.data_ptr() for weight in weights])


def _versions(weights: Sequence[Tensor]) -> list[int]:
    return [0 if weight.is_inference() else weight._version for weight in weights]


def forget_derived(*weights: Tensor) -> None:
    """Drop the other forms that layers keep of these weights, until they are used again."""
    for weight in weights:
        forget(weight)
