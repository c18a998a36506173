"""Configuration and vocabulary inside of a single file, which has no folder of JSON files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sdinpaint_weights.weights import Weights

from sdinpaint.errors import CheckpointError
from sdinpaint.text.vocabulary import Vocabulary

__all__ = ["embedded", "embedded_tables", "embedded_vocabulary"]

CONFIGS = "sdinpaint.configs"
"""Metadata field with the JSON files of the diffusers layout: {relative path: table}."""
VOCABULARY = "sdinpaint.vocabulary"
"""Metadata field with a vocabulary that is not CLIP's: {"vocab": {token: id}, "merges": [[left, right], ...]}."""


def embedded(tables: Mapping[str, Mapping[str, Any]], vocabulary: Vocabulary | None) -> dict[str, str]:
    """Make the metadata by which a single file can be loaded without other files.

    Args:
        tables: the JSON files of a diffusers folder, by their path in it.
        vocabulary: a vocabulary that is not CLIP's; None for CLIP's, which is found elsewhere.

    Returns:
        Fields of a safetensors file's metadata.
    """
    fields = {CONFIGS: json.dumps(tables)}
    if vocabulary is not None:
        vocab, merges = vocabulary
        fields[VOCABULARY] = json.dumps({"vocab": dict(vocab), "merges": list(merges)})
    return fields


def embedded_tables(weights: Weights) -> Mapping[str, Mapping[str, Any]]:
    """Read the configuration in the metadata of a file.

    Args:
        weights: the opened file.

    Returns:
        The JSON files of the diffusers layout, by their path in a folder; none where there is no such field.

    Raises:
        CheckpointError: the field is damaged.
    """
    return _read(weights, CONFIGS)


def embedded_vocabulary(weights: Weights) -> Vocabulary | None:
    """Read the vocabulary in the metadata of a file.

    Args:
        weights: the opened file.

    Returns:
        Ids by token, and the merges; None where there is no such field.

    Raises:
        CheckpointError: the field is damaged.
    """
    table = _read(weights, VOCABULARY)
    if not table:
        return None
    try:
        merges = [(str(left), str(right)) for left, right in table["merges"]]
        return {str(token): int(number) for token, number in table["vocab"].items()}, merges
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(weights, VOCABULARY, repr(error)) from error


def _read(weights: Weights, name: str) -> dict[str, Any]:
    try:
        table = json.loads(weights.metadata.get(name, "{}"))
    except (ValueError, RecursionError) as error:
        raise _damaged(weights, name, str(error)) from error
    if not isinstance(table, dict) or not all(isinstance(value, dict | list) for value in table.values()):
        raise _damaged(weights, name, "no table of tables")
    return table


def _damaged(weights: Weights, name: str, found: str) -> CheckpointError:
    hint = "convert the model again, or give its configuration: config=FOLDER"
    return CheckpointError("CKPT_BAD_CONFIG", weights.path, f"metadata {name}: {found:.200}", hint=hint)
