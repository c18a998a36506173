"""`inspect` says what a LoRA, a textual inversion or another addition is, from its header alone."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from builders import write_header
from safetensors.torch import save_file

import sdinpaint

ATTENTION = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_3_mlp_fc1"
DEEP = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"


def pair(name, rank, inputs, outputs):
    return {f"{name}.lora_down.weight": (rank, inputs), f"{name}.lora_up.weight": (outputs, rank), f"{name}.alpha": ()}


SD1 = pair(ATTENTION, 8, 768, 640) | pair(TEXT, 4, 768, 3072)


def with_metadata(path, shapes, **metadata):
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, path, texts)
    return path


KINDS = {
    "SD 1": ("lora", "sd1", {"lora": 2}, {8: 1, 4: 1}, SD1),
    "SD 2": ("lora", "sd2", {"lora": 1}, {8: 1}, pair(ATTENTION, 8, 1024, 640)),
    "SDXL": ("lora", "sdxl", {"lora": 1}, {16: 1}, pair(DEEP, 16, 2048, 640)),
    "unknown": ("lora", "unknown", {"lora": 1}, {2: 1}, pair("lora_unet_conv_out", 2, 320, 4)),
    "LoHa": (
        "lora",
        "sd1",
        {"loha": 1},
        {4: 1},
        {
            f"{ATTENTION}.{part}": shape
            for part, shape in {
                "hada_w1_a": (640, 4),
                "hada_w1_b": (4, 768),
                "hada_w2_a": (640, 4),
                "hada_w2_b": (4, 768),
                "alpha": (),
            }.items()
        },
    ),
    "full": ("lora", "sd1", {"full": 1}, {}, {f"{ATTENTION}.diff": (640, 768), f"{ATTENTION}.diff_b": (640,)}),
    "embedding": ("textual inversion", "sd1", {}, {}, {"emb_params": (8, 768)}),
    "embedding of diffusers": ("textual inversion", "sd2", {}, {}, {"<cat>": (1024,)}),
    "embedding of SDXL": ("textual inversion", "sdxl", {}, {}, {"clip_l": (2, 768), "clip_g": (2, 1280)}),
}


@pytest.mark.parametrize(("layout", "family", "algorithms", "ranks", "shapes"), KINDS.values(), ids=list(KINDS))
def test_what_can_be_added(layout, family, algorithms, ranks, shapes, tmp_path):
    report = sdinpaint.inspect(write_header(tmp_path / "cat.safetensors", shapes))
    assert (report.layout, report.family, report.usable, report.problem) == (layout, family, True, "")
    assert (report.adapter.algorithms, report.adapter.ranks) == (algorithms, ranks)
    assert sum(report.parameters.values()) > 0
    text = str(report)
    assert {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}.get(
        family, "a LoRA"
    ) in text
    option = {"lora": "--lora FILE", "textual inversion": "--embedding FILE"}[layout]
    assert text.splitlines()[-1].startswith("  loads       as a")
    assert option in text
    assert json.loads(json.dumps(report.to_json()))["layout"] == layout


def test_the_page_of_a_lora(tmp_path):
    embedding = {"bundle_emb.fox.emb_params": (3, 768)}
    path = with_metadata(
        tmp_path / "style.safetensors",
        SD1 | embedding,
        ss_sd_model_name="v1-5-pruned.ckpt",
        ss_base_model_version="sd_v1",
        ss_tag_frequency={"10_fox": {"fox ": 10, "snow": 3, "red": 4}, "5_cat": {"red": 8}},
        **{"modelspec.trigger_phrase": "a fox of snow"},
    )
    lines = str(sdinpaint.inspect(path)).splitlines()
    assert lines[0] == f"{path}: a LoRA or an adapter like it for Stable Diffusion 1"
    assert lines[1:7] == [
        "  algorithm   lora x 2",
        "  modules     unet 1, text encoder 1",
        "  rank        4 x 1, 8 x 1",
        "  embeddings  fox: 3 vectors",
        "  base model  v1-5-pruned.ckpt, sd_v1",
        "  triggers    a fox of snow, red, fox, snow",
    ]
    assert lines[7].startswith("  parameters")


@pytest.mark.parametrize(
    ("metadata", "doubted"),
    [
        ({"ss_base_model_version": "sd_v1"}, ""),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "Stable Diffusion XL"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "Stable Diffusion XL"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, ""),
        ({"ss_base_model_version": "flux1"}, ""),
    ],
)
def test_another_base_model_is_a_note(metadata, doubted, tmp_path):
    """Names and shapes tell the family; metadata are a hint."""
    report = sdinpaint.inspect(with_metadata(tmp_path / "a.safetensors", SD1, **metadata))
    assert report.family == "sd1"
    note = f"its metadata name {doubted}, and its tensors are for Stable Diffusion 1"
    assert report.adapter.doubt == (note if doubted else "")
    assert (f"  note        {note}" in str(report)) == bool(doubted)
    assert report.usable


@pytest.mark.parametrize(
    "table", ["no JSON", "[1, 2]", '{"a": 5}', '{"a": {"b": null}}', '{"a": {"b": Infinity}}', "[" * 100_000]
)
def test_broken_tags_are_no_tags(table, tmp_path):
    report = sdinpaint.inspect(with_metadata(tmp_path / "a.safetensors", SD1, ss_tag_frequency=table))
    assert report.adapter.trigger_words == ()


def test_text_from_a_file_cannot_control_the_terminal(tmp_path):
    evil = "\x1b[2J"
    tags = {"a": {f"fox{evil}": 1}}
    path = with_metadata(tmp_path / "a.safetensors", SD1, ss_sd_model_name=evil, ss_tag_frequency=tags)
    text = str(sdinpaint.inspect(path))
    assert "\x1b" not in text
    assert "fox\\x1b[2J" in text


def test_hash_and_verify(tmp_path):
    path = with_metadata(tmp_path / "a.safetensors", SD1)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sdinpaint.inspect(path, hash=True, progress=False).sha256 == {path.name: digest}
    report = sdinpaint.inspect(path, verify=True, progress=False)
    assert (report.verified, report.sha256, report.usable) == (6, {path.name: digest}, True)
    tensors = {key: torch.ones(shape) for key, shape in SD1.items()}
    tensors[f"{TEXT}.lora_up.weight"][5, 2] = float("nan")
    save_file(tensors, path)
    report = sdinpaint.inspect(path, verify=True, progress=False)
    assert not report.usable
    assert any(finding.wrong and TEXT in str(finding) for finding in report.findings)


def test_a_folder_of_peft(tmp_path):
    name = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    shapes = {f"{name}.lora_A.weight": (8, 768), f"{name}.lora_B.weight": (640, 8)}
    path = write_header(tmp_path / "adapter_model.safetensors", shapes)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "base_model_name_or_path": "owner/sd"}))
    report = sdinpaint.inspect(tmp_path, hash=True, progress=False)
    assert (report.path, report.layout, report.family) == (str(tmp_path), "lora", "sd1")
    assert report.adapter.base_model == "owner/sd"
    assert list(report.sha256) == [path.name]


def test_pickled_embeddings(tmp_path):
    rows = torch.ones(8, 768)
    beside = {"string_to_token": {"*": torch.tensor(265)}, "name": "cat"}
    contents = {
        "a1111.pt": {**beside, "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(rows)})},
        "learned_embeds.bin": {"<cat>": rows},
        "tensor.pt": rows,
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        report = sdinpaint.inspect(tmp_path / name)
        assert (report.layout, report.family, report.usable) == ("textual inversion", "sd1", True), name
        assert list(report.adapter.embeddings.values()) == [8]


NAMED = {
    "control-lora": (
        {"lora_controlnet": (0,), "input_blocks.4.1.proj_in.down": (8, 640), "input_blocks.4.1.proj_in.up": (640, 8)},
        "Control-LoRA",
    ),
    "ip-adapter": (
        {"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)},
        "IP-Adapter",
    ),
}


@pytest.mark.parametrize(("layout", "shapes", "words"), [(name, *row) for name, row in NAMED.items()])
def test_what_is_not_read_is_named(layout, shapes, words, tmp_path):
    report = sdinpaint.inspect(write_header(tmp_path / "a.safetensors", shapes))
    assert (report.layout, report.usable) == (layout, False)
    assert words in report.title
    assert words in report.problem
    assert report.family == ("sd1" if layout == "ip-adapter" else "unknown")
