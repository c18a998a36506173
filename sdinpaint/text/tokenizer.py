"""CLIP's byte-pair tokenizer: prompts to ids, and the places where its vocabulary is looked for.

The vocabulary is not part of this package. `find_tokenizer` looks for it in a fixed order, and accepts a source
only if its merges are, by sha256, the ones that the released text encoders were trained with.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import huggingface_hub
import tokenizers
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from sdinpaint.errors import CheckpointError, SettingError, TokenizerError, warn
from sdinpaint.text.vocabulary import (
    CLIP_ROWS,
    END,
    START,
    SUFFIX,
    Merge,
    byte_symbols,
    clip_layout,
    read_vocabulary,
    require_fitting,
)

__all__ = ["CONTEXT_LENGTH", "Tokenizer", "find_tokenizer", "train_tokenizer"]

CONTEXT_LENGTH = 77

# openai/CLIP clip/simple_tokenizer.py SimpleTokenizer.pat; the text is lower case by then
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

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
    pip install --no-deps open_clip_torch   # ships the vocabulary; it is found without being imported
    hf download {" ".join(HUB_FILE)}   # once, with network
    {OWN_WAY}
    export {VARIABLE}=PATH   # the same for every run"""


class Tokenizer:
    """Prompts to ids; ids from 0 to `vocab_size` - 1 name the rows of the text encoder's embedding.

    Text is NFC-normalised, white space joined and letters lower-cased. As in transformers, a literal
    "<|startoftext|>" or "<|endoftext|>" inside a prompt is that special token.

    SD2's and XL's OpenCLIP encoders are padded with id 0, which is also the byte "!". As trained, a "!" that ends a
    word is id 256. transformers, and with it diffusers, takes every "!" for padding, id 0: `pad_is_special=True`.
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
        """`pad_id` fills up to 77 ids; None: the end token. `pad_is_special`: its text in a prompt is one too."""
        self.vocab, self.merges = vocab, merges
        self.start_id, self.end_id = self.vocab[START], self.vocab[END]
        self.pad_id = self.end_id if pad_id is None else pad_id
        self.pad_is_special = pad_is_special

    @cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        """Built for the first prompt."""
        encoder = _encoder(models.BPE(dict(self.vocab), list(self.merges), end_of_word_suffix=SUFFIX, unk_token=END))
        encoder.add_special_tokens([START, END, *([self.pad_token] if self.pad_is_special else [])])
        return encoder

    @property
    def pad_token(self) -> str:
        """The token whose id is `pad_id`."""
        return next(token for token, i in self.vocab.items() if i == self.pad_id)

    def with_padding(self, pad_id: int | None) -> Tokenizer:
        """The same vocabulary with another padding; None: the end token."""
        if self.pad_is_special:
            return Tokenizer(self.vocab, self.merges, pad_id=pad_id, pad_is_special=True)
        other = copy.copy(self)
        other.pad_id = self.end_id if pad_id is None else pad_id
        return other

    @classmethod
    def from_merges(cls, merges: Sequence[Merge], *, pad_id: int | None = None) -> Tokenizer:
        """The vocabulary in CLIP's layout: 256 bytes, 256 bytes that end a word, the merges, start, end."""
        return cls(clip_layout(merges), merges, pad_id=pad_id)

    @classmethod
    def from_folder(cls, folder: Path | str, *, pad_id: int | None = None) -> Tokenizer:
        """From vocab.json and merges.txt, vocab.json alone, or tokenizer.json. Raises TokenizerError."""
        return cls(*read_vocabulary(Path(folder)), pad_id=pad_id)

    @classmethod
    def from_bpe_file(cls, path: Path | str, *, pad_id: int | None = None) -> Tokenizer:
        """From OpenAI's bpe_simple_vocab_16e6.txt.gz. Raises TokenizerError."""
        return cls(*read_vocabulary(Path(path)), pad_id=pad_id)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, which is the number of embedding rows of the text encoder they belong to."""
        return len(self.vocab)

    def __call__(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts -> int64 ids (B, 77): start, at most 75 tokens, end, padding.

        Warns where a prompt is longer. Raises SettingError for what is not valid text.
        """
        batch = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(batch, Sequence) or not batch:
            raise SettingError("SETTING_PROMPT", "prompt", f"{prompts!r}", expected="a string, or a list of strings")
        return torch.tensor([self._row(prompt) for prompt in batch], dtype=torch.int64, device="cpu")

    def _row(self, prompt: str) -> list[int]:
        _require_text(prompt)
        room = CONTEXT_LENGTH - 2
        encoding = self._encoder.encode(prompt)
        ids: list[int] = encoding.ids
        if len(ids) > room:
            cut = "".join(character for character in prompt[encoding.offsets[room][0] :] if character.isprintable())
            shown = cut if len(cut) <= 60 else cut[:57] + "..."
            message = f"prompt has {len(ids)} tokens, {room} used; cut: {shown!r}"
            warn(message)
        row = [self.start_id, *ids[:room], self.end_id]
        return row + [self.pad_id] * (CONTEXT_LENGTH - len(row))

    def save(self, folder: Path | str) -> None:
        """Write vocab.json, merges.txt and the two small files with which transformers' CLIPTokenizer loads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
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
            (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")


def train_tokenizer(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary in CLIP's layout from texts; smaller than `vocab_size` where they hold too few words."""
    if vocab_size < 2 * 256 + 2:
        raise SettingError(
            "SETTING_VOCAB_SIZE", "vocab_size", f"{vocab_size}", expected="at least 514: bytes and specials"
        )
    symbols = byte_symbols()
    # Given as special tokens, the byte symbols come first and in this order, so that training is reproducible.
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


def find_tokenizer(
    explicit: Tokenizer | Path | str | None = None,
    model_folder: Path | str | None = None,
    embedding_rows: int = CLIP_ROWS,
    offline: bool | None = None,
    *,
    pad_id: int | None = None,
) -> Tokenizer:
    """Find the vocabulary of a text encoder with `embedding_rows` rows; the first place that has one decides.

    Looked at: `explicit`; the variable SDINPAINT_TOKENIZER (*); `model_folder`/tokenizer; the Hugging Face cache (*);
    installed packages that ship it, none of which is imported (*); the hub (*), unless `offline` (None: as the
    variable HF_HUB_OFFLINE says). (*): only for CLIP's 49,408 rows; other vocabularies come with their model.
    Raises TokenizerError when there is none (listing the ways to get one), or when a given one does not fit.
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
    found = f"the text encoder has {embedding_rows} embedding rows, so its vocabulary is not CLIP's, and none is given"
    raise TokenizerError("TOKENIZER_NOT_FOUND", "tokenizer", found, expected="a tokenizer/ folder", hint=OWN_WAY)


def _find_clip(offline: bool, pad_id: int | None) -> Tokenizer:
    rejected = []
    for path in (*_cached_files(), *_package_files()):
        try:
            return _fitting(path, CLIP_ROWS, pad_id)
        except TokenizerError as error:
            rejected.append(f"{error.subject} has {error.found}")
    if not offline:
        from sdinpaint.hub import fetch  # noqa: PLC0415 - who has the vocabulary need not wait for it

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
        # find_spec imports nothing for a top-level name; only a package, not a stray clip.py, has locations
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec is not None else ():
            if Path(location, name).is_file():
                yield Path(location, name)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _encoder(model: models.BPE) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return encoder


def _require_text(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise SettingError("SETTING_PROMPT", "prompt", f"a {type(prompt).__name__}", expected="a string")
    lone = next((i for i, character in enumerate(prompt) if "\ud800" <= character <= "\udfff"), None)
    if lone is not None:
        found = f"character {lone} is the lone surrogate U+{ord(prompt[lone]):04X}"
        raise SettingError(
            "SETTING_PROMPT", "prompt", found, expected="valid Unicode text", hint="remove that character"
        )
