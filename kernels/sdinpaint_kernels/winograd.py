"""Winograd's convolution by tiles of 4 x 4 outputs, in float32: a quarter of the multiplications of the plain one.

Tiles of the input are transformed, multiplied by transformed weights, and transformed back. Each transform of an axis
is a matrix that follows from the points of Toom and Cook's algorithm, and both axes at once are a product. The points
decide about rounding: with 0, 1, -1, 2 and -2 the error is twice that of those below, which a search by measured errors
found. bfloat16 has too few digits for any. Transformed weights would take four times the memory of the weights, so they
are made at each call, in a twentieth to a sixth of its time.

Source: https://arxiv.org/abs/1509.09308 (algorithm), https://arxiv.org/abs/1803.10986 (points and rounding).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 4
"""Rows and columns of the outputs of a tile."""
NUMBERS = 2**16
"""The number of tiles times channels per thread that are processed at a time, so that transforms stay in the caches."""
MOST_NUMBERS = 2**20
"""The maximum for all threads: 300 MB of transforms."""
MIN_TILES = 16
"""The minimum number of tiles of an image."""
MOST_WEIGHTS = 640 * 640
"""The maximum of inputs times outputs: a call holds 36 transformed weights of each, 59 MB."""

Matrix = Sequence[Sequence[float]]


class Scheme(NamedTuple):
    """The sums along one axis: which weights meet which inputs."""

    points: Sequence[float]
    """The points of the transforms, without infinity, which is one of them too."""
    phases: Sequence[Matrix]
    """For each output of an input, how its taps are made from three weights: a matrix (taps, 3).

    The taps of the first begin at the input before, those of each other phase one input later.
    """


CONVOLUTION = Scheme((0.0, 0.7, -0.7, 1.4, -1.4), (((1, 0, 0), (0, 1, 0), (0, 0, 1)),))
"""One output for each input, of three taps."""
UPSAMPLED = Scheme((0.4, -0.4, 1.2, -1.2), (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1))))
"""Two outputs for each input, of two taps: upsampled to the nearest, one input meets two of three weights."""


def has_large_tiles(x: Tensor, weight: Tensor, *_: object) -> bool:
    """Tell whether a convolution can be computed by large tiles.

    Args:
        x: feature map (B, C, H, W).
        weight: (O, C, 3, 3).

    Returns:
        True in float32 where tiles fill height and width, and transformed weights take little memory.
    """
    height, width = x.shape[2:]
    fits = height % SIDE == width % SIDE == 0 and height * width >= MIN_TILES * SIDE**2
    return fits and x.dtype == torch.float32 and weight.shape[:2].numel() <= MOST_WEIGHTS


def by_large_tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, scheme: Scheme = CONVOLUTION
) -> Tensor:
    """Apply a 3 x 3 convolution with zero padding of 1, to the map or to the upsampled one.

    Args:
        x: feature map (B, C, H, W), see `has_large_tiles`.
        weight: (O, C, 3, 3).
        bias: (O,), or None.
        residual: (B, O, H', W'), or None.
        scheme: CONVOLUTION, or UPSAMPLED for outputs of twice the height and width.

    Returns:
        The output (B, O, H', W').
    """
    batch, channels, height, width = x.shape
    pixels, rows, columns, outputs = x.permute(0, 2, 3, 1), height // SIDE, width // SIDE, len(weight)
    factor = len(scheme.phases)
    out = x.new_empty(batch, rows, SIDE, factor, columns, SIDE, factor, outputs)
    added = None if residual is None else residual.permute(0, 2, 3, 1).reshape(out.shape)
    before, after = _transforms(scheme)
    chunks = list(_chunks(batch, rows, columns, max(channels, outputs)))
    most = max((images.stop - images.start) * (bottom - top) * columns for images, top, bottom in chunks)
    memory = [x.new_empty(len(before) * most * max(channels, outputs)) for _ in range(2)]  # each from malloc's heap
    for row, column in itertools.product(range(factor), repeat=2):
        weights = _transformed(weight, scheme, row, column)
        for images, top, bottom in chunks:
            windows = _windows(_band(pixels[images], top, bottom), scheme, row, column)
            place = images, slice(top, bottom), slice(None), row, slice(None), slice(None), column
            into = out[place]
            found = _multiplied(windows, before, weights, after, memory).view(SIDE, SIDE, *windows.shape[2:5], outputs)
            found = found.permute(2, 3, 0, 4, 1, 5)
            if bias is None:
                into.copy_(found)
            else:
                torch.add(found, bias, out=into)
            if added is not None:
                into.add_(added[place])
    return out.view(batch, factor * height, factor * width, outputs).permute(0, 3, 1, 2)


def _chunks(batch: int, rows: int, columns: int, channels: int) -> Iterator[tuple[slice, int, int]]:
    """Yield slices of images and ranges of their rows of tiles, to be processed one after the other."""
    tiles = min(MOST_NUMBERS, NUMBERS * torch.get_num_threads()) // channels
    images, band = min(batch, max(1, tiles // (rows * columns))), min(rows, max(1, tiles // columns))
    for first in range(0, batch, images):
        for top in range(0, rows, band):
            yield slice(first, min(first + images, batch)), top, min(top + band, rows)


def _band(pixels: Tensor, top: int, bottom: int) -> Tensor:
    """Cut the inputs of rows of tiles from pixels (B, H, W, C), with one pixel on each side, of zeros at the edges."""
    first, last, height = SIDE * top - 1, SIDE * bottom + 1, pixels.shape[1]
    band = pixels[:, max(first, 0) : min(last, height)]
    return F.pad(band, (0, 0, 1, 1, max(-first, 0), max(last - height, 0)))


def _windows(band: Tensor, scheme: Scheme, row: int, column: int) -> Tensor:
    """View the inputs of each tile of a phase, from a band (B, H, W, C) to (side, side, B, rows, columns, C)."""
    side = len(scheme.points) + 1
    rows, columns = (length - 2 - SIDE + side for length in band.shape[1:3])
    inputs = band[:, row : row + rows, column : column + columns]
    return inputs.unfold(1, side, SIDE).unfold(2, side, SIDE).permute(4, 5, 0, 1, 2, 3)


def _multiplied(windows: Tensor, before: Tensor, weights: Tensor, after: Tensor, memory: Sequence[Tensor]) -> Tensor:
    """Multiply windows (side, side, B, rows, columns, C) in the space of the transforms: (SIDE**2, tiles * O)."""
    numbers, channels, outputs = len(before), windows.shape[-1], weights.shape[-1]
    tiles = windows.shape[2:5].numel()
    given = _fit(memory[0], numbers, tiles * channels)
    given.view(windows.shape).copy_(windows)
    transformed = torch.mm(before, given, out=_fit(memory[1], numbers, tiles * channels)).view(numbers, tiles, channels)
    multiplied = torch.bmm(transformed, weights, out=_fit(memory[0], numbers, tiles, outputs))
    return torch.mm(after, multiplied.view(numbers, -1), out=_fit(memory[1], SIDE**2, tiles * outputs))


def _fit(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _transformed(weight: Tensor, scheme: Scheme, row: int, column: int) -> Tensor:
    """Transform weights (O, C, 3, 3) to matrices (side * side, C, O)."""
    outputs, channels = weight.shape[:2]
    once = [_evaluated(scheme.points, len(phase)) @ _exact(phase) for phase in scheme.phases]
    both = torch.kron(once[row], once[column]).to(weight.dtype)
    return (both @ weight.flatten(2).flatten(0, 1).T).view(-1, outputs, channels).transpose(1, 2)


@functools.cache
def _transforms(scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Make the matrices for both axes of a tile, of inputs (side**2, side**2) and of outputs (SIDE**2, side**2)."""
    inputs = torch.linalg.inv(_evaluated(scheme.points, len(scheme.points) + 1)).T
    outputs = _evaluated(scheme.points, SIDE).T
    return torch.kron(inputs, inputs).float(), torch.kron(outputs, outputs).float()


def _evaluated(points: Sequence[float], count: int) -> Tensor:
    """Make the matrix (points and infinity, count) that evaluates polynomials of so many coefficients, in float64."""
    infinity = [0] * (count - 1) + [1]
    return _exact([*([point**power for power in range(count)] for point in points), infinity])


def _exact(matrix: Matrix) -> Tensor:
    return torch.tensor(matrix, dtype=torch.float64, device="cpu")
