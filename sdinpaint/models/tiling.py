"""The autoencoder over large pictures: band after band of rows, and the picture made at once, but for rounding.

Between two GroupNorms everything is local, so a band with a few more rows to either side gives what the whole map
gives. The statistics of a GroupNorm are summed up over all bands before the first is normalised: bands with statistics
of their own differ in brightness and colour, and show seams. The middle, whose attention sees everything, runs at once;
its maps are an eighth of the picture's height and width.

What is needed again is computed again rather than kept. With C channels at the finest level and P pixels, no more than
1.5 C P numbers are kept (the map being written, and the one of half the size that it is made from) beside the scratch
of a band; at once it is 6 C P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sdinpaint_kernels import moments
from torch import Tensor, nn

from sdinpaint.models import fused
from sdinpaint.models.layers import GroupNorm, is_plain
from sdinpaint.models.vae import VAE, Decoder, Direction, Encoder, ResBlock

Layer = Callable[[Tensor], Tensor]

LEAST_ROWS = 16
"""Of a band: with fewer, most of the work would go into its neighbours' rows."""


@dataclass(frozen=True)
class Rows:
    """A map (B, C, height, width) of which `pull(top, bottom)` gives rows: computed there and then, or kept."""

    height: int
    width: int
    tile: int
    pull: Callable[[int, int], Tensor]
    kept: Tensor | None = None
    """All of it, if it is."""

    def bands(self) -> Iterator[tuple[int, int]]:
        """Top and bottom of bands of about tile * tile positions."""
        rows = max(LEAST_ROWS, self.tile**2 // self.width)
        return ((top, min(top + rows, self.height)) for top in range(0, self.height, rows))


def in_memory(x: Tensor, tile: int) -> Rows:
    """x (B, C, H, W), to be walked over in bands."""
    return Rows(x.shape[2], x.shape[3], tile, lambda top, bottom: x[:, :, top:bottom], x)


def local(layer: Layer, source: Rows, halo: int, *, up: int = 1, down: int = 1) -> Rows:
    """A layer of which a row depends on no more than `halo` rows around its own; it makes up / down as many as it gets.

    What it pads within the picture spoils the halo only, which is cut off; at the picture's edge there is none.
    """

    def pull(top: int, bottom: int) -> Tensor:
        first = max(top * down // up - halo, 0)
        last = min(-(-bottom * down // up) + halo, source.height)
        cut = top - first * up // down
        return layer(source.pull(first, last))[:, :, cut : cut + bottom - top]

    return Rows(source.height * up // down, source.width * up // down, source.tile, pull)


def keep(source: Rows, into: Tensor | None = None) -> Rows:
    """All rows, computed and written; `into` may be what they are computed from, if no halo exceeds LEAST_ROWS."""
    made = ((top, source.pull(top, bottom)) for top, bottom in source.bands())
    top, band = next(made)
    if into is None:
        shape = *band.shape[:2], source.height, source.width
        into = torch.empty(shape, dtype=band.dtype, device=band.device, memory_format=torch.channels_last)
    for following in made:
        # only now, because the following band was made from some rows of this one as they were
        into[:, :, top : top + band.shape[2]] = band
        top, band = following
    into[:, :, top:] = band
    return in_memory(into, source.tile)


def shared_norm(norm: GroupNorm, source: Rows) -> Layer:
    """The norm and the SiLU behind it, with the statistics of the whole source."""
    whole = moments.merge(moments.measure(source.pull(top, bottom)) for top, bottom in source.bands())

    def run(x: Tensor) -> Tensor:
        affine = moments.affine(whole, norm.num_groups, norm.weight, norm.bias, norm.eps, None, x.dtype)
        return moments.apply(x, affine, silu=True)

    return run


def residual(block: ResBlock, x: Rows) -> Rows:
    """A block in place of its input where that is kept and has as many channels; its middle map is computed twice."""
    norm1 = shared_norm(block.norm1, x)
    norm2 = shared_norm(block.norm2, local(lambda part: block.conv1(norm1(part)), x, halo=1))

    def run(part: Tensor) -> Tensor:
        h = block.conv2(norm2(block.conv1(norm1(part))))
        return h.add_(fused.pointwise(block.nin_shortcut, part) if block.has_shortcut else part)

    return keep(local(run, x, halo=2), into=None if block.has_shortcut else x.kept)


def run_encoder(encoder: Encoder, image: Tensor, tile: int) -> Tensor:
    """As `encoder(image)`."""
    x = keep(local(encoder.conv_in, in_memory(image, tile), halo=1))
    down: Any = encoder.down
    for level in down:
        for block in level.block:
            x = residual(block, x)
        if hasattr(level, "downsample"):
            x = keep(local(level.downsample, x, halo=2, down=2))
    return encoder.conv_out(fused.norm_silu(encoder.norm_out, encoder.mid(x.pull(0, x.height))))


def run_decoder(decoder: Decoder, z: Tensor, tile: int) -> Tensor:
    """As `decoder(z)`; the widest map of all, which the last upsampling makes, is never kept."""
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
    picture = keep(local(lambda part: decoder.conv_out(norm(part)), x, halo=1))
    return picture.pull(0, picture.height)


def can_run(vae: nn.Module, given: Tensor) -> bool:
    """Tell whether bands are the same as one call of the VAE: it is plain, and no gradient is needed."""
    if type(vae) is not VAE or not is_plain(vae) or not vars(vae).keys().isdisjoint({"posterior", "decode"}):
        return False
    return not (torch.is_grad_enabled() and any(one.requires_grad for one in (given, *vae.parameters())))


def posterior(vae: VAE, image: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Do what `vae.posterior(image)` does, in bands of about tile * tile pixels and without gradients."""
    return vae.scaled(run_encoder(vae.encoder, image.contiguous(memory_format=torch.channels_last), tile))


def decode(vae: VAE, latents: Tensor, tile: int) -> Tensor:
    """Do what `vae.decode(latents)` does, in bands of about tile * tile pixels and without gradients."""
    return run_decoder(vae.decoder, vae.unscaled(latents), tile)


RUNS: dict[Direction, Callable[[Any, Tensor, int], tuple[Tensor, ...]]] = {
    "encode": posterior,
    "decode": lambda vae, latents, tile: (decode(vae, latents, tile),),
}
"""By direction, what `VAE.forward` does."""
