"""Noise levels: which sigmas a run visits, how it starts and how it ends.

Everything is written in x = x0 + sigma * noise. Sigmas are CPU float64, so that reading them never waits for a device.
A spacing is a function (train_sigmas, steps) -> sigmas (steps + 1,), strictly falling; the last one is the end point.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sdinpaint.checks import check_number, check_tensor, check_whole
from sdinpaint.errors import SettingError, said
from sdinpaint.families import ScheduleConfig
from sdinpaint.on_demand import OnDemand

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = OnDemand("torch")


def train_sigmas(schedule: ScheduleConfig) -> Tensor:
    """Compute the noise level at every training index.

    Args:
        schedule: noise schedule of the training.

    Returns:
        sigma at t = 0, 1, ..., rising, CPU float64 (train_steps,).

    Source: Ho et al. 2020, eq. 4; betas linear in their square roots as in CompVis/latent-diffusion
    ldm/modules/diffusionmodules/util.py make_beta_schedule("linear").
    """
    roots = torch.linspace(
        schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.train_steps, dtype=torch.float64, device="cpu"
    )
    alphas_cumprod = torch.cumprod(1 - roots**2, dim=0)
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def leading(train_sigmas: Tensor, steps: int, *, steps_offset: int = 1, spare: int = 0, end: float = 0.0) -> Tensor:
    """Space steps by multiples of train_steps // steps, plus an offset, as DDIM and the released configs do.

    The largest sigmas of training are not visited.

    Args:
        train_sigmas: noise levels of training, rising (train_steps,).
        steps: number of steps.
        steps_offset: training index of the last step.
        spare: further points that are spaced out, of which the lowest are left out.
        end: sigma at which the run ends.

    Returns:
        Noise levels of the run, falling (steps + 1,).

    Raises:
        SettingError: `steps` is not a whole number from 1 to train_steps.
    """
    count, steps = _counts(train_sigmas, steps)
    points = min(steps + spare, count)
    stride = count // points
    offset = min(steps_offset, count - 1 - (points - 1) * stride)
    return _ending(train_sigmas[_falling(points, steps) * stride + offset], end)


def linspace(train_sigmas: Tensor, steps: int, *, whole: bool = False, spare: int = 0, end: float = 0.0) -> Tensor:
    """Space steps evenly in t, from the last trained one to 0.

    Args:
        train_sigmas: noise levels of training, rising (train_steps,).
        steps: number of steps.
        whole: whether each t is rounded to one that was trained.
        spare: further points that are spaced out, of which the lowest are left out.
        end: sigma at which the run ends.

    Returns:
        Noise levels of the run, falling (steps + 1,).

    Raises:
        SettingError: `steps` is not a whole number from 1 to train_steps.
    """
    count, steps = _counts(train_sigmas, steps)
    points = min(steps + spare, count)
    stride = (count - 1) / max(points - 1, 1)
    t = _falling(points, steps).double() * stride  # counted from 0 as numpy.linspace does: its rounding decides ties
    t[0] = count - 1
    if whole:
        t = t.round()
    below = t.floor().long().clamp(max=count - 2)
    return _ending(torch.lerp(train_sigmas[below], train_sigmas[below + 1], t - below), end)


def trailing(train_sigmas: Tensor, steps: int, *, end: float = 0.0) -> Tensor:
    """Space steps by multiples of train_steps / steps, counted down from the last t.

    Args:
        train_sigmas: noise levels of training, rising (train_steps,).
        steps: number of steps.
        end: sigma at which the run ends.

    Returns:
        Noise levels of the run, falling (steps + 1,).

    Raises:
        SettingError: `steps` is not a whole number from 1 to train_steps.

    Source: Lin et al. 2023, table 2.
    """
    count, steps = _counts(train_sigmas, steps)
    stride = (count - count / steps) - count  # as numpy.arange computes it: its rounding decides ties
    t = (count + torch.arange(steps, dtype=torch.float64, device="cpu") * stride).round().long() - 1
    return _ending(train_sigmas[t], end)


def karras(train_sigmas: Tensor, steps: int, *, rho: float = 7.0, end: float = 0.0) -> Tensor:
    """Space steps evenly in sigma ** (1 / rho) over the whole trained range.

    Args:
        train_sigmas: noise levels of training, rising (train_steps,).
        steps: number of steps.
        rho: the higher, the more steps at low noise.
        end: sigma at which the run ends.

    Returns:
        Noise levels of the run, falling (steps + 1,).

    Raises:
        SettingError: `steps` is not a whole number from 1 to train_steps.

    Source: Karras et al. 2022, eq. 5.
    """
    _, steps = _counts(train_sigmas, steps)
    rho = check_number("rho", rho, 0.1, 100)
    highest, lowest = train_sigmas[-1], train_sigmas[0]
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
    sigmas = torch.lerp(highest ** (1 / rho), lowest ** (1 / rho), ramp) ** rho
    sigmas[-1] = lowest  # the power does not return exactly where it came from
    sigmas[0] = highest
    return _ending(sigmas, end)


def start(noise: Tensor, sigmas: Tensor, *, unit_variance: bool = True) -> Tensor:
    """Scale unit noise to the first noise level of a run.

    Args:
        noise: unit noise (B, 4, H, W).
        sigmas: noise levels of the run (n + 1,).
        unit_variance: noise * sqrt(1 + sigma^2), which the input scaling makes unit variance, as in training; False for
            noise * sigma, which is 0.2% less.

    Returns:
        The start x (B, 4, H, W).
    """
    sigma = float(sigmas[0])
    return noise * (math.hypot(1, sigma) if unit_variance else sigma)


def start_from(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Add noise to latents, where a run of strength < 1 begins.

    Args:
        latents: latents of an image (B, 4, H, W).
        noise: unit noise (B, 4, H, W).
        sigmas: noise levels of the run (n + 1,).

    Returns:
        The start x at sigmas[0] (B, 4, H, W).
    """
    return latents + float(sigmas[0]) * noise


def finish(x: Tensor, sigmas: Tensor) -> Tensor:
    """Turn x at the end point into latents; a run that ends above zero keeps a trace of noise, as DDIM does.

    Args:
        x: noisy latents at sigmas[-1] (B, 4, H, W).
        sigmas: noise levels of the run (n + 1,).

    Returns:
        Latents (B, 4, H, W).
    """
    return x / math.hypot(1, float(sigmas[-1]))


def steps_run(steps: int, strength: float) -> int:
    """Count the steps that a strength leaves of a run: steps * strength, rounded down, but at least one.

    Args:
        steps: number of steps of the whole run.
        strength: share of them, from 0 to 1.

    Returns:
        The number of steps that run.
    """
    return max(1, math.floor(steps * strength + 1e-9))  # 50 * 0.58 is 28.999999999999996


def for_strength(sigmas: Tensor, strength: float) -> Tensor:
    """Slice a schedule to its last `steps_run` steps.

    Args:
        sigmas: noise levels of the whole run (n + 1,).
        strength: share of the steps, above 0 and at most 1.

    Returns:
        The last noise levels.

    Raises:
        SettingError: the strength is out of its bounds.
    """
    if check_number("strength", strength, 0, 1) == 0:
        raise SettingError("SETTING_STRENGTH", "strength", said(strength), expected="a number above 0, at most 1")
    steps = len(sigmas) - 1
    return sigmas[steps - steps_run(steps, strength) :]


def step_at(sigmas: Tensor, sigma: float) -> int:
    """Find a step by its noise level.

    Args:
        sigmas: noise levels of the run, falling (n + 1,).
        sigma: noise level at which a step starts, or which it passes.

    Returns:
        Index of the step.
    """
    return max(int((sigmas[:-1] >= sigma).sum()), 1) - 1


def is_between(sigmas: Tensor, sigma: float, start: float, end: float) -> bool:
    """Tell whether the step at `sigma` lies within a share of the run.

    Args:
        sigmas: noise levels of the run, falling (n + 1,).
        sigma: noise level at which a step starts, or which it passes.
        start: share of the steps before the part begins.
        end: share of the steps after which the part ends.

    Returns:
        True for step i if i / n >= start and (i + 1) / n <= end.
    """
    steps, step = len(sigmas) - 1, step_at(sigmas, sigma)
    return step / steps >= start and (step + 1) / steps <= end


def timestep(train_sigmas: Tensor, sigma: float) -> float:
    """Find the training index of a noise level.

    Args:
        train_sigmas: noise levels of training, rising (train_steps,).
        sigma: a noise level.

    Returns:
        t, exact where sigma was trained, log-linear in between, clamped to the ends.
    """
    above = int(torch.searchsorted(train_sigmas, train_sigmas.new_tensor(sigma)))
    if above == 0:
        return 0.0
    if above == len(train_sigmas):
        return float(above - 1)
    low, high = train_sigmas[above - 1 : above + 1].tolist()
    return above - math.log(high / sigma) / math.log(high / low)


def _counts(train_sigmas: Tensor, steps: int) -> tuple[int, int]:
    """Count the trained noise levels, and the steps, a whole number of at most that."""
    count = len(check_tensor("train_sigmas", train_sigmas, "(T)"))
    return count, check_whole("steps", steps, 1, count)


def _falling(points: int, steps: int) -> Tensor:
    """Return points - 1, points - 2, ..., the first `steps` of them."""
    return torch.arange(points - 1, points - 1 - steps, -1, dtype=torch.int64, device="cpu")


def _ending(sigmas: Tensor, end: float) -> Tensor:
    """Append the end point: `end`, or 0 where the sigmas already reach that low and a last step would do nothing."""
    end = check_number("end", end, 0)
    last = end if end < float(sigmas[-1]) else 0.0
    return torch.cat([sigmas, sigmas.new_tensor([last])])
