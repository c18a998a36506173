"""A 3 x 3 convolution that keeps height and width; on the CPU in the form that is fastest for its sizes.

- tiles: Winograd's F(2 x 2, 3 x 3). Each 2 x 2 of the output is computed from 4 x 4 of the input by 16 products, where
  the sum over 3 x 3 takes 36: input tiles are transformed, multiplied by transformed weights, and transformed back. The
  transforms only add and subtract. In float32 the precision is that of torch's convolution; in bfloat16 the transformed
  tiles and products are rounded, and the error is about three times torch's. The weights take 16 numbers for each 9.
- large_tiles: F(4 x 4, 3 x 3), in float32 only, see `winograd`.
- packed: oneDNN's convolution with weights in its own order. On small maps torch's convolution spends half of its time
  on reordering them.
- product: of unfolded windows, with the weights as they are.
- plain: torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sdinpaint_kernels import backend
from sdinpaint_kernels.conv3_add import conv3_add
from sdinpaint_kernels.forms import PLAIN, Form, compute
from sdinpaint_kernels.linear import linear, ordered_products, products
from sdinpaint_kernels.packed_conv import by_packing, convolution
from sdinpaint_kernels.prepacked import prepacked
from sdinpaint_kernels.winograd import by_large_tiles, has_large_tiles

MIN_TILES = 16
"""The minimum number of 2 x 2 tiles of an image."""
MOST_WINDOWS = 32 * 32
"""The maximum number of pixels whose windows are unfolded: each is nine times as large as a pixel."""
TILES = 512
"""The number of tiles per thread that are processed at a time, so that their transforms stay in the thread's cache."""

# The matrix that transforms three weights to four numbers. Source: https://arxiv.org/abs/1509.09308, section 4.1, G.
# The transforms of input and output, B and A there, are written out below.
G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def conv3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, kernels: str | None = None
) -> Tensor:
    """Apply a 3 x 3 convolution with stride 1 and zero padding of 1, and add a residual.

    Args:
        x: feature map (B, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,), or None.
        residual: (B, O, H, W), or None.
        kernels: "torch" for torch's own convolution, on a GPU also "triton", see `backend`.

    Returns:
        The output (B, O, H, W).

    Source: https://arxiv.org/abs/1509.09308, algorithm 1.
    """
    if x.is_cuda or backend.INTERPRETED:
        return conv3_add(x, weight, bias, residual=residual, kernels=kernels)
    if kernels == "torch" or x.numel() == 0 or not backend.on_cpu(x, weight, bias, residual):
        return backend.with_residual(F.conv2d(x, weight, bias, padding=1), residual)
    added = None if residual is None else residual.expand(len(x), len(weight), *x.shape[2:])  # oneDNN does not check it
    return compute("conv3", FORMS, sizes(x, weight), x, weight, bias, added)


def sizes(x: Tensor, weight: Tensor, *_: object) -> tuple[int, int, int]:
    """Tell calls on the CPU apart.

    Args:
        x: feature map (B, C, H, W).
        weight: (O, C, 3, 3).

    Returns:
        The numbers of channels of input and output, and of pixels of the input.
    """
    return weight.shape[1], weight.shape[0], len(x) * x.shape[2:].numel()


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1) if residual is None else convolution(x, weight, bias, residual)


def _is_small(x: Tensor, *_: object) -> bool:
    return x.shape[2:].numel() <= MOST_WINDOWS


def _by_product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    windows = F.unfold(x, 3, padding=1).transpose(1, 2)
    added = None if residual is None else residual.flatten(2).transpose(1, 2)
    return linear(windows, weight, bias, added).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _transform(weight: Tensor) -> Sequence[Tensor] | Tensor:
    """Transform weights (O, C, 3, 3) to 16 matrices (O, C), in float32 or better until the end."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    once = torch.tensor(G, dtype=wide, device=weight.device)
    outputs, inputs = weight.shape[:2]
    out = weight.new_empty(16, outputs, inputs)
    for part, into in zip(weight.split(64), out.split(64, dim=1), strict=True):
        into.copy_((part.to(wide).flatten(0, 1).flatten(1) @ torch.kron(once, once).T).T.unflatten(1, (-1, inputs)))
    return ordered_products(out)


def _has_tiles(x: Tensor, *_: object) -> bool:
    height, width = x.shape[2:]
    return height % 2 == width % 2 == 0 and height * width >= 4 * MIN_TILES


def _by_tiles(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    weights = prepacked(weight, _transform)
    batch, _, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)
    out = x.new_empty(batch, height // 2, 2, width // 2, 2, weight.shape[0])
    added = None if residual is None else residual.permute(0, 2, 3, 1).view_as(out)
    for images, top, bottom in _chunks(batch, height // 2, width // 2):
        into = out[images, top:bottom]
        multiplied = products(_tiles(pixels[images], top, bottom).flatten(1, 3), weights)
        _assemble([one.view(*into.shape[:2], *into.shape[3::2]) for one in multiplied], bias, into)
        if added is not None:
            into.add_(added[images, top:bottom])
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _chunks(batch: int, rows: int, columns: int) -> Iterator[tuple[slice, int, int]]:
    """Yield slices of images and ranges of their rows of tiles, to be processed one after the other."""
    tiles = TILES * torch.get_num_threads()
    images, band = max(1, tiles // (rows * columns)), max(1, tiles // columns)
    for first in range(0, batch, images):
        for top in range(0, rows, band):
            yield slice(first, first + images), top, min(top + band, rows)


def _tiles(pixels: Tensor, top: int, bottom: int) -> Tensor:
    """Transform the 4 x 4 inputs of rows of tiles, from pixels (B, H, W, C) to (16, B, rows, W / 2, C)."""
    batch, height, width, channels = pixels.shape
    first, last = 2 * top - 1, 2 * bottom + 1
    band = pixels[:, max(first, 0) : min(last, height)]
    band = F.pad(band, (0, 0, 1, 1, max(-first, 0), max(last - height, 0)))
    rows, columns = bottom - top, width // 2
    out = pixels.new_empty(4, 4, batch, rows, columns, channels)
    a, b, c, d = (band[:, start : start + 2 * rows - 1 : 2] for start in range(4))
    for line, into in zip((a - c, b + c, c - b, b - d), out, strict=True):
        a, b, c, d = (line[:, :, start : start + 2 * columns - 1 : 2] for start in range(4))
        torch.sub(a, c, out=into[0])
        torch.add(b, c, out=into[1])
        torch.sub(c, b, out=into[2])
        torch.sub(b, d, out=into[3])
    return out.flatten(0, 1)


def _assemble(products: Sequence[Tensor], bias: Tensor | None, out: Tensor) -> None:
    """Transform 16 products (B, rows, columns, O) back, add the bias, and write to out (B, rows, 2, columns, 2, O).

    The sums are in float32, which halves the error of bfloat16.
    """
    a, b, c, d = (products[start : start + 4] for start in range(0, 16, 4))
    upper = [torch.add(one.float(), two).add_(three) for one, two, three in zip(a, b, c, strict=True)]
    lower = [torch.sub(two.float(), three).sub_(four) for two, three, four in zip(b, c, d, strict=True)]
    for row, (first, second, third, fourth) in enumerate((upper, lower)):
        if bias is not None:  # the second term is in both columns, with the same sign
            second.add_(bias)
        torch.add(first.add_(second), third, out=out[:, :, row, :, 0])
        torch.sub(second.sub_(third), fourth, out=out[:, :, row, :, 1])


FORMS = {
    "tiles": Form(_by_tiles, _has_tiles),
    "large_tiles": Form(by_large_tiles, has_large_tiles),
    "packed": Form(by_packing),
    "product": Form(_by_product, _is_small),
    PLAIN: Form(_plain),
}
"""The forms of `conv3` on the CPU."""
