"""Interpret the pickle in a `torch.save` file, which describes named tensors over numbered storages.

Source: torch/_utils.py (`_rebuild_tensor_v2` and its kin) and torch/serialization.py (`persistent_id`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

from sdinpaint_weights.dtypes import STORED, StoredDtype
from sdinpaint_weights.pickle_names import is_dangerous, is_harmless
from sdinpaint_weights.pickle_walker import Arguments, Inert, Known, ParameterTable, PickleFault
from sdinpaint_weights.weights import MAX_NAME, MAX_TENSORS, extent_of, is_tensor_name

MAX_DIMENSIONS = 16
LEARNED = "string_to_param"
"""The table of the vectors of a textual inversion, beside which there may be a tensor of its token's number."""
MAX_NESTING = 4
MAX_CLASSES = 1000
"""Unknown classes that a pickle may name; training frameworks name some dozens."""
STORAGE_DTYPES = {
    "DoubleStorage": STORED["float64"],
    "FloatStorage": STORED["float32"],
    "HalfStorage": STORED["float16"],
    "BFloat16Storage": STORED["bfloat16"],
    "LongStorage": STORED["int64"],
    "IntStorage": STORED["int32"],
    "ShortStorage": STORED["int16"],
    "CharStorage": STORED["int8"],
    "ByteStorage": STORED["uint8"],
    "BoolStorage": STORED["bool"],
    "UntypedStorage": STORED["uint8"],
}
DTYPES = {f"torch.{name}": dtype for name, dtype in STORED.items()}


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """A part of a storage: `count` elements from `start`, of `total` elements."""

    key: str
    dtype: StoredDtype
    start: int
    count: int
    total: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor before its storage is looked up; `offset` and `stride` in elements of `dtype`."""

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: StoredDtype

    @property
    def start(self) -> int:
        """Return the first byte of the tensor in the whole storage."""
        return self.storage.start * self.storage.dtype.itemsize + self.offset * self.dtype.itemsize


class Names:
    """Resolve the imports of one file without importing, and collect the unknown names."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()

    def __call__(self, module: str, name: str) -> object:
        """Resolve a name.

        Args:
            module: the module that the pickle would import from.
            name: the name in it.

        Returns:
            A dtype, a `Known` function, or an `Inert` object.

        Raises:
            PickleFault: the name is dangerous, or stands for an unsupported kind of tensor.
        """
        full = f"{module}.{name}"
        if is_dangerous(module, name):
            raise PickleFault("CKPT_UNSAFE_PICKLE", f"a pickle that calls {full!r}, which weights have no use for")
        if full in _BUILDERS:
            return Known(full, _BUILDERS[full])
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if full in DTYPES:
            return DTYPES[full]
        if full.startswith("torch._utils._rebuild_"):
            raise PickleFault("CKPT_UNSUPPORTED_TENSOR", f"a tensor made by {name!r}: only dense tensors are supported")
        if not is_harmless(module, name):
            self.unknown.add(full)
            if len(self.unknown) > MAX_CLASSES:
                raise PickleFault("CKPT_PICKLED_OBJECT", f"objects of more than {MAX_CLASSES} classes")
        return Inert(full)


def storage_of(identity: object) -> PickledStorage | Known | Inert:
    """Interpret a persistent id.

    Args:
        identity: ("storage", dtype, key, device, elements), with (key, start, count) appended for a view.

    Returns:
        The storage; for a class with its source code, which PyTorch before 1.6 wrote of modules, that class alone.

    Raises:
        PickleFault: the id is damaged, or its storage class is not supported.
    """
    fields = identity if isinstance(identity, tuple) else ()
    if fields[:1] == ("module",):
        return fields[1] if len(fields) > 1 and isinstance(fields[1], Known) else Inert("the source of a module")
    if len(fields) not in (5, 6) or fields[0] != "storage" or not isinstance(fields[2], str):
        raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: an unknown kind of storage")
    dtype, key, total = fields[1], fields[2], fields[4]
    if not isinstance(dtype, StoredDtype):
        kind = dtype.name if isinstance(dtype, Inert) else "unknown"
        raise PickleFault("CKPT_UNSUPPORTED_TENSOR", f"a storage of the class {kind!r}")
    view = fields[5] if len(fields) == 6 and fields[5] is not None else (key, 0, total)
    span = (*view[1:], total) if isinstance(view, tuple) and len(view) == 3 else ()
    if not _are_counts(span) or len(span) != 3 or span[0] + span[1] > span[2]:
        raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: a storage of no possible size")
    return PickledStorage(key, dtype, *span)


def named_tensors(top: object) -> dict[str, PickledTensor]:
    """Find the tensors of a pickle: those of the innermost `state_dict`, or of the tables in it if it has none itself.

    A tensor alone is named "tensor".

    Args:
        top: the object that the pickle describes.

    Returns:
        Name -> tensor; tensors of inner tables are named "table.name".

    Raises:
        PickleFault: there are no tensors.
    """
    for _ in range(MAX_NESTING):
        if isinstance(top, dict) and isinstance(top.get("state_dict"), dict):
            top = top["state_dict"]
    if isinstance(top, PickledTensor):
        return {"tensor": top}
    if isinstance(top, Inert):
        raise PickleFault("CKPT_PICKLED_OBJECT", f"a pickled object of the class {top.name!r}")
    table = top if isinstance(top, dict) else {}
    groups = {"": _tensors_in(table)}
    if not groups[""] or LEARNED in table:
        # Each table counts once, because a pickle may name the same one a million times.
        inner = {id(value): (name, value) for name, value in table.items() if isinstance(value, dict)}
        groups = {f"{_clipped(name)}.": _tensors_in(value) for name, value in inner.values()}
    count = sum(map(len, groups.values()))
    if count > MAX_TENSORS:
        raise PickleFault("CKPT_TOO_MANY_TENSORS", f"{count} tensors, where at most {MAX_TENSORS} are read")
    tensors = {outer + _clipped(name): tensor for outer, found in groups.items() for name, tensor in found.items()}
    if not tensors:
        names = ", ".join(repr(name[:40]) for name in list(table)[:5])
        raise PickleFault("CKPT_NO_TENSORS", f"no tensors, but {names}" if names else "no tensors")
    return tensors


def check_tensor(name: str, tensor: PickledTensor) -> None:
    """Check that a tensor has a printable name and lies within its storage.

    Args:
        name: name of the tensor.
        tensor: the tensor.

    Raises:
        PickleFault: the name is not printable, or the tensor is expanded or reaches beyond its storage.
    """
    if not is_tensor_name(name):
        raise PickleFault("CKPT_BAD_PICKLE", f"a tensor whose name is empty, too long or not printable: {name[:20]!r}")
    room = tensor.storage.count * tensor.storage.dtype.itemsize // tensor.dtype.itemsize
    elements = math.prod(tensor.shape)
    repeated = any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if elements and (repeated or elements > room):
        found = f"{name!r} is an expanded tensor: {elements} elements over a storage of {room}"
        raise PickleFault("CKPT_UNSUPPORTED_TENSOR", found)
    if tensor.offset + extent_of(tensor.shape, tensor.stride) > room:
        raise PickleFault("CKPT_BAD_PICKLE", f"{name!r} reaches beyond its storage of {room} elements")


def _tensors_in(table: Mapping[str, object]) -> dict[str, PickledTensor]:
    return {name: value for name, value in table.items() if isinstance(value, PickledTensor)}


def _clipped(name: str) -> str:
    """Shorten a name that is too long for a tensor, which a pickle may recall often, but not so far that it is not."""
    return name[: MAX_NAME + 1]


def _is_count(value: object) -> TypeGuard[int]:
    # The bound keeps products and messages small: no file has 2 ** 62 elements.
    return type(value) is int and 0 <= value < 1 << 62


def _are_counts(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS and all(_is_count(item) for item in value)


def _tensor(arguments: Arguments) -> PickledTensor:
    """Rebuild a tensor from (storage, offset, shape, stride, ...)."""
    storage, offset, shape, stride = arguments[:4] if len(arguments) >= 4 else (None,) * 4
    if (
        not isinstance(storage, PickledStorage)
        or not _is_count(offset)
        or not (_are_counts(shape) and _are_counts(stride))
        or len(shape) != len(stride)
    ):
        raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: a tensor without a storage, shape or stride")
    return PickledTensor(storage, offset, shape, stride, storage.dtype)


def _tensor_of_dtype(arguments: Arguments) -> PickledTensor:
    """Rebuild a tensor from (storage, offset, shape, stride, requires_grad, hooks, dtype, ...)."""
    dtype = arguments[6] if len(arguments) > 6 else None
    if not isinstance(dtype, StoredDtype):
        raise PickleFault("CKPT_UNSUPPORTED_TENSOR", "a tensor of an unknown dtype")
    return replace(_tensor(arguments), dtype=dtype)


def _tensor_with_attributes(arguments: Arguments) -> object:
    """Rebuild a tensor from (builder, class, the builder's arguments, attributes)."""
    function = arguments[0] if len(arguments) > 2 else None
    inner = arguments[2] if len(arguments) > 2 else None
    # One of these inside another would be recursion under the file's control.
    if not isinstance(function, Known) or function.build is _tensor_with_attributes or not isinstance(inner, tuple):
        raise PickleFault("CKPT_UNSUPPORTED_TENSOR", "a tensor of a custom class")
    return function.build(inner)


def _first(arguments: Arguments) -> object:
    if not arguments:
        raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: a call without its argument")
    return arguments[0]


def _table(arguments: Arguments) -> dict[str, object]:
    """Rebuild a table: from (pairs,) as Python 2 wrote it, or empty, with its items to follow."""
    pairs = arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else ()
    items = [pair for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2]
    return {key: value for key, value in items if isinstance(key, str)}


_BUILDERS: dict[str, Callable[[Arguments], object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch.Size": _first,
    "torch.nn.modules.container.ParameterDict": lambda _: ParameterTable(),
    "collections.OrderedDict": _table,
    "collections.defaultdict": _table,
}
