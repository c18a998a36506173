"""The samplers by the names that users know: a step rule, its spacings and its end point each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sdinpaint.checks import check_name
from sdinpaint.families import ScheduleConfig
from sdinpaint.sampling import samplers, schedules


@dataclass(frozen=True, kw_only=True)
class Spacing:
    """One way to space the steps of a sampler: `sigmas(train_sigmas, steps, end=...)`, and its initial scale."""

    sigmas: Callable[..., Tensor]
    unit_variance: bool = True
    """As in `schedules.start`."""
    takes_offset: bool = False
    """Whether the family's `steps_offset` applies."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What a user-facing sampler name stands for: a step rule, its spacings and its end point."""

    run: samplers.SamplerFunction
    eta: float
    """The default."""
    stochastic: bool
    """Whether eta may be above 0, and `noise` is then needed."""
    spacing: str
    """The default, one of `spacings`."""
    spacings: Mapping[str, Spacing]
    ends_at_zero: bool
    """Whether it ends at sigma 0 even where the family's `ScheduleConfig.end_at_zero` is false."""


# Spacing names mean what they mean in diffusers' scheduler of the same name: each has its own rounding, spare points
# and initial scale (scheduling_ddim.py, scheduling_euler_discrete.py, scheduling_dpmsolver_multistep.py, 0.42).
_DDIM_SPACINGS = {
    "leading": Spacing(sigmas=schedules.leading, takes_offset=True),
    "linspace": Spacing(sigmas=partial(schedules.linspace, whole=True)),
    "trailing": Spacing(sigmas=schedules.trailing),
    "karras": Spacing(sigmas=schedules.karras),
}
_EULER_SPACINGS = {
    "leading": Spacing(sigmas=schedules.leading, takes_offset=True),
    "linspace": Spacing(sigmas=schedules.linspace, unit_variance=False),
    "trailing": Spacing(sigmas=schedules.trailing, unit_variance=False),
    "karras": Spacing(sigmas=schedules.karras, unit_variance=False),
}
_DPM_SPACINGS = {
    "leading": Spacing(sigmas=partial(schedules.leading, spare=1), takes_offset=True),
    "linspace": Spacing(sigmas=partial(schedules.linspace, whole=True, spare=1)),
    "trailing": Spacing(sigmas=schedules.trailing),
    "karras": Spacing(sigmas=schedules.karras),
}

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(
        run=samplers.ddim, eta=0.0, stochastic=True, spacing="leading", spacings=_DDIM_SPACINGS, ends_at_zero=False
    ),
    "euler": Sampler(
        run=samplers.euler, eta=0.0, stochastic=True, spacing="leading", spacings=_EULER_SPACINGS, ends_at_zero=True
    ),
    "euler_ancestral": Sampler(
        run=samplers.euler_ancestral,
        eta=1.0,
        stochastic=True,
        spacing="leading",
        spacings=_EULER_SPACINGS,
        ends_at_zero=True,
    ),
    "dpmpp_2m": Sampler(
        run=samplers.dpmpp_2m, eta=0.0, stochastic=False, spacing="linspace", spacings=_DPM_SPACINGS, ends_at_zero=True
    ),
}


def find_sampler(name: str) -> Sampler:
    """The entry of `SAMPLERS`. Raises: SettingError that lists the names."""
    check_name("SETTING_SAMPLER", "sampler", name, SAMPLERS)
    return SAMPLERS[name]


def find_spacing(sampler: str, spacing: str | None = None) -> Spacing:
    """A sampler's spacing, its default where None. Raises: SettingError that lists the names."""
    found = find_sampler(sampler)
    if spacing is None:
        spacing = found.spacing
    check_name("SETTING_SPACING", "spacing", spacing, found.spacings)
    return found.spacings[spacing]


def schedule(sampler: str, spacing: str | None, config: ScheduleConfig, steps: int) -> Tensor:
    """The sigmas (steps + 1,) of a sampler and a spacing (its default where None) for one family."""
    found = find_spacing(sampler, spacing)
    sigmas = schedules.train_sigmas(config)
    end = 0.0 if find_sampler(sampler).ends_at_zero or config.end_at_zero else float(sigmas[0])
    options = {"steps_offset": config.steps_offset} if found.takes_offset else {}
    return found.sigmas(sigmas, steps, end=end, **options)
