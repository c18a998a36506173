"""denoise(x, sigma) -> x0 from a UNet: the one place that knows what a UNet is fed and what its output means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdinpaint.errors import SettingError
from sdinpaint.families import Prediction
from sdinpaint.sampling import schedules
from sdinpaint.sampling.samplers import Denoise

UNetFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, Sequence[Tensor] | None], Tensor]
"""unet(x (B, C, H, W), t (B,), context (B, L, D), vector (B, V) | None, control | None) -> (B, 4, H, W)."""

ControlFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Sequence[Tensor] | None]
"""control(x (B, 4, H, W) as the UNet sees it, t (B,), context, vector, sigma) -> residuals; None where it is off."""


@dataclass(frozen=True)
class Conditioning:
    """What the text says: `context` (B, L, D), and for XL `vector` (B, V)."""

    context: Tensor
    vector: Tensor | None = None


@dataclass(frozen=True)
class Known:
    """What the picture says: `mask` (B, 1, H, W), 1 = repaint; `masked_latents` and `latents` (B, 4, H, W).

    `latents` are those of the whole picture, encoded where strength < 1 or a 4-channel model needs them.
    """

    mask: Tensor
    masked_latents: Tensor
    latents: Tensor | None = None


class Denoiser:
    """A UNet seen as denoise(x, sigma) -> x0, with guidance in one batch of 2 B ordered [uncond, cond].

    `extra` is (mask, masked_latents) for a 9-channel model, None for a 4-channel one. `control` gives a ControlNet's
    residuals. x keeps its own dtype; the UNet
    runs in `dtype`. A batch is B, not 2 B, where guidance_scale is 1 or `uncond` is None.
    Conditions of batch 1 serve every item of x.

    Raises: SettingError where the two conditions differ in shape or guidance_scale is not finite.
    """

    def __init__(
        self,
        unet: UNetFunction,
        train_sigmas: Tensor,
        prediction: Prediction,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        *,
        guidance_scale: float = 7.5,
        extra: tuple[Tensor, Tensor] | None = None,
        control: ControlFunction | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not math.isfinite(guidance_scale):
            raise SettingError("SETTING_GUIDANCE", "guidance_scale", f"{guidance_scale!r}", expected="a finite number")
        if prediction not in _TO_X0:
            raise SettingError("SETTING_PREDICTION", "prediction", f"{prediction!r}", expected="'eps' or 'v'")
        conditions = [cond] if uncond is None or guidance_scale == 1 else [uncond, cond]
        self._unet = unet
        self._control = control
        self._train_sigmas = train_sigmas
        self._to_x0 = _TO_X0[prediction]
        self._guidance_scale = guidance_scale
        self._copies = len(conditions)
        self._dtype = dtype
        self._context = _stacked("context", [one.context for one in conditions]).to(dtype)
        vectors = [one.vector for one in conditions if one.vector is not None]
        if len(vectors) not in (0, len(conditions)):
            raise SettingError(
                "SETTING_CONDITIONS", "vector", "given for one prompt alone", expected="both, or neither"
            )
        self._vector = _stacked("vector", vectors).to(dtype) if vectors else None
        # guidance is over the text alone: both halves see the same picture
        self._extra = [] if extra is None else [torch.cat([one] * self._copies).to(dtype) for one in extra]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """x (B, 4, H, W) at `sigma` -> x0 (B, 4, H, W), in x's dtype."""
        batch = self._copies * len(x)
        # only the noisy channels are scaled; mask and masked latents enter as they were trained
        scaled = torch.cat([x / math.hypot(1, sigma)] * self._copies).to(self._dtype)
        extra = [_spread("extra channels", one, batch, self._copies) for one in self._extra]
        t = torch.full((batch,), schedules.timestep(self._train_sigmas, sigma), dtype=torch.float32, device=x.device)
        context = _spread("context", self._context, batch, self._copies)
        vector = None if self._vector is None else _spread("vector", self._vector, batch, self._copies)
        # a ControlNet sees the noisy channels alone, whatever the UNet takes
        control = None if self._control is None else self._control(scaled, t, context, vector, sigma)
        output = self._unet(torch.cat([scaled, *extra], dim=1), t, context, vector, control).to(x.dtype)
        if self._copies == 2:
            uncond, cond = output.chunk(2)
            output = uncond + self._guidance_scale * (cond - uncond)
        return self._to_x0(x, output, sigma)


def blend_known(denoise: Denoise, known: Known, noise: Tensor, sigmas: Tensor) -> Denoise:
    """Let a 4-channel model inpaint: where the mask is 0, it sees the picture under always the same `noise`.

    At sigmas[0] x is as the run's start made it. A sampler's own x is not touched, so end with `restore_known`.
    For a binary mask both together equal what diffusers does: blend x after every step, with clean latents at the last.
    """
    first = float(sigmas[0])
    latents = _whole_latents(known)

    def blended(x: Tensor, sigma: float) -> Tensor:
        if sigma < first:
            x = _keep(latents + sigma * noise, x, known.mask)
        return _keep(latents, denoise(x, sigma), known.mask)

    return blended


def restore_known(latents: Tensor, known: Known) -> Tensor:
    """Finished latents (B, 4, H, W), with the picture's own where the mask is 0."""
    return _keep(_whole_latents(known), latents, known.mask)


def _keep(kept: Tensor, repainted: Tensor, mask: Tensor) -> Tensor:
    return torch.lerp(kept.to(repainted.dtype), repainted, mask.to(repainted.dtype))


def _whole_latents(known: Known) -> Tensor:
    if known.latents is None:
        raise SettingError(
            "SETTING_KNOWN_LATENTS",
            "known.latents",
            "None",
            expected="the latents of the whole picture",
            hint="a 4-channel model keeps the known area by its latents: encode the picture with them",
        )
    return known.latents


def _eps_to_x0(x: Tensor, eps: Tensor, sigma: float) -> Tensor:
    return x - sigma * eps


def _v_to_x0(x: Tensor, v: Tensor, sigma: float) -> Tensor:
    """Source: Salimans and Ho 2022, appendix D, with alpha = 1 / sqrt(1 + sigma^2)."""
    return x / (1 + sigma**2) - (sigma / math.hypot(1, sigma)) * v


_TO_X0: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"eps": _eps_to_x0, "v": _v_to_x0}


def _stacked(what: str, parts: list[Tensor]) -> Tensor:
    """The parts one after the other along the batch; they must have one shape."""
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        raise SettingError(
            "SETTING_CONDITIONS",
            what,
            " and ".join(str(tuple(part.shape)) for part in parts) + " for the negative and the positive prompt",
            expected="one shape",
        )
    return torch.cat(parts)


def _spread(what: str, stacked: Tensor, batch: int, copies: int) -> Tensor:
    """`stacked` (batch, ...) as it is, or (copies, ...) with each one repeated for every item of a batch."""
    if len(stacked) == batch:
        return stacked
    if len(stacked) != copies:
        raise SettingError(
            "SETTING_BATCH",
            what,
            f"batch {len(stacked) // copies} beside latents of batch {batch // copies}",
            expected="the same batch, or 1",
        )
    return stacked.repeat_interleave(batch // copies, dim=0)
