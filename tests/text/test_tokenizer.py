"""The tokenizer: its algorithm, the real vocabulary's ids, where a vocabulary is found, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DATA

from sdinpaint import hub
from sdinpaint.errors import CheckpointError, SdInpaintWarning, SettingError, TokenizerError
from sdinpaint.text import finding
from sdinpaint.text import tokenizer as module
from sdinpaint.text.finding import find_tokenizer
from sdinpaint.text.tokenizer import Tokenizer, train_tokenizer
from sdinpaint.text.vocabulary import CLIP_ROWS, END, START, byte_symbols, merges_sha256

GOLDEN = json.loads(gzip.decompress((DATA / "clip_prompts.json.gz").read_bytes()))
SHAPES, COLOURS, PLACES = ("ball", "cube", "cone"), ("red", "green", "blue"), ("left", "right")
CORPUS = [f"a {colour} {shape} on the {place}" for colour in COLOURS for shape in SHAPES for place in PLACES]


@pytest.fixture(scope="session")
def bpe_file() -> Path:
    """OpenAI's vocabulary inside open_clip_torch, which the development set-up installs."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None, "pip install --no-deps open_clip_torch"
    return Path(spec.submodule_search_locations[0], "bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture(scope="session")
def clip(bpe_file) -> Tokenizer:
    return Tokenizer.from_bpe_file(bpe_file)


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    return train_tokenizer(CORPUS, 560)


@pytest.fixture
def nowhere(tmp_path, environment, substitute):
    """No variable, an empty cache, no package with the vocabulary, no hub; `cached` and `fetched` may be set."""
    places = SimpleNamespace(cached=lambda *names: None, fetched=None, downloads=[])

    def fetch(source, **_):
        places.downloads.append(source)
        if places.fetched is None:
            raise CheckpointError("HUB_UNREACHABLE", source, "no network")
        return places.fetched

    def find_cached(*names):
        return places.cached(*names)

    environment(SDINPAINT_TOKENIZER=None, HF_HUB_OFFLINE=None)
    substitute(huggingface_hub, try_to_load_from_cache=find_cached)
    substitute(hub, fetch=fetch)
    substitute(finding, PACKAGE_FILES={})
    return places


def spelled(text: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one lower-case ASCII word, by the definition: apply each merge in turn, everywhere."""
    parts = [*text[:-1], text[-1] + "</w>"]
    for merge in merges:
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == merge:
                parts[i : i + 2] = ["".join(merge)]
            i += 1
    return parts


# the algorithm, on a vocabulary learnt here


def test_layout_is_clips(small):
    names = sorted(small.vocab, key=small.vocab.get)
    assert sorted(small.vocab.values()) == list(range(small.vocab_size))
    assert names[:3] == ["!", '"', "#"]
    assert names[256] == "!</w>"
    assert names[512] == "".join(small.merges[0])
    assert names[-2:] == [START, END]


def test_byte_symbols_are_those_of_byte_level_encoding():
    assert set(byte_symbols()) == set(module.pre_tokenizers.ByteLevel.alphabet())
    assert len(byte_symbols()) == 256


@given(st.lists(st.text("abcdeghlnorstu", min_size=1, max_size=12), max_size=8))
@settings(max_examples=100, deadline=None)
def test_ids_follow_the_definition_of_byte_pair_encoding(small, words):
    expected = [small.vocab[part] for word in words for part in spelled(word, small.merges)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdInpaintWarning)
        row = small(" ".join(words))[0].tolist()
    expected = [small.start_id, *expected[:75], small.end_id]
    assert row == expected + [small.end_id] * (77 - len(expected))


def test_one_row_per_prompt_and_case_and_space_do_not_count(small):
    ids = small(["A red  BALL\n", "a red ball"])
    assert ids.shape == (2, 77)
    assert ids.dtype == torch.int64
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(small("a red ball"), ids[:1])


def test_composed_and_decomposed_accents_are_one(small):
    assert torch.equal(small("café"), small("cafe\u0301"))


def test_pad_id_fills_the_row(small):
    ids = Tokenizer(small.vocab, small.merges, pad_id=0)("")[0].tolist()
    assert ids == [small.start_id, small.end_id] + [0] * 75


def test_special_tokens_inside_a_prompt_are_special(small):
    ids = small("a<|endoftext|>b")[0].tolist()
    assert ids[:5] == [small.start_id, small.vocab["a</w>"], small.end_id, small.vocab["b</w>"], small.end_id]


def test_training_is_reproducible_across_processes(small):
    code = (
        "import sys; from sdinpaint.text.tokenizer import train_tokenizer;"
        "print(train_tokenizer(sys.argv[1].split('|'), 560).merges)"
    )
    command = [sys.executable, "-c", code, "|".join(CORPUS)]
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert again.strip() == repr(small.merges)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(SettingError) as caught:
        train_tokenizer(CORPUS, 513)
    assert caught.value.subject == "vocab_size"


# prompts


def test_long_prompt_warns_with_what_was_cut(small):
    with pytest.warns(SdInpaintWarning, match=r"prompt has 86 tokens, 75 used; cut: 'on the leftred end'") as caught:
        ids = small("a " * 73 + "red ball on the left\u202e\x1bred end")
    assert caught[0].filename == __file__
    assert ids[0, -1] == small.end_id
    assert ids[0, -2] == small.vocab["ball</w>"]


def test_exactly_75_tokens_do_not_warn(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = small("a " * 75)
    assert (ids[0, 1:76] == small.vocab["a</w>"]).all()


def test_warning_about_a_huge_prompt_is_short(small):
    with pytest.warns(SdInpaintWarning, match="prompt has 10000 tokens, 75 used") as caught:
        small("a " * 10_000)
    assert len(str(caught[0].message)) < 130


@pytest.mark.parametrize("prompts", [None, 3, b"a cat", [b"a cat"], [None], [], ["fine", 7], {"a": 1}])
def test_prompts_that_are_not_text_are_refused(small, prompts):
    with pytest.raises(SettingError) as caught:
        small(prompts)
    assert caught.value.code == "SETTING_PROMPT"
    assert caught.value.subject == "prompt"


def test_lone_surrogate_is_refused_with_its_place(small):
    with pytest.raises(SettingError, match=r"character 2 .* U\+D800") as caught:
        small(["fine", "a \ud800"])
    assert caught.value.code == "SETTING_PROMPT"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_makes_a_valid_row(small, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdInpaintWarning)
        row = small(text)[0]
    assert row[0] == small.start_id
    assert small.end_id in row
    assert 0 <= row.min() <= row.max() < small.vocab_size


# the real vocabulary


@pytest.mark.parametrize(("prompt", "ids"), GOLDEN, ids=[ascii(prompt)[:30] for prompt, _ in GOLDEN])
def test_golden_prompts(clip, prompt, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdInpaintWarning)
        row = clip(prompt)[0].tolist()
    assert row == [49406, *ids] + [49407] * (76 - len(ids))


# ids with the vocabulary of openai/CLIP: of open_clip.tokenize, and of transformers' CLIPTokenizer in the folders of
# SD2 and of SDXL's second encoder, whose padding "!" is registered as a special token
EXCLAMATIONS = [
    ("Hello, World!", [3306, 267, 1002, 256], [3306, 267, 1002, 0]),
    ("a photo of a cat !", [320, 1125, 539, 320, 2368, 256], [320, 1125, 539, 320, 2368, 0]),
    ("!!", [748], [0, 0]),
    ("! ! !", [256, 256, 256], [0, 0, 0]),
    ("?!", [2835], [286, 0]),
    ("a cat", [320, 2368], [320, 2368]),
]


@pytest.mark.parametrize(("prompt", "trained", "transformers"), EXCLAMATIONS)
def test_an_exclamation_mark_beside_padding_with_its_id(clip, prompt, trained, transformers):
    as_trained, as_transformers = clip.with_padding(0), Tokenizer(clip.vocab, clip.merges, pad_is_special=True)
    for tokenizer, ids in ((as_trained, trained), (as_transformers.with_padding(0), transformers)):
        assert tokenizer(prompt)[0].tolist() == [49406, *ids, 49407] + [0] * (75 - len(ids))
    assert as_transformers(prompt)[0].tolist() == clip(prompt)[0].tolist()  # it pads with the end token


def test_with_padding_keeps_everything_else(small):
    other = small.with_padding(0)
    assert (small.pad_id, other.pad_id, other.pad_token) == (small.end_id, 0, "!")
    assert torch.equal(other.with_padding(None)(CORPUS), small(CORPUS))
    assert other.vocab is small.vocab


def test_golden_prompts_see_a_broken_normaliser(clip):
    """Without NFC, decomposed accents and Hangul come out as other ids."""
    broken = Tokenizer(clip.vocab, clip.merges)
    broken._encoder.normalizer = module.normalizers.Lowercase()
    wrong = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdInpaintWarning)
        for prompt, ids in GOLDEN:
            wrong += broken(prompt)[0].tolist() != [49406, *ids] + [49407] * (76 - len(ids))
    assert wrong > 0


def test_all_forms_of_the_files_agree(clip, tmp_path):
    clip.save(tmp_path / "both")
    with_merges = Tokenizer.from_folder(tmp_path / "both")
    (tmp_path / "both" / "merges.txt").unlink()
    rebuilt = Tokenizer.from_folder(tmp_path / "both")
    one = tmp_path / "one" / "tokenizer.json"
    one.parent.mkdir()
    clip._encoder.save(str(one))
    for other in (with_merges, rebuilt, Tokenizer.from_folder(one.parent), Tokenizer.from_merges(clip.merges)):
        assert other.merges == clip.merges
        assert other.vocab == clip.vocab


# where it is found


def test_order_of_places(nowhere, clip, bpe_file, tmp_path, environment, substitute):
    """Each place that is added before the last one takes over."""

    used = []
    substitute(finding, read_vocabulary=lambda path, rows: used.append(path) or (clip.vocab, clip.merges))
    nowhere.fetched = tmp_path / "hub.json"
    find_tokenizer()
    substitute(finding, PACKAGE_FILES={"open_clip": bpe_file.name})
    find_tokenizer()
    nowhere.cached = lambda *names: str(tmp_path / "cached.json")
    find_tokenizer()
    (tmp_path / "model" / "tokenizer").mkdir(parents=True)
    find_tokenizer(model_folder=tmp_path / "model")
    environment(SDINPAINT_TOKENIZER=tmp_path / "variable")
    find_tokenizer(model_folder=tmp_path / "model")
    find_tokenizer(tmp_path / "explicit", model_folder=tmp_path / "model")
    assert used == [
        nowhere.fetched,
        bpe_file,
        tmp_path / "cached.json",
        tmp_path / "model" / "tokenizer",
        tmp_path / "variable",
        tmp_path / "explicit",
    ]


def test_package_is_found_without_being_imported(nowhere, bpe_file, substitute):
    substitute(finding, PACKAGE_FILES={"no_such_package": "x", "open_clip": bpe_file.name})
    assert find_tokenizer(offline=True).vocab_size == CLIP_ROWS
    assert "open_clip" not in sys.modules


def test_cached_file_is_found(nowhere, clip, tmp_path):
    clip.save(tmp_path)
    repository = "stabilityai/stable-diffusion-2-inpainting"
    cached = {(repository, "tokenizer/vocab.json"): str(tmp_path / "vocab.json")}
    nowhere.cached = lambda *names: cached.get(names)
    assert find_tokenizer(offline=True, pad_id=0)("")[0, -1] == 0


@pytest.mark.parametrize("offline", [True, None, False])
def test_nothing_found_lists_every_way(nowhere, offline, environment):
    if offline is None:
        environment(HF_HUB_OFFLINE=1)
    with pytest.raises(TokenizerError) as caught:
        find_tokenizer(offline=offline)
    assert caught.value.code == "TOKENIZER_NOT_FOUND"
    for way in (
        "pip install --no-deps open_clip_torch",
        "hf download openai/clip-vit-large-patch14 tokenizer.json",
        "tokenizer=",
        "export SDINPAINT_TOKENIZER=",
    ):
        assert way in str(caught.value)
    assert len(nowhere.downloads) == (0 if offline is not False else 1)
    assert ("download from openai" in str(caught.value)) == (offline is False)


def test_foreign_vocabulary_in_a_known_place_is_passed_over_and_named(nowhere, small, tmp_path):
    small.save(tmp_path)
    nowhere.cached = lambda *names: str(tmp_path / "vocab.json")
    with pytest.raises(TokenizerError, match=f"vocabulary of {small.vocab_size} tokens"):
        find_tokenizer(offline=True)


def test_small_model_takes_the_vocabulary_in_its_folder(nowhere, small, tmp_path):
    small.save(tmp_path / "tokenizer")
    found = find_tokenizer(model_folder=tmp_path, embedding_rows=small.vocab_size)
    assert torch.equal(found(CORPUS), small(CORPUS))
    assert find_tokenizer(small, embedding_rows=small.vocab_size) is small


def test_variable_with_clips_vocabulary_does_not_disturb_a_small_model(nowhere, small, bpe_file, tmp_path, environment):
    small.save(tmp_path / "tokenizer")
    environment(SDINPAINT_TOKENIZER=bpe_file)
    assert find_tokenizer(model_folder=tmp_path, embedding_rows=small.vocab_size).vocab == small.vocab
    assert find_tokenizer(model_folder=tmp_path).vocab_size == CLIP_ROWS


def test_small_model_without_one_does_not_get_clips(nowhere, bpe_file, substitute):
    substitute(finding, PACKAGE_FILES={"open_clip": bpe_file.name})
    with pytest.raises(TokenizerError, match="800 embedding rows"):
        find_tokenizer(embedding_rows=800)


def _swapped_merges(clip):
    merges = [clip.merges[1], clip.merges[0], *clip.merges[2:]]
    return Tokenizer.from_merges(merges)


def _swapped_ids(clip):
    other = dict(clip.vocab)
    other["cat</w>"], other["dog</w>"] = other["dog</w>"], other["cat</w>"]
    return Tokenizer(other, clip.merges)


@pytest.mark.parametrize("change", [_swapped_merges, _swapped_ids, lambda clip: train_tokenizer(CORPUS, 560)])
@pytest.mark.parametrize("way", ["explicit", "instance", "model"])
def test_foreign_vocabulary_is_refused(nowhere, clip, tmp_path, change, way):
    other = change(clip)
    other.save(tmp_path / "tokenizer")
    arguments = {"explicit": (tmp_path / "tokenizer",), "instance": (other,), "model": (None, tmp_path)}
    with pytest.raises(TokenizerError) as caught:
        find_tokenizer(*arguments[way])
    assert caught.value.code == "TOKENIZER_MISMATCH"


def test_sha256_is_over_the_merges_in_order(clip):
    text = "\n".join(f"{left} {right}" for left, right in clip.merges)
    assert merges_sha256(clip.merges) == hashlib.sha256(text.encode()).hexdigest()
    assert merges_sha256(clip.merges[:-1]) != merges_sha256(clip.merges)


# broken files


def _write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


BROKEN = {
    "empty": {"vocab.json": ""},
    "binary": {"vocab.json": b"\xff\xfe\x00"},
    "list": {"vocab.json": "[1, 2]"},
    "deep": {"vocab.json": "[" * 100_000},
    "no specials": {"vocab.json": '{"a": 0}'},
    "gap": {"vocab.json": json.dumps({START: 0, END: 2})},
    "float ids": {"vocab.json": json.dumps({START: 0.0, END: 1.0})},
    "text ids": {"vocab.json": json.dumps({START: "0", END: "1"})},
    "one-part merge": {"vocab.json": json.dumps({START: 0, END: 1}), "merges.txt": "ab\n"},
    "unknown merge": {"vocab.json": json.dumps({START: 0, END: 1}), "merges.txt": "#version: 0.2\na b\n"},
    "not rebuildable": {"vocab.json": json.dumps({"a": 0, "abc": 1, START: 2, END: 3})},
    "half a tokenizer": {"tokenizer.json": '{"model": {"merges": []}}'},
    "no file": {"readme.txt": "hello"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_is_refused_by_name(tmp_path, name):
    _write(tmp_path, BROKEN[name])
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.code == "TOKENIZER_BROKEN"
    assert str(tmp_path) in caught.value.subject
    assert caught.value.found
    assert caught.value.hint


@pytest.mark.parametrize("keep", [0, 1, 10, 200_000, -8])
def test_cut_bpe_file_is_refused(bpe_file, tmp_path, keep):
    cut = tmp_path / "cut.txt.gz"
    cut.write_bytes(bpe_file.read_bytes()[:keep])
    with pytest.raises(TokenizerError):
        find_tokenizer(cut)


def test_missing_path_is_refused(nowhere, tmp_path):
    with pytest.raises(TokenizerError, match="no such file"):
        find_tokenizer(tmp_path / "absent.json")


def fifo(folder):
    os.mkfifo(folder / "vocab.json")
    return folder


def fifo_beside(folder):
    (folder / "vocab.json").write_text(json.dumps({START: 0, END: 1}))
    os.mkfifo(folder / "merges.txt")
    return folder / "vocab.json"


def long_token(folder):
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "x" * 3_000_000: 1, START: 2, END: 3}))
    return folder


def long_tokens(folder):
    (folder / "vocab.json").write_text(json.dumps({f"{number:0900}": number for number in range(15_000)}))
    return folder


def many_merges(folder):
    (folder / "vocab.json").write_text(json.dumps({START: 0, END: 1}))
    (folder / "merges.txt").write_text("a b\n" * 4_000_000)
    return folder


def bomb(folder):
    (folder / "bomb.txt.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    return folder / "bomb.txt.gz"


def large(folder):
    (folder / "vocab.json").write_bytes(b" " * 20_000_000)
    return folder


def nested(folder):
    (folder / "tokenizer.json").write_bytes(b'{"a":' * 2_000_000)
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (fifo, "pipe"),
        (fifo_beside, "merges.txt: a pipe"),
        (long_token, "a token of 3000000 characters, where at most 1000"),
        (long_tokens, "too long to rebuild"),
        (many_merges, "4000000 merges, where at most 500000"),
        (bomb, "more than 16777216 bytes when unpacked"),
        (large, "more than 16777216 bytes"),
        (nested, "Recursion"),
        (lambda _: "/dev/zero", "a pipe, socket or device"),
    ],
)
def test_hostile_vocabularies_cost_little(tmp_path, make, says):
    path = make(tmp_path)
    begin = time.monotonic()
    with pytest.raises(TokenizerError, match=says) as caught:
        find_tokenizer(path)
    assert time.monotonic() - begin < 1
    assert caught.value.code == "TOKENIZER_BROKEN"


HUGE = {
    "words": "a red fox " * 1_000_000,
    "one word": "abcdefghij" * 1_000_000,
    "accents": "e" + "\u0301" * 10_000_000,
    "spaces": " " * 10_000_000,
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("read", [lambda small, text: small(text), lambda small, text: small.doubt(text)])
def test_a_prompt_of_megabytes_is_refused_at_once(small, name, read):
    begin = time.monotonic()
    with pytest.raises(SettingError, match=f"{len(HUGE[name])} characters") as caught:
        read(small, HUGE[name])
    assert time.monotonic() - begin < 0.1
    assert caught.value.code == "SETTING_PROMPT"
    assert "at most 100000" in caught.value.expected


@pytest.mark.parametrize("name", HUGE)
def test_the_longest_prompt_takes_less_than_a_second(small, name):
    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdInpaintWarning)
        assert small(HUGE[name][:100_000]).shape == (1, 77)
    assert time.monotonic() - begin < 1


def test_flipped_bytes_never_pass(clip, tmp_path):
    clip.save(tmp_path)
    path = tmp_path / "merges.txt"
    good = path.read_bytes()
    generator = random.Random(0)
    for _ in range(5):
        place = generator.randrange(20, len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(TokenizerError):
            find_tokenizer(tmp_path)


# transformers


def _peer(folder):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def _compare(tokenizer, peer, prompts):
    expected = peer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdInpaintWarning)
        ids = tokenizer(prompts).tolist()
    differing = [prompt for prompt, ours, theirs in zip(prompts, ids, expected, strict=True) if ours != theirs]
    assert not differing, f"{len(differing)} of {len(prompts)} differ, e.g. {differing[0]!r}"


def _random_prompts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    ranges = [(32, 127), (0, 32), (0xA0, 0x250), (0x300, 0x370), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0x1F600, 0x1F650)]
    ranges += [(0x200B, 0x2030), (0x1F3FB, 0x1F400), (0xFF00, 0xFFF0), (0x370, 0x600), (0xE000, 0xE010)]
    pieces = ["'s", "'RE", START, END, END.upper(), "</w>", " ", "  ", "don't", "red fox", "!?", "3d", "8K", "\u0130"]
    return [
        "".join(
            generator.choice(pieces)
            if generator.random() < 0.3
            else chr(generator.randrange(*generator.choice(ranges)))
            for _ in range(generator.randrange(40))
        )
        for _ in range(count)
    ]


@pytest.mark.peer
def test_real_vocabulary_gives_transformers_ids(clip, tmp_path):
    clip.save(tmp_path)
    _compare(clip, _peer(tmp_path), [prompt for prompt, _ in GOLDEN] + _random_prompts(3000, seed=1))


@pytest.mark.peer
def test_padding_that_is_special_gives_transformers_ids(clip, tmp_path):
    special = Tokenizer(clip.vocab, clip.merges, pad_id=0, pad_is_special=True)
    special.save(tmp_path)
    peer = _peer(tmp_path)
    assert peer.pad_token == "!"
    prompts = [prompt for prompt, _ in GOLDEN] + [prompt for prompt, *_ in EXCLAMATIONS]
    _compare(special, peer, prompts)
    with pytest.raises(AssertionError, match="differ"):
        _compare(clip.with_padding(0), peer, prompts)


@pytest.mark.peer
def test_saved_folder_loads_in_transformers(small, tmp_path):
    small.save(tmp_path)
    peer = _peer(tmp_path)
    assert len(peer) == small.vocab_size
    assert peer.pad_token_id == small.end_id
    _compare(small, peer, [*CORPUS, " ".join(CORPUS), *_random_prompts(500, seed=2)])


@pytest.mark.peer
def test_comparison_sees_another_padding(small, tmp_path):
    small.save(tmp_path)
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        _compare(Tokenizer(small.vocab, small.merges, pad_id=0), _peer(tmp_path), ["a red ball"])
