"""The VAE with guards: large images run in row strips, and a half-precision overflow is repeated in float32."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from sdinpaint_kernels import keeping_memory
from torch import Tensor, nn

from sdinpaint.errors import NumericError, warn
from sdinpaint.models import tiling
from sdinpaint.models.layers import is_plain
from sdinpaint.models.vae import VAE, Direction
from sdinpaint.models.weights import Places, Snapshot, all_weights

__all__ = ["TILE", "WHOLE_PIXELS", "GuardedVAE"]

WHOLE_PIXELS = 1024 * 1024
"""The largest image, in pixels, that runs at once by default; larger ones run in row strips, slower in less memory."""
TILE = 256
"""The height and width, in pixels, of a square that has as many pixels as a row strip."""

_WIDENING = threading.Lock()
_Run = Callable[[Tensor], Sequence[Tensor]]


class Graphs(Protocol):
    """Where functions of tensors on a GPU are captured as CUDA graphs, by key and shapes."""

    def can_capture(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether a function of these tensors would be captured."""

    def __call__(
        self,
        key: str,
        function: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
        varying: Sequence[Tensor],
        constant: tuple[Tensor, ...],
    ) -> Tensor:
        """Compute function(varying, constant), by replaying its graph if there is one."""


class GuardedVAE:
    """Encodes and decodes with one VAE. A direction that has overflowed once uses a float32 copy from then on.

    SDXL's official VAE overflows in float16. The copy is float32 rather than bfloat16, which has the same range: 8 bits
    of precision show as steps in a sky, CPUs and older GPUs are slow at it, and a VAE runs only two or three times per
    image.

    The argument `tile` of both methods sets the size of the row strips (see `models.tiling`) to about tile * tile
    pixels; 0 runs the image at once; None runs images of up to WHOLE_PIXELS at once, and larger ones in strips of
    TILE * TILE pixels. A VAE that is wrapped, hooked or adapted, or that needs gradients, always runs at once.
    """

    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae
        self._wide: tuple[nn.Module, Snapshot] | None = None
        # Per direction, so that an overflow in one leaves the results of the other the same.
        self._overflowed: set[tuple[str, torch.dtype, torch.device]] = set()

    def encode(self, image: Tensor, *, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode an image, one batch item after the other.

        Args:
            image: (B, 3, 8H, 8W) in [-1, 1].
            tile: side of a square with as many pixels as a row strip; 0 for no strips, None to choose by size.

        Returns:
            The float32 mean and standard deviation of the scaled latents, (B, 4, H, W) each.

        Raises:
            NumericError: the result is NaN or infinite in float32 too.
        """
        mean, std = self._run("encode", image, _tile(tile, image.shape[-2:].numel()))
        return mean, std

    def decode(self, latents: Tensor, *, tile: int | None = None, graphs: Graphs | None = None) -> Tensor:
        """Decode latents, one batch item after the other.

        Args:
            latents: scaled latents (B, 4, H, W).
            tile: side of a square with as many pixels as a row strip; 0 for no strips, None to choose by size.
            graphs: where a decoder on a GPU that is plain and runs without strips is captured; None captures nothing.

        Returns:
            The float32 image (B, 3, 8H, 8W), about in [-1, 1].

        Raises:
            NumericError: the result is NaN or infinite in float32 too.
        """
        return self._run("decode", latents, _tile(tile, 64 * latents.shape[-2:].numel()), graphs)[0]

    def _run(self, direction: Direction, given: Tensor, tile: int, graphs: Graphs | None = None) -> list[Tensor]:
        weight = next(self.vae.parameters())
        case = direction, weight.dtype, weight.device
        vae = self._widened(*case) if case in self._overflowed else self.vae
        with keeping_memory():
            outputs = _one_by_one(direction, vae, given, tile, graphs)
        finite = _is_finite(outputs)
        if not finite and weight.dtype != torch.float32 and _is_finite([given]):
            outputs = _one_by_one(direction, self._widened(*case), given, tile, graphs)
            finite = _is_finite(outputs)
        if not finite:
            bad = sum(int((~output.isfinite()).sum()) for output in outputs)
            found = f"{bad} of {sum(output.numel() for output in outputs)} {direction}d values are NaN or infinite"
            code, hint = f"NUMERIC_{direction.upper()}", "load with dtype='float32', or with another VAE: vae=..."
            raise NumericError(code, "vae", found, expected="finite values", hint=hint)
        return outputs

    def _widened(self, direction: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Return the float32 copy, which all threads share; warn when a direction needs it for the first time."""
        with _WIDENING:
            if (direction, dtype, device) not in self._overflowed:
                message = f"the VAE overflowed in {dtype}; the image is {direction}d in float32 instead"
                warn(message)
                self._overflowed.add((direction, dtype, device))
            if self._wide is None or not is_plain(self.vae) or not self._wide[1].holds(all_weights(self.vae)):
                # A copy, because another thread may be using the VAE.
                snapshot = Snapshot(all_weights(self.vae))
                self._wide = copy.deepcopy(self.vae).float(), snapshot
            return self._wide[0]


def _tile(tile: int | None, pixels: int) -> int:
    """Choose the side of a tile for an image of this many pixels; 0 for no strips."""
    return (TILE if pixels > WHOLE_PIXELS else 0) if tile is None else tile


def _is_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no value of any tensor is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _one_by_one(direction: Direction, vae: nn.Module, given: Tensor, tile: int, graphs: Graphs | None) -> list[Tensor]:
    """Run a VAE over a batch item by item, so that memory stays flat; return its outputs in float32."""
    items = given.to(next(vae.parameters())).split(1)
    run = _way(direction, vae, items[0], tile, graphs)
    return [torch.cat(columns).float() for columns in zip(*map(run, items), strict=True)]


def _way(direction: Direction, vae: nn.Module, item: Tensor, tile: int, graphs: Graphs | None) -> _Run:
    """Choose how a VAE runs: in strips, as a captured graph, or called."""
    if not isinstance(vae, VAE) or not tiling.can_run(vae, item):
        return lambda one: vae(one, direction)
    if tile:
        return lambda one: tiling.RUNS[direction](vae, one, tile)
    if direction == "decode" and graphs is not None and graphs.can_capture([item]):
        key = f"decoder {Places(vae).key}"
        return lambda one: [graphs(key, lambda varying, _: vae.decoder(varying[0]), [vae.unscaled(one)], ())]
    return lambda one: vae(one, direction)
