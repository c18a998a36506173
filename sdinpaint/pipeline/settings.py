"""The settings of a run, checked once, before anything is computed."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from sdinpaint.checks import check_choice, check_number, check_switch, check_whole
from sdinpaint.errors import SettingError, said
from sdinpaint.images.blending import BLENDS, Blend
from sdinpaint.images.canvas import ANCHORS, EXTENDING_FILLS, OVERLAP, Anchor, ExtendingFill
from sdinpaint.images.crops import AUTO
from sdinpaint.images.fills import FILLS, Fill
from sdinpaint.images.reading import MAX_PIXELS
from sdinpaint.masks import Cover
from sdinpaint.sampling import Guidance, find_sampler, resolve, schedules
from sdinpaint.sampling.masked import ROUNDING

__all__ = ["CanvasSettings", "ControlSettings", "MaskSettings", "Regions", "SamplingSettings", "Settings"]
__all__ += ["check_seed", "common_length", "names_of", "require_no_control"]

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_BATCH = 1024

Regions = Literal["together", "each"]
COVERS, REGIONS = get_args(Cover), get_args(Regions)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How latents are sampled.

    Args:
        steps: number of sampling steps of a whole run.
        guidance_scale: weight of the prompt; 1 is no guidance.
        guidance_rescale: from 0 to 1, how far a guided prediction is given the contrast of an unguided one.
        guidance_start: share of the steps before guidance begins.
        guidance_end: share of the steps after which guidance ends.
        sampler: name in `sdinpaint.sampling.SAMPLERS`, or one that another program has for it.
        spacing: how the steps are spaced; None for the sampler's own.
        eta: stochasticity of the steps, 0 is deterministic; None for the sampler's own.
        strength: share of the steps that run, from 0 to 1.
        batch_size: images at a time; None for all that have one size.
    """

    steps: int = 30
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    sampler: str = "ddim"
    spacing: str | None = None
    eta: float | None = None
    strength: float = 1.0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        name, _ = resolve(self.sampler, self.spacing)
        _put(self, "steps", check_whole("steps", self.steps, 1, MAX_STEPS))
        guidance = Guidance(self.guidance_scale, self.guidance_rescale, self.guidance_start, self.guidance_end)
        for field, value in vars(guidance).items():
            _put(self, f"guidance_{field}", value)
        _put(self, "strength", check_number("strength", self.strength, 0, 1))
        if self.eta is not None:
            _put(self, "eta", check_number("eta", self.eta, 0))
        if self.eta and not find_sampler(name).stochastic:
            found, expected = f"{said(self.eta)} with {name}, which draws no noise", "0"
            raise SettingError("SETTING_ETA", "eta", found, expected=expected, hint="use ddim or euler_ancestral")
        if self.batch_size is not None:
            _put(self, "batch_size", check_whole("batch_size", self.batch_size, 1, MAX_BATCH))


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How a mask is read, and how the repainted hole joins the rest of the image.

    Args:
        cover: mask downsampling: a latent cell is repainted where any of its pixels is ("max"), or its first
            ("nearest").
        fill: what the hole is filled with where strength < 1.
        soft: whether gray levels of the mask are the strength of each pixel.
        crop: None shows the model the whole image; "auto" or a number of pixels shows that much around the mask.
        regions: "each" repaints separate parts of the mask one after the other.
        blend: how the hole joins the rest.
        match_color: whether colours in the hole are corrected by those around it.
        paste_back: whether pixels outside of the mask are kept bit for bit.
    """

    cover: Cover = "max"
    fill: Fill = "original"
    soft: bool = False
    crop: int | str | None = None
    regions: Regions = "together"
    blend: Blend = "none"
    match_color: bool = False
    paste_back: bool = True

    def __post_init__(self) -> None:
        for name, words in {"cover": COVERS, "fill": FILLS, "regions": REGIONS, "blend": BLENDS}.items():
            check_choice(name, getattr(self, name), words)
        for name in ("soft", "match_color", "paste_back"):
            _put(self, name, check_switch(name, getattr(self, name)))
        _put(self, "crop", _crop(self.crop))
        if not self.paste_back and (self.blend != "none" or self.match_color):
            given = "match_color" if self.match_color else "blend"
            hint = "leave paste_back on: these join the repainted pixels to those that are kept"
            raise SettingError(f"SETTING_{given.upper()}", given, "given with paste_back=False", hint=hint)


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """How far a ControlNet guides a run.

    Args:
        control_scale: weight of the ControlNet.
        control_start: share of the steps before it is active.
        control_end: share of the steps after which it is not.
    """

    control_scale: float = 1.0
    control_start: float = 0.0
    control_end: float = 1.0

    def __post_init__(self) -> None:
        _put(self, "control_scale", check_number("control_scale", self.control_scale))
        _put(self, "control_start", check_number("control_start", self.control_start, 0, 1))
        _put(self, "control_end", check_number("control_end", self.control_end, 0, 1))
        if self.control_start >= self.control_end:
            found = f"{self.control_start:g}, and control_end is {self.control_end:g}"
            raise SettingError("SETTING_CONTROL_START", "control_start", found, expected="less than control_end")


@dataclass(frozen=True, kw_only=True)
class CanvasSettings:
    """How an image is extended.

    Args:
        left: pixels to add at the left side.
        right: pixels to add at the right side.
        top: pixels to add at the top.
        bottom: pixels to add at the bottom.
        size: height and width of the extended image, instead of pixels for each side.
        anchor: where the image lies in `size`.
        overlap: pixels of the image along the new ones that are repainted too.
        fill: what the new pixels are filled with where strength < 1.
    """

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0
    size: tuple[int, int] | None = None
    anchor: Anchor = "center"
    overlap: int = OVERLAP
    fill: ExtendingFill = "edge"

    def __post_init__(self) -> None:
        check_choice("anchor", self.anchor, ANCHORS)
        check_choice("fill", self.fill, EXTENDING_FILLS)


@dataclass(frozen=True, kw_only=True)
class Settings(ControlSettings, MaskSettings, SamplingSettings):
    """All settings of a run beside its images and prompts, as they were given.

    Raises:
        SettingError: it names the setting that is wrong.
    """

    def __post_init__(self) -> None:
        for part in (SamplingSettings, MaskSettings, ControlSettings):
            part.__post_init__(self)

    def resolved(self) -> Self:
        """Return the settings with the sampler's own in place of what was not given."""
        name, spacing = resolve(self.sampler, self.spacing)
        eta = find_sampler(name).eta if self.eta is None else self.eta
        known = copy.copy(self)  # which was checked: not again
        vars(known).update(sampler=name, spacing=spacing, eta=eta)
        return known

    @property
    def given(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}

    @property
    def mask_threshold(self) -> float:
        """How white a mask must be for a pixel to be repainted: 0.5, or if soft enough to change in the last step."""
        return (1 - ROUNDING) / schedules.steps_run(self.steps, self.strength) if self.soft else 0.5


def names_of(*groups: type) -> tuple[str, ...]:
    """Return the names of the settings of one or more of the classes above.

    Args:
        groups: the classes.

    Returns:
        The names, in the order of the fields.
    """
    return tuple(one.name for group in groups for one in fields(group))


def require_no_control(settings: Settings, has_image: bool) -> None:
    """Refuse settings of a ControlNet where there is none.

    Args:
        settings: settings of a run.
        has_image: whether a conditioning image was given.

    Raises:
        SettingError: something was given that only a ControlNet uses.
    """
    given = [name for name in names_of(ControlSettings) if name in settings.given]
    given += ["control_image"] * has_image
    if given:
        hint = "load the model with controlnet=PATH"
        raise SettingError("SETTING_NO_CONTROLNET", given[0], "given without a ControlNet", hint=hint)


def check_seed(seed: Any) -> int:
    """Check a seed, or draw one.

    Args:
        seed: a whole number from 0 to 2^63 - 1; None or -1 for a drawn one.

    Returns:
        The seed.

    Raises:
        SettingError: it is another number, or none.
    """
    seed = -1 if seed is None else check_whole("seed", seed, -1, MAX_SEED)
    return secrets.randbelow(2**32) if seed == -1 else seed


def common_length(**lists: Sequence[Any]) -> int:
    """Return the one length of all lists that are not of length 1.

    Args:
        lists: lists by what they hold.

    Returns:
        That length; 1 where all are of length 1.

    Raises:
        SettingError: there are several lengths, or a list is empty.
    """
    lengths = {len(values) for values in lists.values()}
    longest = max(lengths)
    if not lengths <= {1, longest} or 0 in lengths:
        found = ", ".join(f"{len(values)} {name}" for name, values in lists.items() if len(values) != 1)
        raise SettingError("SETTING_COUNTS", "inpaint", found, expected="equal counts, or one for all")
    return longest


def _put(settings: Any, name: str, value: Any) -> None:
    object.__setattr__(settings, name, value)


def _crop(value: Any) -> int | str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return check_whole("crop", value, 0, MAX_PIXELS)
    if value != AUTO:
        expected = f"{AUTO!r}, None, or a number of pixels around the mask"
        raise SettingError("SETTING_CROP", "crop", said(value), expected=expected)
    return value
