"""CLIP's byte-pair tokenizer: prompts to token ids.

The vocabulary is not part of this package; `find_tokenizer` searches for it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from sdinpaint_weights.atomic import atomic_write
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from sdinpaint.checks import check_prompt
from sdinpaint.errors import SettingError, warn
from sdinpaint.text.vocabulary import (
    END,
    START,
    SUFFIX,
    Merge,
    byte_symbols,
    clip_layout,
    read_vocabulary,
)

__all__ = ["CONTEXT_LENGTH", "ROOM", "Place", "Tokenizer", "cut_off", "train_tokenizer"]

CONTEXT_LENGTH = 77
ROOM = CONTEXT_LENGTH - 2
"""Tokens between the start and the end."""

# Source: openai/CLIP clip/simple_tokenizer.py SimpleTokenizer.pat; the text is lower case by then
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Place(NamedTuple):
    """A token of a text."""

    id: int
    offset: int
    """The character at which it begins."""


class Tokenizer:
    """CLIP's tokenizer: prompts to token ids from 0 to `vocab_size` - 1, the rows of the text encoder's embedding.

    Text is NFC-normalised, white space is joined and letters are lower-cased. As in transformers, a literal
    "<|startoftext|>" or "<|endoftext|>" inside a prompt is that special token.

    The OpenCLIP encoders of SD2 and SDXL are padded with id 0, which is also the byte "!". In training, a "!" that ends
    a word was id 256. transformers, and with it diffusers, reads every "!" as padding, id 0: `pad_is_special=True`.

    Args:
        vocab: ids by token.
        merges: byte pairs to join, in order of precedence.
        pad_id: id that fills up to 77 tokens; None is the end token.
        pad_is_special: read the text of the padding token in a prompt as padding.

    Source: openai/CLIP clip/simple_tokenizer.py; mlfoundations/open_clip tokenizer.py; transformers CLIPTokenizer.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[Merge],
        *,
        pad_id: int | None = None,
        pad_is_special: bool = False,
    ) -> None:
        self.vocab, self.merges = vocab, merges
        self.start_id, self.end_id = self.vocab[START], self.vocab[END]
        self.pad_id = self.end_id if pad_id is None else pad_id
        self.pad_is_special = pad_is_special

    @cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        encoder = _encoder(models.BPE(dict(self.vocab), list(self.merges), end_of_word_suffix=SUFFIX, unk_token=END))
        encoder.add_special_tokens([START, END, *([self.pad_token] if self.pad_is_special else [])])
        return encoder

    @property
    def pad_token(self) -> str:
        """The token whose id is `pad_id`."""
        return next(token for token, i in self.vocab.items() if i == self.pad_id)

    def with_padding(self, pad_id: int | None) -> Tokenizer:
        """Make a tokenizer with the same vocabulary and another padding.

        Args:
            pad_id: id that fills up to 77 tokens; None is the end token.

        Returns:
            The tokenizer.
        """
        if self.pad_is_special:
            return Tokenizer(self.vocab, self.merges, pad_id=pad_id, pad_is_special=True)
        other = copy.copy(self)
        other.pad_id = self.end_id if pad_id is None else pad_id
        return other

    @classmethod
    def from_merges(cls, merges: Sequence[Merge], *, pad_id: int | None = None) -> Tokenizer:
        """Make a vocabulary in CLIP's layout: 256 bytes, 256 bytes that end a word, the merges, start, end.

        Args:
            merges: byte pairs to join, in order of precedence.
            pad_id: id that fills up to 77 tokens; None is the end token.

        Returns:
            The tokenizer.
        """
        return cls(clip_layout(merges), merges, pad_id=pad_id)

    @classmethod
    def from_folder(cls, folder: Path | str, *, pad_id: int | None = None) -> Tokenizer:
        """Read a vocabulary from vocab.json with merges.txt, from vocab.json alone, or from tokenizer.json.

        Args:
            folder: the folder of these files.
            pad_id: id that fills up to 77 tokens; None is the end token.

        Returns:
            The tokenizer.

        Raises:
            TokenizerError: the folder has no such files, or they are damaged.
        """
        return cls(*read_vocabulary(Path(folder)), pad_id=pad_id)

    @classmethod
    def from_bpe_file(cls, path: Path | str, *, pad_id: int | None = None) -> Tokenizer:
        """Read a vocabulary from OpenAI's bpe_simple_vocab_16e6.txt.gz.

        Args:
            path: the file.
            pad_id: id that fills up to 77 tokens; None is the end token.

        Returns:
            The tokenizer.

        Raises:
            TokenizerError: the file is missing or damaged.
        """
        return cls(*read_vocabulary(Path(path)), pad_id=pad_id)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, which is the number of rows of the text encoder's embedding."""
        return len(self.vocab)

    def __call__(self, prompts: str | Sequence[str]) -> Tensor:
        """Encode prompts; a prompt that is too long is cut, with a warning.

        Args:
            prompts: one prompt, or B prompts.

        Returns:
            int64 ids (B, 77): start, at most 75 tokens, end, padding.

        Raises:
            SettingError: a prompt is not valid text.
        """
        batch = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(batch, Sequence) or not batch:
            raise SettingError("SETTING_PROMPT", "prompt", f"{prompts!r}", expected="a string, or a list of strings")
        return torch.tensor([self._row(prompt) for prompt in batch], dtype=torch.int64, device="cpu")

    def _row(self, prompt: str) -> list[int]:
        places = self.places(prompt)
        if doubt := cut_off(prompt, [place.offset for place in places]):
            warn(f"prompt {doubt}")
        return self.framed([place.id for place in places[:ROOM]])

    def places(self, text: str) -> list[Place]:
        """Encode a text of any length.

        Args:
            text: the text.

        Returns:
            Its tokens, without start and end.

        Raises:
            SettingError: it is not valid text.
        """
        if text is None:
            raise SettingError("SETTING_PROMPT", "prompt", "None", expected="a string")
        encoding = self._encoder.encode(check_prompt("prompt", text))
        return [Place(id, begin) for id, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def framed(self, ids: Sequence[int]) -> list[int]:
        """Put ids between start and end, and fill them up with padding.

        Args:
            ids: at most 75 ids.

        Returns:
            77 ids.
        """
        row = [self.start_id, *ids, self.end_id]
        return row + [self.pad_id] * (CONTEXT_LENGTH - len(row))

    def doubt(self, prompt: str) -> str | None:
        """Say what of a prompt a model does not see.

        Args:
            prompt: the prompt.

        Returns:
            The end of a sentence that begins with the name of the prompt; None where the prompt fits.

        Raises:
            SettingError: the prompt is not valid text.
        """
        return cut_off(prompt, [place.offset for place in self.places(prompt)])

    def save(self, folder: Path | str) -> None:
        """Write vocab.json, merges.txt and the two small files that transformers' CLIPTokenizer needs.

        Args:
            folder: the folder, created if missing.
        """
        folder = Path(folder)
        names = sorted(self.vocab, key=lambda token: self.vocab[token])
        specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad_token}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT_LENGTH, "do_lower_case": True}
        files = {
            "vocab.json": json.dumps({name: i for i, name in enumerate(names)}, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, self.merges)]),
            "tokenizer_config.json": json.dumps({**config, **specials}, indent=2),
            "special_tokens_map.json": json.dumps(specials, indent=2),
        }
        for name, text in files.items():
            with atomic_write(folder / name) as file:
                file.write(f"{text}\n".encode())


def train_tokenizer(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary in CLIP's layout from texts.

    Args:
        corpus: the texts.
        vocab_size: largest number of tokens; texts with few words give fewer.

    Returns:
        The tokenizer.

    Raises:
        SettingError: `vocab_size` is below 514, which bytes and special tokens take.
    """
    if vocab_size < 2 * 256 + 2:
        raise SettingError(
            "SETTING_VOCAB_SIZE", "vocab_size", f"{vocab_size}", expected="at least 514: bytes and special tokens"
        )
    symbols = byte_symbols()
    # special tokens come first and in this order, which makes training reproducible
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        special_tokens=[*symbols, *(symbol + SUFFIX for symbol in symbols)],
        end_of_word_suffix=SUFFIX,
        show_progress=False,
    )
    encoder = _encoder(models.BPE(end_of_word_suffix=SUFFIX))
    encoder.train_from_iterator(corpus, trainer)
    return Tokenizer.from_merges([(left, right) for left, right in json.loads(encoder.to_str())["model"]["merges"]])


def _encoder(model: models.BPE) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return encoder


def cut_off(prompt: str, offsets: Sequence[int], used: int = ROOM) -> str | None:
    """Say what of a prompt does not fit.

    Args:
        prompt: the prompt.
        offsets: the character at which each of its tokens begins.
        used: number of tokens that fit.

    Returns:
        The end of a sentence that begins with the name of the prompt; None where all of it fits.
    """
    if len(offsets) <= used:
        return None
    cut = "".join(character for character in prompt[offsets[used] :] if character.isprintable())
    shown = cut if len(cut) <= 60 else cut[:57] + "..."
    return f"has {len(offsets)} tokens, {used} used; cut: {shown!r}"
