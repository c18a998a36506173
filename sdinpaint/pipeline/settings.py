"""The settings of a run, checked once, before anything is computed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sdinpaint.checks import check_name, number, switch, whole_number
from sdinpaint.errors import SettingError, warn
from sdinpaint.images.blending import BLENDS
from sdinpaint.images.crops import AUTO
from sdinpaint.images.files import MAX_PIXELS
from sdinpaint.images.fills import FILLS
from sdinpaint.sampling import find_sampler, resolve, schedules
from sdinpaint.sampling.masked import ROUNDING

__all__ = ["CONTROL_ONLY", "MASK_ONLY", "Settings", "check_seed", "common_length", "require_no_control"]

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_BATCH = 1024
HIGH_GUIDANCE = 30.0


COVERS = ("max", "nearest")
REGIONS = ("together", "each")
WORDS = {"cover": COVERS, "fill": FILLS, "regions": REGIONS, "blend": BLENDS}
"""Settings that are one of some words."""
SWITCHES = ("soft", "match_color", "paste_back")
BOUNDS = {
    "guidance_scale": (-math.inf, math.inf),
    "strength": (0, 1),
    "eta": (0, math.inf),
    "control_scale": (-math.inf, math.inf),
    "control_start": (0, 1),
    "control_end": (0, 1),
}
"""Lowest and highest value of what is a number."""


CONTROL_ONLY = ("control_scale", "control_start", "control_end")
"""Settings that mean something only beside a ControlNet."""
MASK_ONLY = (
    *("cover", "fill", "soft", "crop", "regions", "blend", "match_color", "paste_back"),
    *CONTROL_ONLY,
)
"""Settings that mean something only beside a mask."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does beside its pictures and prompts; `spacing` and `eta` are the sampler's own where None was given.

    Raises: SettingError that names the setting.
    """

    steps: int
    guidance_scale: float
    sampler: str
    spacing: str | None
    eta: float | None
    strength: float
    cover: str = "max"
    fill: str = "original"
    soft: bool = False
    crop: int | str | None = None
    regions: str = "together"
    blend: str = "none"
    match_color: bool = False
    paste_back: bool = True
    batch_size: int | None = None
    control_scale: float = 1.0
    control_start: float = 0.0
    control_end: float = 1.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        name, spacing = resolve(self.sampler, self.spacing)
        put(self, "sampler", name)
        put(self, "spacing", spacing)
        sampler = find_sampler(name)
        put(self, "eta", sampler.eta if self.eta is None else self.eta)
        put(self, "steps", whole_number("steps", self.steps, 1, MAX_STEPS))
        for name, (low, high) in BOUNDS.items():
            put(self, name, number(name, getattr(self, name), low, high))
        if self.eta and not sampler.stochastic:
            found, expected = f"{self.eta!r} with {self.sampler}, which draws no noise", "0"
            raise SettingError("SETTING_ETA", "eta", found, expected=expected, hint="use ddim or euler_ancestral")
        for name, words in WORDS.items():
            check_name(f"SETTING_{name.upper()}", name, getattr(self, name), words)
        for name in SWITCHES:
            put(self, name, switch(name, getattr(self, name)))
        put(self, "crop", _crop(self.crop))
        if self.batch_size is not None:
            put(self, "batch_size", whole_number("batch_size", self.batch_size, 1, MAX_BATCH))
        if not self.paste_back and (self.blend != "none" or self.match_color):
            given = "match_color" if self.match_color else "blend"
            hint = "leave paste_back on: these join the repainted pixels to those that are kept"
            raise SettingError(f"SETTING_{given.upper()}", given, "given with paste_back=False", hint=hint)
        if self.control_start >= self.control_end:
            found = f"{self.control_start:g}, and control_end is {self.control_end:g}"
            raise SettingError("SETTING_CONTROL_START", "control_start", found, expected="less than control_end")
        if self.guidance_scale > HIGH_GUIDANCE:
            message = f"guidance_scale {self.guidance_scale:g} is very high: colours will burn out; 5 to 10 is usual"
            warn(message)

    @property
    def least(self) -> float:
        """How white a mask must be for a pixel to be repainted: 0.5, or if soft enough to change in the last step."""
        return (1 - ROUNDING) / schedules.steps_run(self.steps, self.strength) if self.soft else 0.5


def require_no_control(settings: Settings, control_image: Any) -> None:
    """Refuse what would be asked of a ControlNet where there is none. Raises: SettingError."""
    defaults = {field.name: field.default for field in fields(settings)}
    given = [name for name in CONTROL_ONLY if getattr(settings, name) != defaults[name]]
    given += ["control_image"] * (control_image is not None)
    if given:
        hint = "name one: sdinpaint.load(..., controlnet=PATH), or --controlnet PATH"
        raise SettingError("SETTING_NO_CONTROLNET", given[0], "given without a ControlNet", hint=hint)


def check_seed(seed: Any) -> int:
    """A seed from 0 to 2^63 - 1; drawn where None or -1 is given. Raises: SettingError."""
    if seed is None or (isinstance(seed, int) and seed == -1):
        return secrets.randbelow(2**32)
    return whole_number("seed", seed, 0, MAX_SEED)


def common_length(**lists: Sequence[Any]) -> int:
    """The one length of all lists that are not of length 1. Raises: SettingError naming all of them."""
    lengths = {len(values) for values in lists.values()}
    longest = max(lengths)
    if not lengths <= {1, longest} or 0 in lengths:
        found = ", ".join(f"{len(values)} {name}" for name, values in lists.items() if len(values) != 1)
        raise SettingError("SETTING_COUNTS", "inpaint", found, expected="equal counts, or one for all")
    return longest


def _crop(value: Any) -> int | str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return whole_number("crop", value, 0, MAX_PIXELS)
    if value != AUTO:
        expected = f"{AUTO!r}, None, or a number of pixels around the mask"
        raise SettingError("SETTING_CROP", "crop", f"{value!r}", expected=expected)
    return value
