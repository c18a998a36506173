"""Search for CLIP's vocabulary: given by the caller or a variable, beside the checkpoint, in packages, on the hub."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub

from sdinpaint.errors import CheckpointError, TokenizerError
from sdinpaint.text.tokenizer import Tokenizer
from sdinpaint.text.vocabulary import (
    CLIP_ROWS,
    read_vocabulary,
    require_fitting,
)

__all__ = ["find_tokenizer"]

VARIABLE = "SDINPAINT_TOKENIZER"
HUB_FILE = ("openai/clip-vit-large-patch14", "tokenizer.json")
CACHED_FILES = (
    HUB_FILE,
    ("openai/clip-vit-large-patch14", "vocab.json"),
    ("stable-diffusion-v1-5/stable-diffusion-inpainting", "tokenizer/vocab.json"),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/vocab.json"),
    ("runwayml/stable-diffusion-inpainting", "tokenizer/vocab.json"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer/vocab.json"),
    ("CompVis/stable-diffusion-v1-4", "tokenizer/vocab.json"),
    ("stabilityai/stable-diffusion-2-inpainting", "tokenizer/vocab.json"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/vocab.json"),
    ("diffusers/stable-diffusion-xl-1.0-inpainting-0.1", "tokenizer/vocab.json"),
)
PACKAGE_FILES = {
    "open_clip": "bpe_simple_vocab_16e6.txt.gz",
    "clip": "bpe_simple_vocab_16e6.txt.gz",
    "refiners": "foundationals/clip/bpe_simple_vocab_16e6.txt.gz",
}
OWN_WAY = "sdinpaint.load(..., tokenizer='PATH')   # a tokenizer/ folder, tokenizer.json or bpe_*.txt.gz"
CLIP_WAYS = f"""one of these:
    pip install --no-deps open_clip_torch   # ships the vocabulary; the package is not imported
    hf download {" ".join(HUB_FILE)}   # needs the network once
    {OWN_WAY}
    export {VARIABLE}=PATH   # applies to every run"""


def find_tokenizer(
    explicit: Tokenizer | Path | str | None = None,
    model_folder: Path | str | None = None,
    embedding_rows: int = CLIP_ROWS,
    offline: bool | None = None,
    *,
    pad_id: int | None = None,
) -> Tokenizer:
    """Find the vocabulary of a text encoder; the first place that has one decides.

    The places are, in this order: `explicit`; the variable SDINPAINT_TOKENIZER (*); `model_folder`/tokenizer; the
    Hugging Face cache (*); installed packages that ship the vocabulary, which are not imported (*); and the hub (*).
    Places with (*) are only searched for CLIP's 49,408 rows; other vocabularies come with their model.

    Args:
        explicit: a tokenizer, or the path of a vocabulary file or folder.
        model_folder: a diffusers folder.
        embedding_rows: rows of the text encoder's token embedding, which must be the size of the vocabulary.
        offline: do not ask the hub; None follows the variable HF_HUB_OFFLINE.
        pad_id: id that fills up to 77 tokens; None is the end token.

    Returns:
        The tokenizer.

    Raises:
        TokenizerError: no place has a vocabulary (the error lists the ways to get one), or a given one does not fit.
    """
    if isinstance(explicit, Tokenizer):
        require_fitting(explicit.vocab, explicit.merges, embedding_rows, "tokenizer")
        return explicit
    own = Path(model_folder, "tokenizer") if model_folder is not None else None
    shared = os.environ.get(VARIABLE) if embedding_rows == CLIP_ROWS else None
    given = explicit or shared or (own if own is not None and own.is_dir() else None)
    if given is not None:
        return _fitting(Path(given), embedding_rows, pad_id)
    if embedding_rows == CLIP_ROWS:
        return _find_clip(_offline() if offline is None else offline, pad_id)
    found = (
        f"the text encoder has {embedding_rows} embedding rows, so its vocabulary is not CLIP's, and no other is given"
    )
    raise TokenizerError("TOKENIZER_NOT_FOUND", "tokenizer", found, expected="a tokenizer/ folder", hint=OWN_WAY)


def _find_clip(offline: bool, pad_id: int | None) -> Tokenizer:
    rejected = []
    for path in (*_cached_files(), *_package_files()):
        try:
            return _fitting(path, CLIP_ROWS, pad_id)
        except TokenizerError as error:
            rejected.append(f"{error.subject} has {error.found}")
    if not offline:
        from sdinpaint.hub import fetch  # noqa: PLC0415 - rarely needed, and slow to import

        try:
            return _fitting(fetch(":".join(HUB_FILE), progress=False), CLIP_ROWS, pad_id)
        except (CheckpointError, TokenizerError) as error:
            rejected.append(f"the download from {HUB_FILE[0]} failed: {error.found}")
    found = "; ".join(["CLIP's vocabulary is not on this machine", *rejected])
    expected = "the vocabulary of the text encoder, which a checkpoint in one file does not hold"
    raise TokenizerError("TOKENIZER_NOT_FOUND", "tokenizer", found, expected=expected, hint=CLIP_WAYS)


def _fitting(path: Path, rows: int, pad_id: int | None) -> Tokenizer:
    return Tokenizer(*read_vocabulary(path, rows), pad_id=pad_id)


def _cached_files() -> Iterator[Path]:
    for repository, name in CACHED_FILES:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            yield Path(cached)


def _package_files() -> Iterator[Path]:
    for package, name in PACKAGE_FILES.items():
        # find_spec imports nothing for a top-level name; a stray clip.py has no locations
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec is not None else ():
            if Path(location, name).is_file():
                yield Path(location, name)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
