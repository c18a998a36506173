"""Names of weights that were saved from a wrapped module: compiled, parallel, sharded or checkpointed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from sdinpaint_weights.errors import CheckpointError

__all__ = ["unwrapped"]

Value = TypeVar("Value")

WRAPPER = re.compile(
    r"_orig_mod\.?"  # also where averaged (EMA) weights have lost the dots of their names
    r"|(?:^|(?<=\.))(?:module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module)\."
)
"""Matches what torch.compile, DataParallel, Lightning, FSDP and FairScale put into a name, at any depth."""


def unwrapped(entries: Mapping[str, Value], path: object) -> dict[str, Value]:
    """Take the wrappers out of names.

    Args:
        entries: name in the file -> anything.
        path: the file that errors name.

    Returns:
        Name without wrappers -> the same, in the same order.

    Raises:
        CheckpointError: two names are the same without their wrappers.
    """
    found: dict[str, Value] = {}
    for key, value in entries.items():
        name = WRAPPER.sub("", key) or key
        if name in found:
            said = f"{_with_name(entries, name)} are the same tensor {name!r}, with and without a wrapper"
            raise CheckpointError("CKPT_DUPLICATE_KEY", path, said, hint="remove one of them")
        found[name] = value
    return found


def _with_name(keys: Iterable[str], name: str) -> str:
    return " and ".join(repr(key) for key in keys if (WRAPPER.sub("", key) or key) == name)
