"""The registry of samplers: each name stands for a step rule, its spacings and its end point."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sdinpaint.checks import check_choice
from sdinpaint.errors import SettingError, said
from sdinpaint.families import ScheduleConfig
from sdinpaint.sampling import samplers, schedules

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Spacing:
    """One way to space the steps of a sampler: `sigmas(train_sigmas, steps, end=...)`, and its initial scale."""

    sigmas: Callable[..., Tensor]
    unit_variance: bool = True
    """Whether noise is scaled to unit variance, see `schedules.start`."""
    takes_offset: bool = False
    """Whether the family's `steps_offset` applies."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The meaning of a sampler's name: a step rule, its spacings and its end point."""

    run: samplers.SamplerFunction
    eta: float
    """The default."""
    stochastic: bool
    """Whether eta may be above 0, and `noise` is then needed."""
    spacing: str
    """The default, one of `spacings`."""
    spacings: Mapping[str, Spacing]
    aliases: tuple[str, ...]
    """The names that other programs have for it: web interfaces, k-diffusion, and the classes of diffusers."""
    ends_at_zero: bool
    """Whether it ends at sigma 0 even where the family's `ScheduleConfig.end_at_zero` is false."""
    clips: bool = False
    """Whether the family's `ScheduleConfig.clip_range` applies, as it does to diffusers' scheduler of the same name."""

    def options(self, config: ScheduleConfig) -> dict[str, Any]:
        """Return the arguments of `run` that a noise schedule decides.

        Args:
            config: noise schedule of the family.

        Returns:
            Name -> value, for the keywords of `run`.
        """
        return {} if config.clip_range is None or not self.clips else {"clip_range": config.clip_range}


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
        run=samplers.ddim,
        eta=0.0,
        stochastic=True,
        spacing="leading",
        spacings=_DDIM_SPACINGS,
        aliases=("DDIM", "DDIMScheduler"),
        ends_at_zero=False,
        clips=True,
    ),
    "euler": Sampler(
        run=samplers.euler,
        eta=0.0,
        stochastic=True,
        spacing="leading",
        spacings=_EULER_SPACINGS,
        aliases=("Euler", "k_euler", "sample_euler", "EulerDiscreteScheduler"),
        ends_at_zero=True,
    ),
    "euler_ancestral": Sampler(
        run=samplers.euler_ancestral,
        eta=1.0,
        stochastic=True,
        spacing="leading",
        spacings=_EULER_SPACINGS,
        aliases=("Euler a", "k_euler_a", "sample_euler_ancestral", "EulerAncestralDiscreteScheduler"),
        ends_at_zero=True,
    ),
    "dpmpp_2m": Sampler(
        run=samplers.dpmpp_2m,
        eta=0.0,
        stochastic=False,
        spacing="linspace",
        spacings=_DPM_SPACINGS,
        aliases=("DPM++ 2M", "dpm_2m", "k_dpmpp_2m", "sample_dpmpp_2m", "DPMSolverMultistepScheduler"),
        ends_at_zero=True,
    ),
}


_SPACING_SUFFIXES = {"karras": "karras", "k": "karras"}
"""The last word of a name that says how the steps are spaced: "DPM++ 2M Karras", dpmpp_2m_k."""


def resolve(sampler: object, spacing: str | None = None) -> tuple[str, str]:
    """Translate a sampler's name, ours or another program's, to the names of the registry.

    Args:
        sampler: a name in `SAMPLERS`, or one of its `aliases`, in any spelling of case, spaces and dashes; a last word
            "Karras" names the spacing.
        spacing: a name in the sampler's `spacings`; None for the one that the name says, or the sampler's own.

    Returns:
        The names of the sampler and the spacing.

    Raises:
        SettingError: a name is unknown; it suggests the closest one.
    """
    name, implied = _split(sampler)
    if name is None:
        known = [*SAMPLERS, *(alias for one in SAMPLERS.values() for alias in one.aliases)]
        spellings = {_spelling(one): one for one in reversed(known)}
        close = difflib.get_close_matches(_spelling(said(sampler)), spellings, n=1)
        hint = f"did you mean {spellings[close[0]]!r}?" if close else ""
        expected = "one of " + ", ".join(SAMPLERS)
        raise SettingError("SETTING_SAMPLER", "sampler", said(sampler), expected=expected, hint=hint)
    if spacing is not None:
        check_choice("spacing", spacing, SAMPLERS[name].spacings)
        if implied not in (None, spacing):
            found, hint = f"{said(spacing)} beside the sampler {said(sampler)}", "give one of the two"
            raise SettingError("SETTING_SPACING", "spacing", found, expected=f"{implied!r}, or nothing", hint=hint)
    return name, spacing or implied or SAMPLERS[name].spacing


def _split(sampler: object) -> tuple[str | None, str | None]:
    """Return the name in the registry and the spacing that a name says; None for what it does not say."""
    if not isinstance(sampler, str):
        return None, None
    if sampler in SAMPLERS:
        return sampler, None
    names = {_spelling(alias): name for name, one in SAMPLERS.items() for alias in (name, *one.aliases)}
    words = re.split(r"[\s_-]+", sampler.strip())
    spacing = _SPACING_SUFFIXES.get(words[-1].lower()) if len(words) > 1 else None
    base = sampler if spacing is None else " ".join(words[:-1])
    return names.get(_spelling(base)), spacing


def _spelling(name: str) -> str:
    """Return a name without what programs write differently: case, spaces, dashes, and "++" for "pp"."""
    return re.sub(r"[\s_-]", "", name.lower().replace("++", "pp"))


def find_sampler(name: str) -> Sampler:
    """Find the entry of `SAMPLERS` for a name.

    Args:
        name: name of the sampler, also another program's.

    Returns:
        The entry.

    Raises:
        SettingError: the name is unknown; it suggests the closest one.
    """
    return SAMPLERS[resolve(name)[0]]


def find_spacing(sampler: str, spacing: str | None = None) -> Spacing:
    """Find a spacing of a sampler.

    Args:
        sampler: name of the sampler, also another program's.
        spacing: name of the spacing; None for the sampler's own.

    Returns:
        The spacing.

    Raises:
        SettingError: a name is unknown; it lists the names.
    """
    name, spacing = resolve(sampler, spacing)
    return SAMPLERS[name].spacings[spacing]


def schedule(sampler: str, spacing: str | None, config: ScheduleConfig, steps: int) -> Tensor:
    """Compute the noise levels of a run.

    Args:
        sampler: name of the sampler.
        spacing: name of the spacing; None for the sampler's own.
        config: noise schedule of the family.
        steps: number of steps.

    Returns:
        Noise levels, falling (steps + 1,).

    Raises:
        SettingError: a name is unknown, or `steps` is out of its bounds.
    """
    found = find_spacing(sampler, spacing)
    sigmas = schedules.train_sigmas(config)
    end = 0.0 if find_sampler(sampler).ends_at_zero or config.end_at_zero else float(sigmas[0])
    options = {"steps_offset": config.steps_offset} if found.takes_offset else {}
    return found.sigmas(sigmas, steps, end=end, **options)
