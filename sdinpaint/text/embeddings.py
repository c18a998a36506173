"""Textual inversion: words of a prompt that stand for learned vectors in place of rows of the text encoder's table.

Source: Gal et al. 2022, https://arxiv.org/abs/2208.01618; AUTOMATIC1111's textual_inversion for words of several
vectors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Embedding", "pieces_of", "without_embeddings"]


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word of prompts, and the vectors that it stands for."""

    token: str
    by_encoder: tuple[Tensor, ...]
    """For each text encoder its vectors (n, D), float32 on the CPU."""
    source: str
    """Where it was read from, as it was given."""
    sha256: str
    """Digest of the file."""

    @property
    def vectors(self) -> Tensor | tuple[Tensor, ...]:
        """The vectors (n, D); for SDXL a pair of them, for the first and for the second text encoder."""
        return self.by_encoder[0] if len(self.by_encoder) == 1 else self.by_encoder

    def __len__(self) -> int:
        """Return the number of vectors, and so of places in a prompt."""
        return len(self.by_encoder[0])

    def to_manifest(self) -> dict[str, Any]:
        """Return what a manifest records of it."""
        empty = {"weight": None, "text_weight": None, "blocks": None}
        return {"kind": "embedding", "name": self.token, "source": self.source, "sha256": self.sha256, **empty}


def pieces_of(prompt: str, embeddings: Iterable[Embedding]) -> Iterator[tuple[int, str | Embedding]]:
    """Split a prompt into texts and embeddings.

    A token is found whatever the case of its letters, where no letter, digit, `_` or `-` stands beside it; the longest
    first. `embedding:TOKEN` is the token, too.

    Args:
        prompt: the prompt.
        embeddings: the embeddings.

    Returns:
        The pieces in order, each with the character at which it begins.
    """
    longest_first = sorted(embeddings, key=lambda one: len(one.token), reverse=True)
    if not longest_first:
        yield 0, prompt
        return
    tokens = "|".join(f"({_spelled(one.token)})" for one in longest_first)
    start = 0
    for match in re.finditer(rf"(?<![\w-])(?:embedding:)?(?:{tokens})(?![\w-])", prompt, re.IGNORECASE):
        if match.start() > start:
            yield start, prompt[start : match.start()]
        yield match.start(), longest_first[(match.lastindex or 1) - 1]
        start = match.end()
    if start < len(prompt):
        yield start, prompt[start:]


def without_embeddings(prompt: str, embeddings: Iterable[Embedding]) -> str:
    """Write a plain word in place of every embedding of a prompt, for a search of the syntax of other programs.

    Args:
        prompt: the prompt.
        embeddings: the embeddings.

    Returns:
        The prompt, in which nothing that belongs to a token is special.
    """
    pieces = (piece for _, piece in pieces_of(prompt, embeddings))
    return "".join(piece if isinstance(piece, str) else re.sub(r"\W", "", piece.token) or "x" for piece in pieces)


def _spelled(token: str) -> str:
    """Return the pattern of a token, whose words may have any white space between them."""
    return r"\s+".join(map(re.escape, token.split()))
