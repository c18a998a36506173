"""Tiled VAE: large images run in row strips with global GroupNorm statistics, equal to one pass up to rounding.

Between two GroupNorms every layer is local, so a strip with a few extra rows on either side gives the same rows as the
whole feature map. The statistics of a GroupNorm are summed over all strips before the first strip is normalised. Strips
with statistics of their own would differ in brightness and colour, and show seams. The middle block, whose attention is
global, runs at once; its feature maps have an eighth of the image's height and width.

Intermediate results are recomputed rather than stored. With C channels at the finest level and P pixels, at most
1.5 C P numbers are stored: the feature map being written, and the one of half the size that it is computed from. To
this comes the scratch memory of a strip. One pass over the whole image stores 6 C P numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sdinpaint_kernels import moments
from torch import Tensor, nn

from sdinpaint.models import fused
from sdinpaint.models.layers import GroupNorm, is_plain, needs_gradients
from sdinpaint.models.vae import VAE, Decoder, Direction, Encoder, ResBlock

Layer = Callable[[Tensor], Tensor]

MIN_ROWS = 16
"""The minimum number of rows of a strip. With fewer, most of the work would go into the overlap with its neighbours."""


@dataclass(frozen=True)
class Rows:
    """A feature map (B, C, height, width) whose rows are read by `pull(top, bottom)`: computed on demand, or stored."""

    height: int
    width: int
    tile: int
    pull: Callable[[int, int], Tensor]
    kept: Tensor | None = None
    """The whole feature map, if it is stored."""

    def bands(self) -> Iterator[tuple[int, int]]:
        """Yield top and bottom row of strips of about tile * tile positions."""
        rows = max(MIN_ROWS, self.tile**2 // self.width)
        return ((top, min(top + rows, self.height)) for top in range(0, self.height, rows))


def in_memory(x: Tensor, tile: int) -> Rows:
    """Wrap a stored feature map for reading in strips.

    Args:
        x: feature map (B, C, H, W).
        tile: side of a square with as many positions as a strip.

    Returns:
        The rows of x.
    """
    return Rows(x.shape[2], x.shape[3], tile, lambda top, bottom: x[:, :, top:bottom], x)


def local(layer: Layer, source: Rows, halo: int, *, up: int = 1, down: int = 1) -> Rows:
    """Apply a layer lazily, row range by row range.

    Padding that the layer adds inside the image spoils only the extra rows, which are cut off. At the edge of the image
    there are no extra rows.

    Args:
        layer: maps (B, C, h, w) to (B, O, h * up / down, w * up / down), and sees at most `halo` rows around its own.
        source: the rows of the input.
        halo: extra rows of the input to read on either side.
        up: factor by which the layer enlarges height and width.
        down: factor by which the layer reduces height and width.

    Returns:
        The rows of the output, computed when they are read.
    """

    def pull(top: int, bottom: int) -> Tensor:
        first = max(top * down // up - halo, 0)
        last = min(-(-bottom * down // up) + halo, source.height)
        cut = top - first * up // down
        return layer(source.pull(first, last))[:, :, cut : cut + bottom - top]

    return Rows(source.height * up // down, source.width * up // down, source.tile, pull)


def keep(source: Rows, into: Tensor | None = None) -> Rows:
    """Compute all rows and store them.

    Args:
        source: the rows to compute.
        into: memory for the result; it may be the input of `source`, if no halo exceeds MIN_ROWS.

    Returns:
        The stored rows.
    """
    bands = ((top, source.pull(top, bottom)) for top, bottom in source.bands())
    top, band = next(bands)
    if into is None:
        shape = *band.shape[:2], source.height, source.width
        into = torch.empty(shape, dtype=band.dtype, device=band.device, memory_format=torch.channels_last)
    for following in bands:
        # Written late, because the following band is computed from some old rows of this one.
        into[:, :, top : top + band.shape[2]] = band
        top, band = following
    into[:, :, top:] = band
    return in_memory(into, source.tile)


def shared_norm(norm: GroupNorm, source: Rows) -> Layer:
    """Build a GroupNorm with a SiLU, with the statistics of a whole feature map.

    Args:
        norm: the GroupNorm.
        source: the rows of its whole input; they are all read here.

    Returns:
        A function that normalises any of these rows, (B, C, h, W).
    """
    whole = moments.merge(moments.measure(source.pull(top, bottom)) for top, bottom in source.bands())

    def run(x: Tensor) -> Tensor:
        affine = moments.affine(whole, norm.num_groups, norm.weight, norm.bias, norm.eps, None, x.dtype)
        return moments.apply(x, affine, silu=True)

    return run


def residual(block: ResBlock, x: Rows) -> Rows:
    """Apply a residual block of the VAE; its intermediate feature map is computed twice.

    Args:
        block: the residual block.
        x: the rows of its input; if they are stored and have the right number of channels, they are overwritten.

    Returns:
        The stored rows of the output.
    """
    norm1 = shared_norm(block.norm1, x)
    norm2 = shared_norm(block.norm2, local(lambda part: block.conv1(norm1(part)), x, halo=1))

    def run(part: Tensor) -> Tensor:
        h = block.conv2(norm2(block.conv1(norm1(part))))
        return h.add_(fused.pointwise(block.nin_shortcut, part) if block.has_shortcut else part)

    return keep(local(run, x, halo=2), into=None if block.has_shortcut else x.kept)


def run_encoder(encoder: Encoder, image: Tensor, tile: int) -> Tensor:
    """Run an encoder in row strips.

    Args:
        encoder: the encoder of a VAE.
        image: (B, 3, 8H, 8W).
        tile: side of a square with as many pixels as a strip.

    Returns:
        The result of `encoder(image)`, (B, 8, H, W).
    """
    x = keep(local(encoder.conv_in, in_memory(image, tile), halo=1))
    down: Any = encoder.down
    for level in down:
        for block in level.block:
            x = residual(block, x)
        if hasattr(level, "downsample"):
            x = keep(local(level.downsample, x, halo=2, down=2))
    return encoder.conv_out(fused.norm_silu(encoder.norm_out, encoder.mid(x.pull(0, x.height))))


def run_decoder(decoder: Decoder, z: Tensor, tile: int) -> Tensor:
    """Run a decoder in row strips; the output of the last upsampling, the largest feature map, is never stored.

    Args:
        decoder: the decoder of a VAE.
        z: latents after `post_quant_conv`, (B, 4, H, W).
        tile: side of a square with as many pixels as a strip.

    Returns:
        The result of `decoder(z)`, (B, 3, 8H, 8W).
    """
    x = in_memory(decoder.mid(decoder.conv_in(z)), tile)
    up: Any = decoder.up
    for index in reversed(range(len(up))):
        for block in up[index].block:
            x = residual(block, x)
        if index > 0:
            x = local(up[index].upsample, x, halo=1, up=2)
        if index > 1:
            x = keep(x)
    norm = shared_norm(decoder.norm_out, x)
    image = keep(local(lambda part: decoder.conv_out(norm(part)), x, halo=1))
    return image.pull(0, image.height)


def can_run(vae: nn.Module, given: Tensor) -> bool:
    """Tell whether running in strips is equivalent to calling the VAE: it is plain, and no gradient is needed.

    Args:
        vae: the autoencoder.
        given: its input.

    Returns:
        True if strips may be used.
    """
    if type(vae) is not VAE or not is_plain(vae) or not vars(vae).keys().isdisjoint({"posterior", "decode"}):
        return False
    return not needs_gradients(vae, given)


def posterior(vae: VAE, image: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Compute `vae.posterior(image)` in row strips, without gradients.

    Args:
        vae: a VAE for which `can_run` holds.
        image: (B, 3, 8H, 8W) in [-1, 1].
        tile: side of a square with as many pixels as a strip.

    Returns:
        Mean and standard deviation of the scaled latents, (B, 4, H, W) each.
    """
    return vae.scaled(run_encoder(vae.encoder, image.contiguous(memory_format=torch.channels_last), tile))


def decode(vae: VAE, latents: Tensor, tile: int) -> Tensor:
    """Compute `vae.decode(latents)` in row strips, without gradients.

    Args:
        vae: a VAE for which `can_run` holds.
        latents: scaled latents (B, 4, H, W).
        tile: side of a square with as many pixels as a strip.

    Returns:
        The image (B, 3, 8H, 8W).
    """
    return run_decoder(vae.decoder, vae.unscaled(latents), tile)


RUNS: dict[Direction, Callable[[Any, Tensor, int], tuple[Tensor, ...]]] = {
    "encode": posterior,
    "decode": lambda vae, latents, tile: (decode(vae, latents, tile),),
}
"""The function that replaces `VAE.forward` in each direction."""
