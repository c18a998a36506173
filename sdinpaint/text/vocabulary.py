"""The vocabulary of a CLIP text encoder: its layout, and the files that hold it.

A vocabulary is (vocab, merges): ids by token, and the byte pairs to join in order of precedence.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count, pairwise, repeat
from operator import eq
from pathlib import Path

from sdinpaint_weights.door import Refusal, read_whole

from sdinpaint.errors import TokenizerError

__all__ = ["CLIP_ROWS", "CLIP_SHA256", "END", "START", "SUFFIX", "Merge", "Vocabulary"]
__all__ += ["byte_symbols", "clip_layout", "merges_sha256", "read_vocabulary", "require_fitting"]

Merge = tuple[str, str]
Vocabulary = tuple[dict[str, int], list[Merge]]

START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"

CLIP_ROWS = 49408
CLIP_MERGES = CLIP_ROWS - 2 * 256 - 2
CLIP_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
"""`merges_sha256` of the vocabulary that all released Stable Diffusion text encoders were trained with."""

MAX_BYTES = 16 * 2**20
"""Bytes of a file at most, also after unpacking; CLIP's have up to 4 million."""
MAX_TOKENS = 500_000
MAX_TOKEN = 1000
"""Characters of a token at most."""
MAX_REBUILDING = 10_000_000
"""Work of rebuilding merges from tokens at most: the sum of squares of their lengths, which for CLIP is 3 million."""


def byte_symbols() -> list[str]:
    """List one printable character per byte, in CLIP's order: printable bytes as they are, the rest from U+0100 on.

    Source: openai/CLIP clip/simple_tokenizer.py bytes_to_unicode.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]


def clip_layout(merges: Sequence[Merge]) -> dict[str, int]:
    """Number the tokens in CLIP's order: 256 bytes, 256 bytes that end a word, one token per merge, start, end.

    Args:
        merges: byte pairs to join, in order of precedence.

    Returns:
        Ids by token.
    """
    return {token: i for i, token in enumerate(_clip_tokens(merges))}


def _clip_tokens(merges: Sequence[Merge]) -> Iterator[str]:
    symbols = byte_symbols()
    return chain(symbols, (symbol + SUFFIX for symbol in symbols), map("".join, merges), (START, END))


def merges_sha256(merges: Sequence[Merge]) -> str:
    """Hash merges with SHA-256: "left right" of each, in order, with newlines between.

    Args:
        merges: byte pairs to join, in order of precedence.

    Returns:
        The hash in hexadecimal digits.
    """
    return hashlib.sha256("\n".join(f"{left} {right}" for left, right in merges).encode()).hexdigest()


def read_vocabulary(path: Path, rows: int | None = None) -> Vocabulary:
    """Read a vocabulary from vocab.json (with merges.txt beside it, if any), tokenizer.json, or OpenAI's bpe_*.txt.gz.

    Args:
        path: the file, or the folder that holds it.
        rows: rows of the text encoder's embedding, checked by `require_fitting`; CLIP's own vocab.json and merges.txt
            are then read in half the time.

    Returns:
        Ids by token, and the merges.

    Raises:
        TokenizerError: the file is missing, damaged, or does not fit.
    """
    try:
        if path.is_dir():
            path = _file_in(path)
        if rows == CLIP_ROWS and (known := _clip_files(path)):
            return known
        vocab, merges = _from_gzip(path) if path.suffix == ".gz" else _from_json(path)
        _require_complete(vocab, merges)
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, RecursionError) as error:
        found = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        expected = "a CLIP vocabulary: vocab.json with merges.txt, tokenizer.json, or bpe_simple_vocab_16e6.txt.gz"
        hint = "give the path of such a file or folder, or download it again"
        raise TokenizerError("TOKENIZER_BROKEN", path, found, expected=expected, hint=hint) from error
    if rows is not None:
        require_fitting(vocab, merges, rows, path)
    return vocab, merges


def require_fitting(vocab: Mapping[str, int], merges: Sequence[Merge], rows: int, source: object) -> None:
    """Check that a vocabulary has as many tokens as the embedding has rows, and for 49,408 rows that it is CLIP's.

    Args:
        vocab: ids by token.
        merges: byte pairs to join, in order of precedence.
        rows: rows of the text encoder's embedding.
        source: name that an error gives to the vocabulary.

    Raises:
        TokenizerError: the vocabulary does not fit.
    """
    hint = "give the vocabulary that belongs to this text encoder"
    if len(vocab) != rows:
        found, expected = f"a vocabulary of {len(vocab)} tokens", f"{rows} tokens, as the embedding has rows"
        raise TokenizerError("TOKENIZER_MISMATCH", source, found, expected=expected, hint=hint)
    if rows == CLIP_ROWS and not _is_clip(vocab, merges):
        found = f"{len(merges)} merges with sha256 {merges_sha256(merges)[:16]}..."
        if merges_sha256(merges) == CLIP_SHA256:
            found = "CLIP's merges, but other ids"
        expected = f"CLIP's {CLIP_MERGES} merges in CLIP's order, sha256 {CLIP_SHA256[:16]}..."
        raise TokenizerError("TOKENIZER_MISMATCH", source, found, expected=expected, hint=hint)


def _is_clip(vocab: Mapping[str, int], merges: Sequence[Merge]) -> bool:
    return _in_clip_order(vocab, merges) and merges_sha256(merges) == CLIP_SHA256


def _in_clip_order(vocab: Mapping[str, int], merges: Sequence[Merge]) -> bool:
    """Compare with CLIP's order without a second vocabulary, which would take time and memory."""
    return len(vocab) == CLIP_ROWS and all(map(eq, map(vocab.get, _clip_tokens(merges)), count()))


def _clip_files(path: Path) -> Vocabulary | None:
    """Read CLIP's own vocab.json and merges.txt, if they are these by sha256, without checking each merge."""
    beside = path.with_name("merges.txt")
    if path.suffix != ".json" or not os.path.lexists(beside):
        return None
    text = _read(beside).decode().partition("\n")[2].strip("\n")  # without the #version line
    if hashlib.sha256(text.encode()).hexdigest() != CLIP_SHA256:
        return None
    vocab = json.loads(_read(path))
    if not isinstance(vocab, dict):
        return None
    own = dict(zip(vocab, vocab, strict=True))
    parts = text.replace("\n", " ").split(" ")
    parts = list(map(own.get, parts, parts))  # sharing the vocabulary's strings saves memory
    merges = list(zip(parts[::2], parts[1::2], strict=True))
    return (vocab, merges) if _in_clip_order(vocab, merges) else None


def _file_in(folder: Path) -> Path:
    files = (folder / "vocab.json", folder / "tokenizer.json")
    if found := next(filter(os.path.lexists, files), None):
        return found
    raise ValueError("a folder with neither vocab.json nor tokenizer.json")


def _read(path: Path) -> bytes:
    try:
        return read_whole(path, MAX_BYTES)
    except Refusal as refusal:
        raise ValueError(f"{path.name}: {refusal.found}") from refusal


def _from_gzip(path: Path) -> Vocabulary:
    with gzip.open(io.BytesIO(_read(path))) as stream:
        text = stream.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes when unpacked")
    lines = text.decode().split("\n")
    merges = _merges_of_lines(lines[1 : CLIP_MERGES + 1])
    return clip_layout(merges), merges


def _from_json(path: Path) -> Vocabulary:
    content = json.loads(_read(path))
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__}")
    if isinstance(content.get("model"), dict):
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return {**content["model"]["vocab"], **added}, _merges_of_lines(content["model"]["merges"])
    beside = path.with_name("merges.txt")
    if os.path.lexists(beside):
        return content, _merges_of_lines(_read(beside).decode().split("\n"))
    _require_short(content)
    return content, list(_rebuilt_merges(content))


def _merges_of_lines(lines: Sequence[str | Sequence[str]]) -> list[Merge]:
    """Parse merges from "left right" lines or [left, right] lists; skip a #version line and blank lines."""
    rows = [line if isinstance(line, str) else " ".join(line) for line in lines if line]
    rows = rows[1:] if rows and rows[0].startswith("#version:") else rows
    if len(rows) > MAX_TOKENS:
        raise ValueError(f"{len(rows)} merges, where at most {MAX_TOKENS} are read")
    # all at once: one by one, 48,894 lines take longer than reading a checkpoint
    spaces = list(map(str.count, rows, repeat(" ")))
    if spaces.count(1) != len(rows):
        broken = next(row for row, count in zip(rows, spaces, strict=True) if count != 1)
        raise ValueError(f"the merge {broken[:40]!r}, which does not have two parts")
    parts = " ".join(rows).split(" ") if rows else []
    return list(zip(parts[::2], parts[1::2], strict=True))


def _rebuilt_merges(vocab: Mapping[str, int]) -> Iterator[Merge]:
    """Rebuild merges from a list of tokens: under the merges before it, each token splits into exactly two parts."""
    if sum(len(token) ** 2 for token in vocab) > MAX_REBUILDING:
        raise ValueError("no merges.txt beside it, and its tokens are too long to rebuild that from them")
    ranks: dict[Merge, int] = {}
    for token in sorted(set(vocab) - {START, END}, key=lambda token: vocab[token]):
        parts = _parts(token, ranks)
        if len(parts) > 2:
            raise ValueError(f"no merges.txt beside it, and token {token!r} is not made of two earlier tokens")
        if len(parts) == 2:
            merge = parts[0], parts[1]
            ranks[merge] = len(ranks)
            yield merge


def _parts(token: str, ranks: Mapping[Merge, int]) -> list[str]:
    body = token.removesuffix(SUFFIX) or token
    parts = [*body[:-1], body[-1] + token[len(body) :]]
    while candidates := [pair for pair in pairwise(parts) if pair in ranks]:
        best = min(candidates, key=lambda pair: ranks[pair])
        i = next(i for i, pair in enumerate(pairwise(parts)) if pair == best)
        parts[i : i + 2] = ["".join(best)]
    return parts


def _require_short(vocab: Mapping[str, int]) -> None:
    if len(vocab) > MAX_TOKENS:
        raise ValueError(f"{len(vocab)} tokens, where at most {MAX_TOKENS} are read")
    if "" in vocab:
        raise ValueError("an empty token")
    if (longest := max(map(len, vocab), default=0)) > MAX_TOKEN:
        raise ValueError(f"a token of {longest} characters, where at most {MAX_TOKEN} are read")


def _require_complete(vocab: Mapping[str, int], merges: Sequence[Merge]) -> None:
    _require_short(vocab)
    needed = {START, END}.union(*merges, map("".join, merges))
    if lost := needed - vocab.keys():
        raise ValueError(f"{len(vocab)} tokens and {len(merges)} merges, but no token {min(lost)!r}")
    if sorted(vocab.values()) != list(range(len(vocab))) or any(type(i) is not int for i in vocab.values()):
        raise ValueError(f"the ids of its {len(vocab)} tokens are not 0 to {len(vocab) - 1}")
