"""Settings and vocabularies beside the weights that are broken, absurd, or another model's."""

from __future__ import annotations

import json

import pytest
from builders import rewrite_json
from closeness import same_picture
from refusals import INF, NAN, inpaint, load, refused

from sdinpaint.errors import CheckpointError, TokenizerError
from sdinpaint.text.tokenizer import train_tokenizer


@pytest.mark.parametrize(
    "text",
    ["", "{", "<html>", "[1]", "3", "null", '{"a": NaN', "[" * 100_000, "\udcff", "9" * 5000],
)
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_configuration_that_is_no_table(folder, file, text):
    (folder / file).write_text(text, "utf-8", "surrogateescape")
    refused(CheckpointError, "CKPT_BAD_CONFIG", lambda: load(folder), folder / file)


def test_configuration_of_many_megabytes(folder):
    (folder / "vae/config.json").write_text(json.dumps({"a": "b" * 2_000_000}))
    refused(CheckpointError, "CKPT_BAD_CONFIG", lambda: load(folder), folder / "vae/config.json", "bytes")


@pytest.mark.parametrize(
    ("component", "name", "values"),
    [
        ("unet", "norm_num_groups", [7, 0, -4, 2.5, "4", True, 2_000_000, [4]]),
        ("unet", "attention_head_dim", [5, -3, 0.5, "3", {}, [], [3, 3, 3], [0, 0, 0], [-3, -6, -9], [None]]),
        ("unet", "sample_size", [0, -1, [64, 64], 10**30]),
        ("unet", "in_channels", [4, 0, "9"]),
        ("vae", "norm_num_groups", [3, 0, 10**6]),
        ("vae", "scaling_factor", [0, -1, NAN, INF, "0.18", [0.18], True]),
        ("text_encoder", "num_attention_heads", [5, 0, -7, 28.0]),
        ("text_encoder", "hidden_act", ["relu", 3, [], {}]),
        ("scheduler", "prediction_type", ["sample", None, 3, [], {}]),
        ("scheduler", "beta_schedule", ["linear", "squaredcos_cap_v2", None, []]),
        ("scheduler", "trained_betas", [[0.1] * 1000]),
        ("scheduler", "num_train_timesteps", [0, -1, 10**12, "1000"]),
        ("scheduler", "beta_start", [0, -0.1, NAN, "0"]),
        ("scheduler", "beta_end", [1.5, 1e5, 0, [0.1]]),
        ("scheduler", "steps_offset", [-1, 0.5]),
    ],
)
def test_absurd_values_in_a_configuration(folder, component, name, values):
    path = folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    good = path.read_text()
    for value in values:
        path.write_text(good)
        rewrite_json(path, **{name: value})
        refused(CheckpointError, "CKPT_BAD_CONFIG", lambda: load(folder), folder)


def test_sizes_in_a_configuration_are_not_believed(folder, usual):
    rewrite_json(folder / "unet/config.json", block_out_channels=[2_000_000] * 99, layers_per_block=10**9)
    rewrite_json(folder / "vae/config.json", block_out_channels="none", latent_channels=10**9)
    rewrite_json(folder / "text_encoder/config.json", hidden_size=10**12, num_hidden_layers=10**9, vocab_size=-1)
    assert same_picture(inpaint(load(folder)).image, usual)


@pytest.mark.parametrize("rows", [514, 600])
def test_vocabulary_of_another_size(folder, source, rows):
    words = [f"{a}{b} {a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    other = train_tokenizer(words, rows)
    assert other.vocab_size == rows
    refused(TokenizerError, "TOKENIZER_MISMATCH", lambda: load(source, tokenizer=other), "tokenizer", f"{rows} tokens")
    other.save(folder / "tokenizer")
    refused(TokenizerError, "TOKENIZER_MISMATCH", lambda: load(folder), folder / "tokenizer", f"{rows} tokens")


def test_broken_vocabulary(folder, source):
    (folder / "tokenizer/vocab.json").write_text("{")
    refused(TokenizerError, "TOKENIZER_BROKEN", lambda: load(folder), folder / "tokenizer")
    none = folder / "nothing"
    refused(TokenizerError, "TOKENIZER_BROKEN", lambda: load(source, tokenizer=none), none)
