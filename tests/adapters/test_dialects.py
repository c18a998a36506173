"""Every dialect in which adapters circulate: the same LoRA makes the same weights, whoever wrote the file."""

from __future__ import annotations

import json
import math

import pytest
import torch
from adapters import (
    DIALECTS,
    Drawn,
    assert_weights,
    in_dialect,
    kohya,
    layers,
    lora,
    peft,
    prefixed,
    same,
    weights,
    write,
)
from builders import as_sd2, as_sdxl, random_pipeline, small
from refusals import refused
from torch import nn

from sdinpaint.errors import AdapterError, SdInpaintWarning

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def models(tiny, vocabulary):
    """A small pipeline of each family."""
    kinds = {"sd1": tiny, "sd2": as_sd2(tiny), "sdxl": as_sdxl(tiny)}
    return {kind: random_pipeline(small(family), vocabulary) for kind, family in kinds.items()}


def low_rank(pipe):
    """A LoRA for every third layer, of each kind: layer -> its parts by kohya's names, and its delta."""
    draw = Drawn()
    return {layer: lora(draw, tuple(layer.module.weight.shape)) for layer in layers(pipe)[::3]}


def weight_of(layer):
    return layer.network, f"{layer.official}.weight"


def deltas_of(made):
    return {weight_of(layer): delta(None) for layer, (_, delta) in made.items()}


def tensors_of(made, spell=kohya):
    return {f"{spell(layer)}.{part}": one for layer, (parts, _) in made.items() for part, one in parts.items()}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_dialect_makes_the_same_weights(models, tmp_path, kind):
    pipe = models[kind]
    before, made, sums = weights(pipe), low_rank(pipe), {}
    wanted = deltas_of(made)
    for name, dialect in DIALECTS.items():
        held = {layer: one for layer, one in made.items() if layer.network in dialect.networks}
        if dialect.attention:
            held = {layer: one for layer, one in held.items() if layer.diffusers.endswith(ATTENTION)}
        tensors = {}
        for layer, (parts, _) in held.items():
            tensors |= in_dialect(dialect, layer, parts)
        with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)) as added:
            assert sum(added.modules.values()) == len(held), name
            assert_weights(pipe, before, {key: wanted[key] for key in map(weight_of, held)})
            sums[name] = {key: one for key, one in weights(pipe).items() if key in {*map(weight_of, held)}}
    assert same(pipe, before)
    assert all(torch.equal(one, sums["kohya"][key]) for found in sums.values() for key, one in found.items())


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_configuration_of_peft(models, tmp_path, kind, rank_stabilized):
    """Alphas by module, where a pattern fits the end of a name; ranks are those of the tensors."""
    pipe = models[kind]
    before, draw, made, deltas = weights(pipe), Drawn(), {}, {}
    for layer in layers(pipe, nn.Linear):
        if layer.network != "unet":
            continue
        rank = 2 if layer.diffusers.endswith("to_k") else 4
        parts, delta = made[layer] = lora(draw, tuple(layer.module.weight.shape), rank)
        alpha = 6.0 if layer.diffusers.endswith("to_q") else 3.0
        factor = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        deltas[layer.network, f"{layer.official}.weight"] = 2 * factor * delta(None)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 3,
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"to_q": 6},
        "use_rslora": rank_stabilized,
    }
    tensors = {}
    for layer, (parts, _) in made.items():
        ends = {"lora_A.weight": parts["lora_down.weight"], "lora_B.weight": parts["lora_up.weight"]}
        tensors |= {f"{peft(layer)}.{end}": one for end, one in ends.items()}
    folder = tmp_path / "fox"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for source in (folder, folder / "adapter_model.safetensors"):
        with pipe.adapted(source) as added:
            assert added.name == "fox"
            assert_weights(pipe, before, deltas)
    inside = {f"unet.{key}": value for key, value in config.items()}
    renamed = {key.replace("base_model.model", "unet"): one for key, one in tensors.items()}
    file = write(tmp_path / "bear.safetensors", renamed, {"lora_adapter_metadata": json.dumps(inside)})
    with pipe.adapted(file):
        assert_weights(pipe, before, deltas)
    assert same(pipe, before)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3", "OFT"])
def test_other_methods_of_peft_are_refused_by_name(models, tmp_path, kind):
    """Their configurations have other factors."""
    pipe = models["sd1"]
    layer = layers(pipe, nn.Linear)[0]
    parts, _ = lora(Drawn(), tuple(layer.module.weight.shape))
    write(tmp_path / "adapter_model.safetensors", {f"{peft(layer)}.{part}": one for part, one in parts.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "alpha": 16}))
    refused(AdapterError, "ADAPTER_KIND", lambda: pipe.add_lora(tmp_path), kind)


def test_a_scale_takes_the_place_of_alpha_and_an_alpha_of_0_counts_as_none(models, tmp_path):
    pipe = models["sd1"]
    before, made = weights(pipe), low_rank(pipe)
    tensors, plain = tensors_of(made), deltas_of(made)
    given = {
        "scale": ({key.replace("alpha", "scale"): one for key, one in tensors.items()}, 1.5 / 0.5),
        "alpha of 0": ({key: 0 * one if key.endswith("alpha") else one for key, one in tensors.items()}, 2),
        "none": ({key: one for key, one in tensors.items() if not key.endswith("alpha")}, 2),
        "both": (tensors | {key.replace("alpha", "scale"): one for key, one in tensors.items()}, 3),
    }
    for name, (held, factor) in given.items():
        with pipe.adapted(write(tmp_path / f"{name}.safetensors", held)):
            assert_weights(pipe, before, {key: factor * one for key, one in plain.items()})
    mixed = {key: one for key, one in tensors.items() if not (key.endswith("alpha") and "attn1" in key)}
    wanted = {key: one * (2 if "attn1" in key[1] else 1) for key, one in plain.items()}
    with pipe.adapted(write(tmp_path / "some.safetensors", mixed)):
        assert_weights(pipe, before, wanted)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_kernels_of_1_x_1_may_be_matrices_and_the_reverse(models, tmp_path, kind):
    pipe = models[kind]
    before, made = weights(pipe), low_rank(pipe)
    tensors = {}
    for key, one in tensors_of(made).items():
        kernel = one.ndim == 4 and one.shape[2:] == (1, 1)
        tensors[key] = one.flatten(1) if kernel else one[:, :, None, None] if one.ndim == 2 else one
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)):
        assert_weights(pipe, before, deltas_of(made))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_dtype_of_files_is_computed_in_float32(models, tmp_path, dtype):
    pipe = models["sd1"]
    before, made = weights(pipe), low_rank(pipe)
    stored = {key: one.to(dtype) for key, one in tensors_of(made).items()}
    deltas = {}
    for layer, (parts, _) in made.items():
        down, up = (parts[f"lora_{name}.weight"].to(dtype).double().flatten(1) for name in ("down", "up"))
        alpha = float(parts["alpha"].to(dtype))
        deltas[layer.network, f"{layer.official}.weight"] = alpha / 3 * (up @ down).reshape(layer.module.weight.shape)
    with pipe.adapted(write(tmp_path / "fox.safetensors", stored)):
        assert_weights(pipe, before, deltas)


@pytest.mark.parametrize("ending", ["pt", "bin", "ckpt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_read_too(models, tmp_path, ending, legacy):
    pipe = models["sd1"]
    before, made = weights(pipe), low_rank(pipe)
    path = tmp_path / f"some name v1.0 (final).{ending}"
    torch.save(tensors_of(made), path, _use_new_zipfile_serialization=not legacy)
    with pipe.adapted(path) as added:
        assert added.name == "some name v1.0 (final)"
        assert_weights(pipe, before, deltas_of(made))


def test_adapters_of_any_name_in_peft(models, tmp_path):
    pipe = models["sd1"]
    before, made = weights(pipe), low_rank(pipe)
    tensors = {}
    for layer, (parts, _) in made.items():
        ends = {"lora_A": parts["lora_down.weight"], "lora_B": parts["lora_up.weight"] / 2}
        tensors |= {f"{prefixed(layer)}.{end}.my-style_2.weight": one for end, one in ends.items()}
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)):
        assert_weights(pipe, before, deltas_of(made))


def test_the_last_layer_of_sd2_which_does_not_compute_is_left_out(models, tmp_path):
    """Some trainers give SD 2's text encoder 24 layers, whose last one nothing reads."""
    pipe = models["sd2"]
    before, made = weights(pipe), low_rank(pipe)
    last = pipe.family.text.num_layers - 1
    extra = {
        key.replace(f"layers_{last}_", f"layers_{last + 1}_"): one
        for key, one in tensors_of(made).items()
        if f"layers_{last}_" in key
    }
    file = write(tmp_path / "fox.safetensors", tensors_of(made) | extra)
    with pipe.adapted(file) as added:
        assert sorted(added.skipped) == sorted(extra)
        assert_weights(pipe, before, deltas_of(made))
    beyond = {key.replace(f"layers_{last + 1}_", f"layers_{last + 2}_"): one for key, one in extra.items()}
    file = write(tmp_path / "bear.safetensors", tensors_of(made) | beyond)
    refused(AdapterError, "ADAPTER_KEYS", lambda: pipe.add_lora(file), len(beyond))


def test_an_embedding_within_the_file_comes_and_goes_with_it(models, tmp_path):
    pipe = models["sd1"]
    before, made = weights(pipe), low_rank(pipe)
    vectors = Drawn(3)(2, pipe.family.text.width)
    inside = {"bundle_emb.my-Word.string_to_param.*": vectors, "bundle_emb.other.emb_params": vectors + 1}
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors_of(made) | inside)):
        assert_weights(pipe, before, deltas_of(made))
        assert set(pipe.embeddings) == {"my-Word", "other"}
        assert len(pipe.embeddings["my-Word"].vectors)
    assert not pipe.embeddings


def test_keys_that_are_left_out_are_listed(models, tmp_path):
    pipe = models["sd1"]
    before, made = weights(pipe), low_rank(pipe)
    odd = {"lora_unet_nothing.lora_down.weight": torch.ones(2, 2), "something": torch.ones(1)}
    file = write(tmp_path / "fox.safetensors", tensors_of(made) | odd)
    refused(AdapterError, "ADAPTER_KEYS", lambda: pipe.add_lora(file), 2, *odd)
    assert same(pipe, before)
    with pytest.warns(SdInpaintWarning, match="2 keys"):
        added = pipe.add_lora(file, strict=False)
    assert set(added.skipped) == set(odd)
    assert_weights(pipe, before, deltas_of(made))
    pipe.clear_loras()
