"""Paths as people write them, and the JSON files at them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdinpaint_weights.door import Refusal, read_whole

from sdinpaint.errors import CheckpointError

__all__ = ["Json", "as_path", "read_json"]

MAX_JSON = 1_000_000
Json = Mapping[str, Any]


def as_path(source: str | Path) -> Path:
    """Return the path that a person writes, in which ~ is a home folder.

    Args:
        source: the path, or a name of another kind.

    Returns:
        The path.
    """
    try:
        return Path(source).expanduser()
    except RuntimeError:  # a user that does not exist
        return Path(source)


def read_json(path: Path) -> Json:
    """Read a JSON file whose top level is a table.

    Args:
        path: the file.

    Returns:
        The table; empty where there is no such file.

    Raises:
        CheckpointError: the file is not JSON, not a table, or too large.
    """
    hint = "fetch the file again, or give a folder of configurations: config=FOLDER"
    try:
        text = read_whole(path, MAX_JSON)
    except Refusal as refusal:
        if refusal.reason == "missing" and not path.is_symlink():
            return {}
        raise CheckpointError("CKPT_BAD_CONFIG", path, refusal.found, expected="a JSON file", hint=hint) from refusal
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("CKPT_BAD_CONFIG", path, f"not JSON: {error}", expected="a table", hint=hint) from error
    if not isinstance(table, dict):
        raise CheckpointError("CKPT_BAD_CONFIG", path, "not a table", expected="a table", hint=hint)
    return table
