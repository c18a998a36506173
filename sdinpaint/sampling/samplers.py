"""Samplers: from noise to latents along a schedule, given denoise(x, sigma) -> x0.

A sampler is a function `sampler(denoise, x, sigmas, *, eta=0.0, noise=None, on_step=None) -> x`:
x (B, 4, H, W) at sigmas[0] in, x at sigmas[-1] out, in x's own dtype. `noise(x)` draws unit noise shaped like x;
`on_step(step, x, x0)` is called after every step, counted from 0; a tensor that it returns takes the place of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import isawaitable
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from sdinpaint.checks import as_list, axes_of, check_call, check_number, check_tensor
from sdinpaint.errors import NumericError, SettingError, said
from sdinpaint.on_demand import OnDemand

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = OnDemand("torch")

Denoise: TypeAlias = "Callable[[Tensor, float], Tensor]"
Noise: TypeAlias = "Callable[[Tensor], Tensor]"
OnStep: TypeAlias = "Callable[[int, Tensor, Tensor], object]"
Advance: TypeAlias = "Callable[[Tensor, Tensor, float, float], Tensor]"


ON_STEP_HINT = "let on_step return None, or the new latents alone"


class SamplerFunction(Protocol):
    """The signature that every sampler has."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        *,
        eta: float = ...,
        noise: Noise | None = ...,
        on_step: OnStep | None = ...,
    ) -> Tensor:
        """Sample from x at sigmas[0] to x at sigmas[-1]."""


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    clip_range: float | None = None,
) -> Tensor:
    """Euler's method: step towards x0 in a straight line; `eta` replaces part of the noise by new noise.

    Args:
        denoise: denoise(x, sigma) -> x0.
        x: noisy latents at sigmas[0] (B, 4, H, W).
        sigmas: noise levels of the run, falling (n + 1,).
        eta: stochasticity; 0 is deterministic, 1 as much as in training.
        noise: noise(x) -> unit noise of the shape of x, for eta > 0.
        on_step: called as on_step(step, x, x0) after every step; a tensor that it returns takes the place of x.
        clip_range: largest absolute value of x0; the direction of the step stays that of the unclipped one, as in
            diffusers' DDIM.

    Returns:
        Latents at sigmas[-1] (B, 4, H, W).

    Raises:
        SettingError: eta > 0 without `noise`, or sigmas that do not fall.
        NumericError: a prediction is not finite.

    Source: Karras et al. 2022, alg. 1; crowsonkb/k-diffusion sampling.py get_ancestral_step.
    """
    _check_eta(eta, noise)

    def advance(x: Tensor, x0: Tensor, sigma: float, sigma_to: float) -> Tensor:
        fresh = min(1.0, eta * math.sqrt(1 - (sigma_to / sigma) ** 2))  # of the noise at sigma_to
        x = _towards(x0, x, sigma, sigma_to * math.sqrt(1 - fresh**2))
        if clip_range is not None:
            x = x + (x0.clamp(-clip_range, clip_range) - x0)
        if noise is None or sigma_to * fresh == 0:
            return x
        return x + sigma_to * fresh * check_tensor("noise", noise(x), axes_of(x))

    return _run(denoise, x, sigmas, advance, on_step)


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler's method with as much new noise in each step as the training process has.

    Args:
        denoise: as in `euler`.
        x: as in `euler`.
        sigmas: as in `euler`.
        eta: as in `euler`.
        noise: as in `euler`.
        on_step: as in `euler`.

    Returns:
        Latents at sigmas[-1] (B, 4, H, W).
    """
    return euler(denoise, x, sigmas, eta=eta, noise=noise, on_step=on_step)


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    clip_range: float | None = None,
) -> Tensor:
    """DDIM: divided by sqrt(alpha_cumprod), its step is that of `euler`, eta included; its schedule is in `SAMPLERS`.

    Args:
        denoise: as in `euler`.
        x: as in `euler`.
        sigmas: as in `euler`.
        eta: as in `euler`.
        noise: as in `euler`.
        on_step: as in `euler`.
        clip_range: as in `euler`.

    Returns:
        Latents at sigmas[-1] (B, 4, H, W).

    Source: Song et al. 2021, eq. 12 and 16.
    """
    return euler(denoise, x, sigmas, eta=eta, noise=noise, on_step=on_step, clip_range=clip_range)


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++ (2M): Euler's step towards an x0 that is extrapolated in log sigma from the last two predictions.

    The first step, and one to sigma 0, are Euler's.

    Args:
        denoise: as in `euler`.
        x: as in `euler`.
        sigmas: as in `euler`.
        eta: 0; this sampler adds no noise.
        noise: not used.
        on_step: as in `euler`.

    Returns:
        Latents at sigmas[-1] (B, 4, H, W).

    Raises:
        SettingError: eta is not 0.
        NumericError: a prediction is not finite.

    Source: Lu et al. 2022, DPM-Solver++, alg. 2 (multistep, midpoint).
    """
    if check_number("eta", eta, 0) != 0:
        raise SettingError(
            "SETTING_ETA",
            "eta",
            f"{said(eta)} with dpmpp_2m, which draws no noise",
            expected="0",
            hint="use ddim or euler_ancestral",
        )
    last: tuple[float, Tensor] | None = None

    def advance(x: Tensor, x0: Tensor, sigma: float, sigma_to: float) -> Tensor:
        nonlocal last
        target = x0
        if last is not None and sigma_to > 0:
            sigma_from, x0_from = last
            target = x0 + (x0 - x0_from) * (math.log(sigma / sigma_to) / (2 * math.log(sigma_from / sigma)))
        last = sigma, x0
        return _towards(target, x, sigma, sigma_to)

    return _run(denoise, x, sigmas, advance, on_step)


def _run(denoise: Denoise, x: Tensor, sigmas: Tensor, advance: Advance, on_step: OnStep | None) -> Tensor:
    """Denoise and advance along the schedule, as all samplers do."""
    path = _path(sigmas)
    check_call("on_step", on_step)
    check_tensor("x", x, "(B, C, H, W)")
    axes, dtype, device = axes_of(x), x.dtype, x.device

    for step, (sigma, sigma_to) in enumerate(pairwise(path)):
        x0 = check_tensor("denoise", denoise(x, sigma), axes)
        if not bool(torch.isfinite(x0).all()):
            raise _not_finite(x0, step, len(path) - 1, sigma)
        x = advance(x, x0, sigma, sigma_to)
        if on_step is not None:
            # a copy of x0, which later steps may need, and on_step may scale for a preview
            changed = _stepped(on_step(step, x, x0.clone()), x)
            x = check_tensor("on_step", changed, axes, finite=True, hint=ON_STEP_HINT).to(device, dtype)
    return x


def _stepped(given: object, x: Tensor) -> object:
    """Return what `on_step` gave back in place of x, or x, which it may have changed, where it gave no latents."""
    inner = given.values() if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else ()
    if isawaitable(given) or any(isinstance(one, torch.Tensor | np.ndarray) for one in inner):
        found = f"a {type(given).__name__} was returned"
        raise SettingError("SETTING_ON_STEP", "on_step", found, expected="a tensor, or None", hint=ON_STEP_HINT)
    return given if isinstance(given, torch.Tensor | np.ndarray) else x


def _towards(x0: Tensor, x: Tensor, sigma: float, sigma_to: float) -> Tensor:
    """Return the point at sigma_to on the line from x at sigma to x0 at 0."""
    return x0 + (sigma_to / sigma) * (x - x0)


def _check_eta(eta: float, noise: Noise | None) -> None:
    check_call("noise", noise)
    if check_number("eta", eta, 0) > 0 and noise is None:
        raise SettingError(
            "SETTING_NOISE",
            "noise",
            f"None with eta={eta}",
            expected="a function noise(x) that draws unit noise shaped like x",
            hint="pass noise=..., or eta=0 for a run without fresh noise",
        )


def _path(sigmas: Tensor) -> list[float]:
    """Return the sigmas as numbers, once they are known to fall strictly from a finite one to at least 0."""
    path = [check_number("sigmas", sigma) for sigma in as_list(sigmas)]
    falling = len(path) > 1 and all(high > low for high, low in pairwise(path))
    if not falling or not math.isfinite(path[0]) or path[-1] < 0:
        shown = ", ".join(f"{sigma:.4g}" for sigma in path[:4]) + (", ..." if len(path) > 4 else "")
        raise SettingError(
            "SETTING_SIGMAS",
            "sigmas",
            f"{len(path)} values: {shown}",
            expected="two or more finite sigmas, strictly falling, the last one at least 0",
            hint="sdinpaint.sampling.schedules makes such a list",
        )
    return path


def _not_finite(x0: Tensor, step: int, steps: int, sigma: float) -> NumericError:
    bad = int((~torch.isfinite(x0)).sum())
    return NumericError(
        "NUMERIC_NOT_FINITE",
        "denoiser",
        f"{bad} of {x0.numel()} predicted values are NaN or infinite at step {step + 1} of {steps} (sigma {sigma:.4g})",
        expected="finite latents",
        hint="run in float32, or check the weights with sdinpaint.inspect",
    )
