"""Prompts of a request: texts, or conditioning that was encoded before."""

from __future__ import annotations

from typing import Any

from sdinpaint.checks import as_list, check_number, check_prompt, check_tensor
from sdinpaint.errors import SettingError
from sdinpaint.families import Family
from sdinpaint.sampling import Conditioning

__all__ = ["checked_prompt", "require_model_fits", "split_prompts"]


def split_prompts(name: str, prompt: Any) -> list[Any]:
    """Return one prompt per image, or one for all; a conditioning of several images is one for each.

    Args:
        name: name of the argument.
        prompt: what was given for it.

    Returns:
        The prompts.

    Raises:
        SettingError: a conditioning that no model can have encoded.
    """
    if isinstance(prompt, Conditioning):
        _require_sound(name, prompt)
        return [prompt[index : index + 1] for index in range(len(prompt))]
    return as_list(prompt)


def checked_prompt(name: str, prompt: Any) -> str | Conditioning:
    """Check the prompt of one image.

    Args:
        name: name of the argument.
        prompt: what was given for it.

    Returns:
        The prompt.

    Raises:
        SettingError: it is neither a text nor a sound conditioning of one image.
    """
    if not isinstance(prompt, Conditioning):
        return check_prompt(name, prompt)
    _require_sound(name, prompt)
    if len(prompt) != 1:
        found, hint = f"a conditioning of {len(prompt)} images", "give it alone, or slice it: conditioning[:1]"
        raise SettingError("SETTING_CONDITIONS", name, found, expected="one for each image", hint=hint)
    return prompt


def _require_sound(name: str, given: Conditioning) -> None:
    """Refuse a conditioning that no model can have encoded. Raises: SettingError."""

    def check(what: str, value: Any, axes: str) -> None:
        check_tensor(f"{name}: {what}", value, axes, finite=True, code="SETTING_CONDITIONS")

    check("context", given.context, "(B, L, D)")
    count = len(given.context)
    if given.vector is not None:
        check("vector", given.vector, f"({count}, V)")
    if not isinstance(given.others, tuple) or not all(isinstance(one, tuple) and len(one) == 2 for one in given.others):
        expected = "a tuple of pairs of a tensor (B, L, D) and its weight"
        raise SettingError("SETTING_CONDITIONS", name, f"others: {given.others!r:.60}", expected=expected)
    for source, weight in given.others:
        check("others", source, f"({count}, L, D)")
        check_number("weight of a source", weight, code="SETTING_CONDITIONS", of=name)


def require_model_fits(given: Conditioning, family: Family) -> None:
    """Refuse a conditioning that another model has encoded.

    Args:
        given: the conditioning.
        family: family of the model that is to run it.

    Raises:
        SettingError: its width, or whether it has a pooled vector, is another one.
    """
    has_vector = given.vector is not None
    widths = {source.shape[-1] for source in (given.context, *(other for other, _ in given.others))}
    width = next((one for one in widths if one != family.unet.context_dim), family.unet.context_dim)
    if width != family.unet.context_dim or has_vector != (family.unet.vector_dim is not None):
        found = f"conditioning of width {width} {'with' if has_vector else 'without'} a pooled vector"
        wanted = "without" if family.unet.vector_dim is None else "with"
        expected = f"width {family.unet.context_dim} {wanted} one, as {family.name} takes it"
        hint = "encode prompts with the pipeline that runs them"
        raise SettingError("SETTING_CONDITIONS", "prompt", found, expected=expected, hint=hint)
