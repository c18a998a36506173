"""Configurations and vocabularies that are broken, absurd, or another model's: in files, and made in Python."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from builders import TEXT_FILE, UNET_FILE, rewrite, rewrite_json
from closeness import same_image
from refusals import INF, NAN, inpaint, load, refused

from sdinpaint.errors import CheckpointError, SettingError, TokenizerError, said
from sdinpaint.families import SD2, SD15, SDXL
from sdinpaint.models import ControlNetConfig, UNet
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
        ("unet", "attention_head_dim", [5, -3, 0.5, "3", {}, [], [5, 5, 5], [0, 0, 0], [-3, -6, -9], [None]]),
        ("unet", "attention_head_dim", [[3, 6], [3, 6, 9, 12], [3, 6, "9"], [3, 6, None], [5, 10, 15], [3, 6, 12]]),
        ("unet", "sample_size", [0, -1, [64, 64], 10**30]),
        ("unet", "in_channels", [4, 0, "9"]),
        ("vae", "norm_num_groups", [3, 0, 10**6]),
        ("vae", "scaling_factor", [0, -1, NAN, INF, "0.18", [0.18], True]),
        ("text_encoder", "num_attention_heads", [5, 0, -7, 28.0]),
        ("scheduler", "num_train_timesteps", [0, -1, 10**12, "1000"]),
        ("unet", "norm_eps", [0, -1e-5, NAN, INF, "1e-5", True]),
        ("unet", "freq_shift", [-1, NAN, "0", True]),
        ("vae", "latents_mean", [[0.1] * 3, [NAN] * 4, "0", [True] * 4, 0.5, [0.1] * 4]),
        ("vae", "latents_std", [[0.0] * 4, [-1.0] * 4, [INF] * 4, [1.0] * 4]),
        ("text_encoder", "layer_norm_eps", [0, NAN, "1e-5"]),
        ("text_encoder", "num_hidden_layers", [0, -1, 2.5, "3", True]),
        ("scheduler", "beta_start", [0, -0.1, NAN, INF, "0", True, 0.5, 1e-300]),
        ("scheduler", "beta_end", [1.5, 1e5, 0, NAN, [0.1], True, 0.0001]),
        ("scheduler", "steps_offset", [-1, 0.5]),
        ("scheduler", "set_alpha_to_one", ["false", 0, []]),
        ("scheduler", "clip_sample", ["false", 1]),
        ("scheduler", "rescale_betas_zero_snr", ["no", 1]),
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
    rewrite_json(folder / "text_encoder/config.json", hidden_size=10**12, num_hidden_layers=10**6, vocab_size=-1)
    assert same_image(inpaint(load(folder)).image, usual)


def test_one_number_of_heads_for_each_level(folder):
    path = folder / "unet/config.json"
    for heads, alike in (([3, 3, 3], 3), ([3, 6, 9], None)):
        rewrite_json(path, attention_head_dim=heads)
        assert load(folder).family.unet.num_heads == alike


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (TEXT_FILE, "text_model.encoder.layers.{}.mlp.fc1.weight"),
        (UNET_FILE, "down_blocks.0.attentions.0.transformer_blocks.{}.norm1.weight"),
        (UNET_FILE, "mid_block.attentions.0.transformer_blocks.{}.norm1.weight"),
    ],
)
@pytest.mark.parametrize("numbers", [[10**9], range(1, 4000)], ids=["one", "many"])
def test_numbers_in_names_are_no_sizes(folder, file, name, numbers):
    rewrite(folder / file, lambda state: state | {name.format(number): torch.ones(1) for number in numbers})
    start = time.monotonic()
    refused(CheckpointError, "CKPT_KEYS", lambda: load(folder), folder / file)
    assert time.monotonic() - start < 10


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


NO_COUNTS = [0, -1, 2.5, "4", None, True, [4], NAN]
CONTROLNET = ControlNetConfig(unet=SD15.unet, hint_widths=(16, 32, 96, 256))
WHOLE = {
    "unet": ("in_channels", "out_channels", "model_channels", "num_res_blocks", "context_dim", "norm_groups"),
    "vae": ("in_channels", "latent_channels", "channels", "num_res_blocks", "norm_groups"),
    "text": ("vocab_size", "context_length", "width", "mlp_width", "num_layers", "num_heads"),
}
FIELDS = [
    *((getattr(SD15, part), name, NO_COUNTS) for part, names in WHOLE.items() for name in names),
    (SD15.unet, "model_channels", [319]),
    (SD15.unet, "norm_groups", [7, 640]),
    (SD15.unet, "middle_depth", [-1, "1", None]),
    (SD15.unet, "num_heads", [7, 0, -8, "8"]),
    (SD2.unet, "head_dim", [60, 0, -64, "64"]),
    (SD2.unet, "num_heads", [5]),
    (SDXL.unet, "vector_dim", [0, -2816, "2816"]),
    (SD15.unet, "channel_mult", [(), 4, "1244", (1, 2, 4, "4"), (1, 2, 4, -4), (1, 2, 4, 0), None]),
    (SD15.unet, "transformer_depth", [(1, 1, 1), (1, 1, 1, 0, 0), (1, 1, 1, -1), (), 1, "1110"]),
    (SD15.unet, "linear_projection", [None, 0, "no"]),
    (SD15.vae, "norm_groups", [3, 256]),
    (SD15.vae, "channel_mult", [(), 4, (1, 2, 2.5), (1, -2)]),
    (SD15.vae, "scaling_factor", [0, -0.18, NAN, INF, "0.18", None, True]),
    (SD15.text, "num_heads", [7, 1024]),
    (SD15.text, "activation", ["relu", None, 3, []]),
    (SD15.text, "skip_last", [-1, 13, "1", None]),
    (SD15.text, "pad_id", [-1, 49408, "0"]),
    (SD15.text, "final_norm", [None, 1, "yes"]),
    (SD15.text, "projection_dim", [0, -768, "768"]),
    (CONTROLNET, "unet", [None, SD15.vae, {}]),
    (CONTROLNET, "hint_widths", [(), 16, (16, 0), (16, -32), ("16",), None]),
]


@pytest.mark.parametrize(
    ("config", "name", "values"), FIELDS, ids=[f"{type(config).__name__}.{name}" for config, name, _ in FIELDS]
)
def test_wrong_field_of_a_configuration_made_by_hand(config, name, values):
    for value in values:
        make = partial(replace, config, **{name: value})
        error = refused(SettingError, "SETTING_CONFIG", make, f"{type(config).__name__}.{name}")
        assert (error.found, bool(error.expected)) == (said(value), True)


def test_fields_that_do_not_fit_each_other_are_named_with_what_they_must_fit():
    for name, value, expected in [
        ("num_heads", 7, "divides the widths of the levels with attention, [320, 640, 1280]"),
        ("norm_groups", 7, "divides model_channels 320"),
        ("transformer_depth", (1, 1), "one number for each of channel_mult (1, 2, 4, 4)"),
        ("num_heads", None, "one of num_heads and head_dim, and None for the other; head_dim is None"),
        ("head_dim", 64, "one of num_heads and head_dim, and None for the other; head_dim is 64"),
    ]:
        refused(SettingError, "SETTING_CONFIG", partial(replace, SD15.unet, **{name: value}), expected)


def test_heads_need_to_divide_only_the_widths_that_attend():
    config = replace(SD15.unet, model_channels=32, channel_mult=(1, 2, 3), transformer_depth=(0, 1, 0), middle_depth=0)
    with torch.device("meta"):
        UNet(replace(config, num_heads=64))


def test_lists_of_a_configuration_become_tuples():
    config = replace(SD15.unet, channel_mult=[1, 2, 4, 4], transformer_depth=[1, 1, 1, 0])
    assert config == SD15.unet
    assert hash(config) == hash(SD15.unet)


def test_heads_of_a_file_that_do_not_divide_its_widths(folder):
    """Where the file does not say how many there are, the default of diffusers counts."""
    path = folder / "unet/config.json"
    rewrite_json(path, attention_head_dim=None)
    words = folder, "attention_head_dim is 8", "config=FOLDER"
    error = refused(CheckpointError, "CKPT_BAD_CONFIG", lambda: load(folder), *words)
    assert "divides the widths" in error.expected
