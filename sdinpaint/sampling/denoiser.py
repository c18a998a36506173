"""denoise(x, sigma) -> x0 from a UNet: the one place that knows what a UNet is fed and what its output means."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sdinpaint.checks import as_list, check_number, check_tensor
from sdinpaint.errors import SettingError, said
from sdinpaint.families import Prediction
from sdinpaint.sampling import schedules
from sdinpaint.sampling.conditioning import Conditioning
from sdinpaint.sampling.graphs import Graphs, Tensors
from sdinpaint.sampling.guidance import Guidance
from sdinpaint.sampling.step_runner import ControlFunction, StepRunner, UNetFunction


class Denoiser:
    """A UNet as a function denoise(x, sigma) -> x0, with classifier-free guidance in one batch [uncond, cond].

    Args:
        unet: a UNet, or anything that is called like one.
        train_sigmas: trained noise levels, rising, CPU float64 (1000,).
        prediction: "eps" or "v", what the UNet predicts.
        cond: conditioning by the prompt; a batch of 1 serves every item of x.
        uncond: conditioning by the negative prompt, of any length; None for no guidance.
        guidance_scale: 1 is no guidance, and the UNet runs on B items in place of 2 B.
        guidance_rescale: phi of `rescale_guidance`.
        guidance_start: share of the steps before guidance begins; needs `sigmas`.
        guidance_end: share of the steps after which guidance ends; needs `sigmas`.
        extra: mask (B, 1, H, W) and masked latents (B, 4, H, W) for a 9-channel UNet, None for a 4-channel one.
        control: residuals of a ControlNet.
        dtype: dtype of the UNet; x keeps its own.
        sigmas: noise levels of the run (n + 1,), where they are known.
        embed_ahead: compute the embeddings of all `sigmas` at once, which spares a GPU some launches in every step.
        graphs: where steps on a GPU are captured as CUDA graphs; None captures nothing.
        using: context in which the UNet is ready to be called.

    Raises:
        SettingError: the conditions do not fit together, or guidance is out of its bounds.
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
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        extra: tuple[Tensor, Tensor] | None = None,
        control: ControlFunction | None = None,
        dtype: torch.dtype = torch.float32,
        sigmas: Tensor | None = None,
        embed_ahead: bool = True,
        graphs: Graphs | None = None,
        using: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if prediction not in _FACTORS:
            raise SettingError("SETTING_PREDICTION", "prediction", said(prediction), expected="'eps' or 'v'")
        for name, given in {"cond": cond, "uncond": uncond}.items():
            if not isinstance(given, Conditioning) and (given is not None or name == "cond"):
                expected, hint = "a Conditioning", "pipe.encode_prompts(prompts) gives one for each prompt"
                raise SettingError(
                    "SETTING_CONDITIONS", name, f"a {type(given).__name__}", expected=expected, hint=hint
                )
        self._axes = "(B, C, {}, {})".format(*(extra[0].shape[-2:] if extra else "HW"))
        self._train_sigmas, self._sigmas, self._dtype = train_sigmas, sigmas, dtype
        self._factors = _FACTORS[prediction]
        self._guidance = Guidance(guidance_scale, guidance_rescale, guidance_start, guidance_end)

        def runner(*conditions: Conditioning) -> StepRunner:
            return StepRunner(
                self._x0,
                self._constants,
                unet,
                conditions,
                extra or (),
                control=control,
                dtype=dtype,
                sigmas=sigmas if embed_ahead else None,
                graphs=graphs,
                using=using,
                key=f"rescale {guidance_rescale}",
            )

        self._runners: dict[bool, StepRunner] = {}
        """By whether a step is guided."""
        if uncond is not None and guidance_scale != 1:
            self._runners[True] = runner(uncond, cond)
        if not self._runners or not self._guidance.is_always_on:
            self._runners[False] = runner(cond)

    def __call__(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Predict the clean latents.

        Args:
            x: noisy latents at `sigma` (B, 4, H, W).
            sigma: noise level, a number, or a tensor (), (1,) or (B,) of one value.

        Returns:
            x0 (B, 4, H, W), in the dtype of x.

        Raises:
            SettingError: x is no such tensor, the items are to have different noise levels, or they fit no batch of the
                conditions.
        """
        check_tensor("x", x, self._axes)
        level = _number(sigma, len(x))
        guided = True in self._runners and self._guidance.is_on(level, self._sigmas)
        return self._runners[guided](x, level)

    def showing(self, extra: tuple[Tensor, Tensor]) -> Denoiser:
        """Return this denoiser with another mask and other masked latents of the same shapes.

        Args:
            extra: mask (B, 1, H, W) and masked latents (B, 4, H, W).

        Returns:
            A denoiser that shares what was precomputed.
        """
        other = copy.copy(self)
        other._runners = {guided: runner.showing(extra) for guided, runner in self._runners.items()}
        return other

    def _constants(self, sigma: float) -> tuple[float, ...]:
        """Return what a step at `sigma` depends on: the training index t, then the constants of `_x0`."""
        t = schedules.timestep(self._train_sigmas, sigma)
        return t, math.hypot(1, sigma), self._guidance.scale, *self._factors(sigma)

    def _x0(self, unet: Callable[[Tensor], Tensor], x: Tensor, constants: Tensor, extra: Tensors) -> Tensor:
        """Compute c_skip x + c_out unet(x / scale), guided where the UNet gives two predictions per item."""
        scale, guidance_scale, c_skip, c_out = constants
        # only the noisy channels are scaled; mask and masked latents enter as they were trained
        output = unet(torch.cat([(x / scale).to(self._dtype), *extra], dim=1)).to(x.dtype)
        if len(output) == 2 * len(x):
            uncond, cond = output.chunk(2)
            output = self._guidance(uncond, cond, guidance_scale)
        return c_skip * x + c_out * output


def _from_eps(sigma: float) -> tuple[float, float]:
    return 1.0, -sigma


def _from_v(sigma: float) -> tuple[float, float]:
    """Source: Salimans and Ho 2022, appendix D, with alpha = 1 / sqrt(1 + sigma^2)."""
    return 1 / (1 + sigma**2), -sigma / math.hypot(1, sigma)


_FACTORS: dict[str, Callable[[float], tuple[float, float]]] = {"eps": _from_eps, "v": _from_v}
"""The factors c_skip and c_out by prediction type."""


def _number(sigma: float | Tensor, batch: int) -> float:
    values = [check_number("sigma", one, 0) for one in as_list(sigma)]
    if len(values) not in (1, batch) or len(set(values)) > 1:
        found = f"{len(values)} values from {min(values, default=0):g} to {max(values, default=0):g} for {batch} items"
        hint = "call denoise for the items of each sigma by themselves"
        raise SettingError("SETTING_SIGMA", "sigma", found, expected="one value for all items", hint=hint)
    return values[0]
