"""Apply the edits of the name tables to tensors and to shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdinpaint_weights.keymap import QKV, Edit

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


def apply(edit: Edit, tensors: Sequence[Tensor]) -> Tensor:
    """Apply an edit to tensors.

    Args:
        edit: the edit.
        tensors: q, k and v for `Edit.STACKED`; otherwise a single tensor.

    Returns:
        The edited tensor: a copy for `Edit.STACKED`, otherwise a view.
    """
    if edit is Edit.STACKED:
        import torch

        return torch.cat(list(tensors))
    (tensor,) = tensors
    if edit in QKV:
        return tensor.chunk(len(QKV))[QKV.index(edit)]
    if edit is Edit.TRANSPOSED:
        return tensor.mT
    if edit is Edit.CONVOLUTION:
        return tensor[:, :, None, None]
    return tensor[:, :, 0, 0] if edit is Edit.LINEAR else tensor


def shape_after(edit: Edit, shapes: Sequence[Shape]) -> Shape:
    """Compute the shape that `apply` returns.

    Args:
        edit: the edit.
        shapes: shapes of the tensors that `apply` is given.

    Returns:
        The shape of the edited tensor.
    """
    first = shapes[0]
    if edit is Edit.STACKED:
        return sum(shape[0] for shape in shapes), *first[1:]
    if edit in QKV:
        return first[0] // len(QKV), *first[1:]
    if edit is Edit.TRANSPOSED:
        return first[1], first[0]
    if edit is Edit.CONVOLUTION:
        return *first, 1, 1
    return first[:2] if edit is Edit.LINEAR else first


def fits(edit: Edit, shape: Shape) -> bool:
    """Tell whether an edit can be applied to a tensor.

    Args:
        edit: any edit but `Edit.STACKED`.
        shape: shape of the tensor.

    Returns:
        True where `apply` accepts the tensor.
    """
    if edit in QKV:
        return len(shape) > 0 and shape[0] % len(QKV) == 0
    dimensions = {Edit.TRANSPOSED: 2, Edit.CONVOLUTION: 2, Edit.LINEAR: 4}
    return len(shape) == dimensions.get(edit, len(shape))
