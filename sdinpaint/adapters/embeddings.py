"""Read textual inversions: learned vectors for words of a prompt, in every layout that programs write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from sdinpaint_weights.reader import open_weights
from sdinpaint_weights.weights import Weights
from torch import Tensor

from sdinpaint.adapters.reading import EXAMPLES, Readable, find_weights
from sdinpaint.checks import check_prompt
from sdinpaint.errors import AdapterError, CheckpointError, said
from sdinpaint.families import KINDS, Family
from sdinpaint.text.embeddings import Embedding

__all__ = ["checked_token", "embedding_of", "read_embedding"]

MOST = 75
"""Tokens of a prompt that a text encoder sees."""
LEARNED = "string_to_param."
"""Beginning of the keys of vectors in A1111's files."""
UNNAMED = ("emb_params", "clip_l", "clip_g", "text_encoders_0", "text_encoders_1", "tensor")
"""Keys that are no token: the token is the file's name."""
PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
"""Keys of the vectors of SDXL's two text encoders."""
BESIDE = ("string_to_token", "name", "step", "sd_checkpoint", "sd_checkpoint_name")
"""Beginnings of other keys in A1111's files."""
EXPECTED = "one embedding: a tensor, or clip_l and clip_g for SDXL"
INSPECT = "sdinpaint inspect says what it is"


def read_embedding(source: str | Path, token: str | None, family: Family) -> Embedding:
    """Read a textual inversion.

    Args:
        source: a file, a folder with one weights file, or a name on the hub.
        token: the word that stands for it; None is the file's own, or the file's name.
        family: the family of the model.

    Returns:
        The embedding.

    Raises:
        AdapterError: it is none, does not fit the model, is too long, or the token cannot be one.
        CheckpointError: the file cannot be read.
    """
    path, *_ = find_weights(source)
    weights = _opened(path)
    if any(key.startswith(LEARNED) for key in weights):
        keys = {key.removeprefix(LEARNED): key for key in weights if key.partition(".")[0] not in BESIDE}
        own = path.stem
    else:
        keys = {key: key for key in weights}
        own = next((key for key in keys if len(keys) == 1 and key not in UNNAMED), path.stem)
    (file,) = weights.files
    token = checked_token(own if token is None else token)
    return embedding_of(weights, keys, token, family, str(source), file.sha256())


def embedding_of(
    weights: Readable, keys: Mapping[str, str], token: str, family: Family, source: str, sha256: str
) -> Embedding:
    """Make an embedding of tensors of a file.

    Args:
        weights: the file.
        keys: what a tensor is, such as "emb_params" or "clip_l" -> its key.
        token: the word that stands for it.
        family: the family of the model.
        source: where the file was read from.
        sha256: digest of the file.

    Returns:
        The embedding.

    Raises:
        AdapterError: the tensors are no embedding, or not one for this model.
        CheckpointError: bytes are damaged.
    """
    path = weights.path
    pair = next((pair for pair in PAIRS if set(pair) & keys.keys()), None)
    chosen: Sequence[str] = list(keys) if pair is None else [name for name in pair if name in keys]
    if (pair is None and len(keys) != 1) or (pair is not None and len(chosen) < len(keys)):
        found = f"{len(keys)} tensors, e.g. {', '.join(list(keys.values())[:EXAMPLES])}"
        raise AdapterError("EMBEDDING_KIND", path, found, expected=EXPECTED, hint=INSPECT)
    widths = [text.width for text in family.texts]
    tensors = [weights.tensor(keys[name]) for name in chosen]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    for name, tensor, shape in zip(chosen, tensors, shapes, strict=True):
        if tensor.ndim not in (1, 2) or 0 in shape or not tensor.dtype.is_floating_point:
            dtype = str(tensor.dtype).removeprefix("torch.")
            found, expected = f"{keys[name]} has the shape {shape} and the dtype {dtype}", "vectors (n, D), or one (D,)"
            raise AdapterError("EMBEDDING_KIND", path, found, expected=expected, hint=INSPECT)
    rows = [shape[0] if len(shape) == 2 else 1 for shape in shapes]
    if [shape[-1] for shape in shapes] != widths or len(set(rows)) > 1:
        listed = " and ".join(f"{name} {shape}" for name, shape in zip(chosen, shapes, strict=True))
        expected = " and ".join(f"(n, {width})" for width in widths)
        hint = f"take an embedding that was trained on {KINDS[family.kind]}"
        raise AdapterError("EMBEDDING_SHAPE", path, listed, expected=expected, hint=hint)
    if rows[0] > MOST:
        found, hint = f"{rows[0]} vectors", "a longer one can never be used"
        raise AdapterError("EMBEDDING_LENGTH", path, found, expected=f"at most {MOST}, as a prompt has", hint=hint)
    vectors = tuple(_vectors(weights, keys[name]) for name in chosen)
    return Embedding(token, vectors, source, sha256)


def checked_token(token: object) -> str:
    """Check a token.

    Args:
        token: what was given, or found in the file.

    Returns:
        The token, with one space between its words.

    Raises:
        AdapterError: it is empty, or no text.
    """
    if not isinstance(token, str) or not token.strip() or not token.isprintable():
        expected, hint = "a word", "give one: add_embedding(file, token='...'), or --embedding TOKEN=FILE"
        raise AdapterError("EMBEDDING_TOKEN", "token", said(token), expected=expected, hint=hint)
    return " ".join(check_prompt("token", token).split())


def _opened(path: Path) -> Weights:
    try:
        return open_weights(path)
    except CheckpointError as error:
        if error.code != "CKPT_UNKNOWN_FORMAT":
            raise
        hint = "an embedding inside of an image is not read: take it as .pt or .safetensors"
        raise CheckpointError(
            "CKPT_UNKNOWN_FORMAT", error.subject, error.found, expected=EXPECTED, hint=hint
        ) from error


def _vectors(weights: Readable, key: str) -> Tensor:
    tensor = weights.tensor(key).float().clone()
    if not bool(torch.isfinite(tensor).all()):
        found, hint = f"{key} holds NaN or infinity", "fetch the file again"
        raise AdapterError("EMBEDDING_VALUES", weights.path, found, expected="finite numbers", hint=hint)
    return tensor.reshape(-1, tensor.shape[-1])
