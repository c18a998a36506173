"""Adapter files as people have them: further spellings, names and configurations, and what is wrong with some."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch
from adapters import PAIRS, Drawn, kohya, layers, lora, same, underscored, weights, write
from builders import as_sd2, as_sdxl, random_pipeline, single_file, small
from hub_server import read_tree
from refusals import refused
from sdinpaint_weights.adapter_names import spellings

from sdinpaint.adapters.stack import targets_in
from sdinpaint.errors import AdapterError, CheckpointError, SdInpaintWarning

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
SAMPLE = re.compile(
    r"conv_in|conv_out|mid_block\.attentions\.0\.(?:proj_in|transformer_blocks\.0\.attn1)"
    r"|text_model\.encoder\.layers\.0\.|text_projection"
)
"""Matches layers of every kind."""


@pytest.fixture(scope="module")
def pipe(tiny, vocabulary):
    """A small random pipeline of SD 1."""
    return random_pipeline(small(tiny), vocabulary)


@pytest.fixture(scope="module")
def sd2(tiny, vocabulary):
    """One of SD 2."""
    return random_pipeline(small(as_sd2(tiny)), vocabulary)


@pytest.fixture(scope="module")
def sdxl(tiny, vocabulary):
    """One of SDXL."""
    return random_pipeline(small(as_sdxl(tiny)), vocabulary)


def spelled(pipe, spell):
    """LoRAs of the layers that have a name, in PEFT's pairs, and the same ones in kohya's names."""
    draw, tensors, plain = Drawn(), {}, {}
    for layer in layers(pipe):
        if SAMPLE.match(layer.diffusers) and (stem := spell(layer)):
            parts, _ = lora(draw, tuple(layer.module.weight.shape))
            ends = dict(zip(PAIRS["lora_down"], PAIRS["lora_A"], strict=True)) | {".alpha": ".alpha"}
            tensors |= {stem + ends[f".{name}"]: one for name, one in parts.items()}
            plain |= {f"{kohya(layer)}.{name}": one for name, one in parts.items()}
    return tensors, plain


def of(stem, **parts):
    """Tensors of ones: a part, with `__` for dots -> its shape, or a number."""
    shaped = {name: torch.ones(one) if isinstance(one, tuple) else torch.tensor(one) for name, one in parts.items()}
    return {f"{stem}.{name.replace('__', '.')}": one for name, one in shaped.items()}


def folder_of(folder, tensors, config):
    """Write a folder of PEFT."""
    folder.mkdir()
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# Spellings


def of_text(start, change=lambda name: name):
    return lambda layer: start + change(layer.diffusers) if layer.network == "text_encoder" else ""


def flat(name):
    return name.removeprefix("text_model.")


def peft(layer):
    return f"base_model.model.{layer.network}.{layer.diffusers}"


def bare_clip(layer):
    return f"diffusion_model.{layer.official}" if layer.network == "unet" else f"clip_l.{layer.official}"


SPELLINGS = {
    "the official UNet and a bare text encoder": ("pipe", bare_clip),
    "all text encoders": ("pipe", of_text("text_encoders.clip_l.transformer.")),
    "LyCORIS around a text encoder": ("pipe", of_text("lycoris_", underscored)),
    "transformers 5": ("pipe", of_text("text_encoder.", flat)),
    "PEFT and transformers 5": ("pipe", of_text("base_model.model.", flat)),
    "kohya and transformers 5": ("pipe", of_text("lora_te_", lambda name: underscored(flat(name)))),
    "a PEFT folder of all networks": ("pipe", peft),
    "SD 2": ("sd2", of_text("clip_h.transformer.")),
    "SD 2, bare": ("sd2", of_text("clip_h.")),
    "SD 2, all text encoders": ("sd2", of_text("text_encoders.clip_h.transformer.")),
    "SDXL": ("sdxl", lambda layer: f"clip_g.{layer.official}" if layer.network == "text_encoder_2" else ""),
    "SDXL, all text encoders": (
        "sdxl",
        lambda layer: f"text_encoders.clip_g.transformer.{layer.official}" if layer.network == "text_encoder_2" else "",
    ),
    "SDXL, a PEFT folder of all networks": ("sdxl", peft),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_further_spellings_make_the_same_weights(request, tmp_path, name):
    model, spell = SPELLINGS[name]
    pipe = request.getfixturevalue(model)
    tensors, plain = spelled(pipe, spell)
    assert len(tensors) >= 9
    with pipe.adapted(write(tmp_path / "plain.safetensors", plain)):
        expected = weights(pipe)
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)):
        assert same(pipe, expected)


@pytest.mark.parametrize("model", ["pipe", "sd2", "sdxl"])
def test_no_spelling_is_that_of_two_modules(request, model):
    targets = targets_in(request.getfixturevalue(model).networks)
    counts = Counter(spelling for target in targets for spelling in spellings([target]))
    assert len(counts) > 10 * len(targets) / 3
    assert counts.most_common(1)[0][1] == 1
    assert len({target.name for target in targets}) == len(targets)


# Names


def test_names_come_from_what_was_named(pipe, tmp_path):
    (tmp_path / "My style v1.5").mkdir()
    path = write(tmp_path / "My style v1.5" / "pytorch_lora_weights.safetensors", of(Q, diff=(36, 36)))
    (tmp_path / "link").symlink_to(path.parent)
    (tmp_path / "other.v2.safetensors").symlink_to(path)
    peft_folder = folder_of(tmp_path / "mine", of(Q, diff=(36, 36)), {"peft_type": "LORA"})
    for source, name in (
        (path, "pytorch_lora_weights"),
        (path.parent, "My style v1.5"),
        (f"{path.parent}/", "My style v1.5"),
        (tmp_path / "link", "link"),
        (tmp_path / "other.v2.safetensors", "other.v2"),
        (peft_folder, "mine"),
        (peft_folder / "adapter_model.safetensors", "mine"),
    ):
        with pipe.adapted(source) as found:
            assert found.name == name


@pytest.mark.parametrize(
    ("source", "held", "name", "alpha"),
    [
        ("fox/style", "pytorch_lora_weights.safetensors", "style", None),
        ("fox/style:sub/red.v2.safetensors", "sub/red.v2.safetensors", "red.v2", None),
        ("fox/style", "adapter_model.safetensors", "style", 8.0),
        ("fox/style:sub/adapter_model.safetensors", "sub/adapter_model.safetensors", "style", 8.0),
    ],
)
def test_of_the_hub_the_configuration_of_peft_is_fetched_too(hub, pipe, tmp_path, source, held, name, alpha):
    (tmp_path / "there" / held).parent.mkdir(parents=True)
    tensors = of("base_model.model.conv_out", lora_A__weight=(2, 12, 3, 3), lora_B__weight=(4, 2, 1, 1))
    path = write(tmp_path / "there" / held, tensors)
    if alpha:
        (path.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": alpha}))
    hub.add("fox/style", read_tree(tmp_path / "there"))
    with pipe.adapted(source) as found:
        assert found.name == name
        assert (set(found.file.alphas.values()) or {None}) == {alpha}


# PEFT's configurations


def test_patterns_may_name_the_network(pipe, tmp_path):
    tensors = {key: one for key, one in spelled(pipe, peft)[0].items() if "alpha" not in key}
    patterns = {"unet.conv_in": 6, "^mid_block.*to_q": 10, "text_encoder.*fc1": 4, "(": 3}
    folder = folder_of(tmp_path / "mine", tensors, {"lora_alpha": 2, "alpha_pattern": patterns})
    with pipe.adapted(folder) as found:
        alphas = {target.name: alpha for target, alpha in found.file.alphas.items()}
    wanted = {"conv_in": 6, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 10, "conv_out": 2}
    wanted |= {"text_encoder.text_model.encoder.layers.0.mlp.fc1": 4}
    assert {name: alphas[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("alpha", "patterns", "code"),
    [
        (8, ["to_q"], "CKPT_BAD_CONFIG"),
        (8, "to_q", "CKPT_BAD_CONFIG"),
        (8, {"conv_out": None}, "ADAPTER_VALUES"),
        (8, {"conv_out": [1]}, "ADAPTER_VALUES"),
        (float("nan"), {}, "ADAPTER_VALUES"),
        ("many", {}, "ADAPTER_VALUES"),
    ],
)
def test_alphas_that_are_no_numbers_are_refused(pipe, tmp_path, alpha, patterns, code):
    tensors = of("base_model.model.conv_out", lora_A__weight=(2, 12, 3, 3), lora_B__weight=(4, 2, 1, 1))
    folder = folder_of(tmp_path / "mine", tensors, {"lora_alpha": alpha, "alpha_pattern": patterns})
    refuse(pipe, folder, code)


def test_a_file_without_its_configuration_is_doubted(pipe, tmp_path):
    tensors = of("base_model.model.conv_out", lora_A__weight=(2, 12, 3, 3), lora_B__weight=(4, 2, 1, 1))
    path = write(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.warns(SdInpaintWarning, match=r"no adapter_config\.json"), pipe.adapted(path):
        pass


# Refusals


def refuse(pipe, path, code, *words):
    """Check that a file is refused, and that nothing has changed."""
    before = weights(pipe)
    error = refused((AdapterError, CheckpointError), code, lambda: pipe.add_lora(path), *words)
    assert same(pipe, before)
    assert not pipe.loras
    return error


def pair(stem, down, up):
    return of(stem, lora_down__weight=down, lora_up__weight=up)


SHAPES = {
    "rows and columns exchanged": pair(Q.replace("attn1_to_q", "ff_net_2"), (2, 36), (144, 2)),
    "a kernel of 1 x 9": pair("lora_unet_conv_out", (2, 12, 1, 9), (4, 2, 1, 1)),
    "kernels before channels": pair("lora_unet_conv_out", (2, 3, 12, 3), (4, 2, 1, 1)),
    "a difference turned over": of("lora_unet_time_embedding_linear_1", diff=(12, 48)),
    "a difference of other channels": of("lora_unet_conv_out", diff=(4, 3, 12, 3)),
    "blocks that do not cover": of(Q, lokr_w1=(2, 2), lokr_w2=(18, 17)),
    "a first convolution of 5 channels": pair("lora_unet_conv_in", (2, 5, 3, 3), (12, 2, 1, 1)),
    "GLoRA of another width": of(Q, a1__weight=(35, 2), a2__weight=(2, 35), b1__weight=(36, 2), b2__weight=(2, 36)),
    "GLoRA of halved columns": of(Q, a1__weight=(36, 2), a2__weight=(2, 36), b1__weight=(72, 2), b2__weight=(2, 18)),
}


@pytest.mark.parametrize("what", SHAPES)
def test_wrong_shapes_are_refused(pipe, tmp_path, what):
    error = refuse(pipe, write(tmp_path / "fox.safetensors", SHAPES[what]), "ADAPTER_SHAPE")
    if "5 channels" in what:
        assert "(12, 9, 3, 3)" in str(error)


INCOMPLETE = {
    "one core of LoHa": of(Q, hada_w1_a=(2, 36), hada_w1_b=(2, 36), hada_w2_a=(36, 2), hada_w2_b=(2, 36))
    | of(Q, hada_t1=(2, 2, 1, 1)),
    "a core beside a whole matrix": of(Q, lokr_w1=(2, 2), lokr_w2=(18, 18), lokr_t2=(2, 2, 1, 1)),
    "IA3 without its axis": of(Q, weight=(36,)) | of(f"{Q[:-1]}k", alpha=1.0),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_parts_that_do_not_go_together_are_named(pipe, tmp_path, what):
    refuse(pipe, write(tmp_path / "fox.safetensors", INCOMPLETE[what]), "ADAPTER_INCOMPLETE", Q)


def test_two_algorithms_under_two_names_are_one_module_twice(pipe, tmp_path):
    tensors = pair(Q, (2, 36), (36, 2)) | of(
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", diff=(36, 36)
    )
    refuse(pipe, write(tmp_path / "fox.safetensors", tensors), "ADAPTER_KEYS", "two names")


def test_a_checkpoint_of_another_family_is_no_adapter_of_it(pipe, sdxl, tmp_path):
    refuse(pipe, write(tmp_path / "sdxl.safetensors", single_file(sdxl)), "ADAPTER_KIND")
    refuse(sdxl, write(tmp_path / "sd1.safetensors", single_file(pipe)), "ADAPTER_KIND")


def test_a_textual_inversion_is_told_from_a_lora(pipe, tmp_path):
    refuse(
        pipe, write(tmp_path / "bad.safetensors", of("x", y=(2,)) | {"emb_params": torch.ones(2, 768)}), "ADAPTER_KIND"
    )
    alone = write(tmp_path / "good.safetensors", {"emb_params": torch.ones(2, 768)})
    refuse(pipe, alone, "ADAPTER_KIND", "add_embedding")


@pytest.mark.parametrize("key", ["oft_blocks", "oft_R.weight", "oft_r", "oft_R.default.weight", "boft_R", "oft_diag"])
def test_rotations_are_refused_by_name_before_what_else_is_wrong(pipe, tmp_path, key):
    tensors = {f"{Q}.{key}": torch.ones(3, 12, 12), f"{Q}.odd": torch.ones(1)} | of("lora_unet_odd", alpha=1.0)
    refuse(pipe, write(tmp_path / "fox.safetensors", tensors), "ADAPTER_KIND", "OFT")


@pytest.mark.parametrize("stem", ["transformer.x_embedder", "transformer.context_embedder", "lora_te3_x"])
def test_other_parts_of_transformers_tell_them_too(pipe, tmp_path, stem):
    path = write(tmp_path / "flux.safetensors", of(stem, lora_A__weight=(2, 64), lora_B__weight=(64, 2)))
    refuse(pipe, path, "ADAPTER_FAMILY", "Flux")


@pytest.mark.parametrize("stem", ["lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_input_blocks_1_1_proj_in"])
def test_sdxl_has_no_attention_at_the_first_level(sdxl, tmp_path, stem):
    path = write(tmp_path / "fox.safetensors", pair(stem, (2, 12, 1, 1), (12, 2, 1, 1)))
    refuse(sdxl, path, "ADAPTER_FAMILY", "Stable Diffusion 1 or 2")


def test_what_holds_no_tensors_is_refused(pipe, tmp_path):
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refuse(pipe, tmp_path / "empty.safetensors", "CKPT_EMPTY")
    refuse(pipe, tmp_path / "absent.safetensors", "CKPT_NOT_FOUND")
    (tmp_path / "two").mkdir()
    for name in "ab":
        write(tmp_path / "two" / f"{name}.safetensors", of(Q, diff=(36, 36)))
    refuse(pipe, tmp_path / "two", "CKPT_NOT_FOUND", "a.safetensors, b.safetensors")
