"""Classifier-free guidance: one prediction from that for the prompt and that for the negative prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sdinpaint.checks import check_number
from sdinpaint.errors import SettingError
from sdinpaint.sampling import schedules

__all__ = ["Guidance", "guide", "rescale_guidance"]


def guide(uncond: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
    """Extrapolate from the prediction for the negative prompt through that for the prompt.

    Args:
        uncond: network output for the negative prompt (B, 4, H, W).
        cond: network output for the prompt (B, 4, H, W).
        scale: guidance scale; 1 gives `cond`.

    Returns:
        The guided output (B, 4, H, W).

    Source: Ho and Salimans 2022, Classifier-Free Diffusion Guidance, eq. 6.
    """
    return uncond + scale * (cond - uncond)


def rescale_guidance(cond: Tensor, guided: Tensor, phi: float) -> Tensor:
    """Give the guided prediction the standard deviation of `cond`, as far as `phi` says: less overexposure.

    Args:
        cond: network output for the prompt (B, 4, H, W).
        guided: guided output (B, 4, H, W).
        phi: from 0, which changes nothing, to 1.

    Returns:
        The rescaled output (B, 4, H, W).

    Source: Lin et al. 2023, Common Diffusion Noise Schedules and Sample Steps are Flawed, eq. 15 and 16.
    """
    over = tuple(range(1, cond.ndim))
    ratio = cond.std(over, keepdim=True) / guided.std(over, keepdim=True)
    return guided * (phi * ratio + (1 - phi))


@dataclass(frozen=True)
class Guidance:
    """How a run is guided, and in which of its steps.

    Args:
        scale: guidance scale; 1 is no guidance.
        rescale: phi of `rescale_guidance`.
        start: share of the steps before guidance begins: step i of n is guided if i / n >= start and
            (i + 1) / n <= end.
        end: share of the steps after which it ends; in all other steps the prompt's prediction is taken as it is.

    Raises:
        SettingError: one of them is not finite or out of its bounds.
    """

    scale: float = 7.5
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "scale", check_number("guidance_scale", self.scale, code="SETTING_GUIDANCE"))
        put(self, "rescale", check_number("guidance_rescale", self.rescale, 0, 1))
        put(self, "start", check_number("guidance_start", self.start, 0, 1))
        put(self, "end", check_number("guidance_end", self.end, 0, 1))
        if self.start >= self.end:
            found = f"{self.start:g}, and guidance_end is {self.end:g}"
            raise SettingError("SETTING_GUIDANCE_START", "guidance_start", found, expected="less than guidance_end")

    @property
    def is_always_on(self) -> bool:
        """True where every step is guided."""
        return (self.start, self.end) == (0, 1)

    def is_on(self, sigma: float, sigmas: Tensor | None) -> bool:
        """Tell whether the step at `sigma` is guided.

        Args:
            sigma: noise level of the step.
            sigmas: noise levels of the run, falling (n + 1,).

        Returns:
            True within [start, end].

        Raises:
            SettingError: only a part of the steps is to be guided, and `sigmas` is None.
        """
        if self.is_always_on:
            return True
        if sigmas is None:
            found, expected = "a part of the steps, without sigmas=", "sigmas=, the noise levels of the run"
            raise SettingError("SETTING_GUIDANCE_START", "guidance_start, guidance_end", found, expected=expected)
        return schedules.is_between(sigmas, sigma, self.start, self.end)

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
        """Guide with `scale`, which is this guidance's own, perhaps as a tensor on the device.

        Args:
            uncond: network output for the negative prompt (B, 4, H, W).
            cond: network output for the prompt (B, 4, H, W).
            scale: guidance scale.

        Returns:
            The guided output (B, 4, H, W).
        """
        guided = guide(uncond, cond, scale)
        return guided if self.rescale == 0 else rescale_guidance(cond, guided, self.rescale)
