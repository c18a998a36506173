"""Running an autoencoder over a batch: large pictures in bands, in float32 on overflow, and never on to NaN."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sdinpaint.errors import NumericError, warn
from sdinpaint.models import tiling
from sdinpaint.models.layers import is_plain
from sdinpaint.models.vae import Direction
from sdinpaint.models.weights import Snapshot, all_weights

__all__ = ["TILE", "WHOLE_PIXELS", "Autoencoding"]

WHOLE_PIXELS = 1024 * 1024
"""What runs at once; larger pictures run in bands, which takes less memory and more time."""
TILE = 256
"""Height and width of a square of as many pixels as a band has."""

_WIDENING = threading.Lock()


class Autoencoding:
    """`encode` and `decode` of one VAE; what has overflowed once goes straight to a float32 copy from then on.

    SDXL's official autoencoder overflows in float16. Why float32 and not bfloat16, which has the same range: its 8 bits
    would show as steps in a sky, CPUs and older GPUs are slow at it, and an autoencoder runs but two or three times.

    `tile`: in bands of tile * tile pixels, see `models.tiling`; 0 at once; None at once up to WHOLE_PIXELS. A VAE that
    is wrapped, hooked or adapted, or through which gradients are needed, runs at once in any case.
    """

    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae
        self._wide: tuple[nn.Module, Snapshot] | None = None
        # of each direction by itself, so that the other one's results stay the same
        self._overflowed: set[tuple[str, torch.dtype, torch.device]] = set()

    def encode(self, image: Tensor, *, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """image (B, 3, 8H, 8W) -> float32 mean and standard deviation of the latents. Raises: NumericError."""
        mean, std = self._run("encode", image, _tile(tile, image.shape[-2:].numel()))
        return mean, std

    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Latents (B, 4, H, W) -> image float32 (B, 3, 8H, 8W). Raises: NumericError."""
        return self._run("decode", latents, _tile(tile, 64 * latents.shape[-2:].numel()))[0]

    def _run(self, what: Direction, given: Tensor, tile: int) -> list[Tensor]:
        weight = next(self.vae.parameters())
        case = what, weight.dtype, weight.device
        outputs = _one_by_one(what, self._widened(*case) if case in self._overflowed else self.vae, given, tile)
        finite = _is_finite(outputs)
        if not finite and weight.dtype != torch.float32 and _is_finite([given]):
            outputs = _one_by_one(what, self._widened(*case), given, tile)
            finite = _is_finite(outputs)
        if not finite:
            bad = sum(int((~output.isfinite()).sum()) for output in outputs)
            found = f"{bad} of {sum(output.numel() for output in outputs)} {what}d values are NaN or infinite"
            code, hint = f"NUMERIC_{what.upper()}", "load with dtype='float32', or with another autoencoder: vae=..."
            raise NumericError(code, "vae", found, expected="finite values", hint=hint)
        return outputs

    def _widened(self, what: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The float32 copy; the first time it is needed, with a warning. One for all threads."""
        with _WIDENING:
            if (what, dtype, device) not in self._overflowed:
                message = f"the autoencoder overflowed in {dtype}; the picture is {what}d in float32 instead"
                warn(message)
                self._overflowed.add((what, dtype, device))
            if self._wide is None or not is_plain(self.vae) or not self._wide[1].holds(all_weights(self.vae)):
                # a copy: another thread may be using the autoencoder
                snapshot = Snapshot(all_weights(self.vae))
                self._wide = copy.deepcopy(self.vae).float(), snapshot
            return self._wide[0]


def _tile(asked: int | None, pixels: int) -> int:
    """The tile for a picture of that many pixels; 0 for none."""
    return (TILE if pixels > WHOLE_PIXELS else 0) if asked is None else asked


def _is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values of all tensors are neither NaN nor infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _one_by_one(what: Direction, vae: nn.Module, given: Tensor, tile: int) -> list[Tensor]:
    """Run a VAE over a batch, item after item, so that memory stays flat -> its outputs in float32."""
    weight = next(vae.parameters())
    run = tiling.RUNS[what] if tile and tiling.can_run(vae, given) else None
    parts = [run(vae, one, tile) if run else vae(one, what) for one in given.to(weight).split(1)]
    return [torch.cat(columns).float() for columns in zip(*parts, strict=True)]
