"""Tests of writing: a file holds what was held, under the published names, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch
from released import SINGLE_FILES, claim, inventory, native_shapes, openclip_mistakes, random_tensors, shapes_of
from safetensors import safe_open
from sdinpaint_weights import openclip
from sdinpaint_weights.atomic import atomic_write
from sdinpaint_weights.edits import shape_after
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.export import FILES, diffusers_state, export_plan, ldm_state, write_diffusers, write_single_file
from sdinpaint_weights.folder import open_folder_component
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import load_tensors, native_state, outside_keys
from sdinpaint_weights.reader import open_weights

UNET = {
    "time_embed.0.weight": (16, 8),
    "input_blocks.0.0.weight": (8, 9, 3, 3),
    "input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
    "input_blocks.2.0.op.weight": (8, 8, 3, 3),
    "input_blocks.3.0.skip_connection.weight": (12, 8, 1, 1),
    "input_blocks.3.1.proj_in.weight": (12, 12, 1, 1),
    "input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight": (12, 7),
    "middle_block.1.proj_out.weight": (12, 12, 1, 1),
    "output_blocks.1.2.conv.weight": (12, 12, 3, 3),
    "output_blocks.3.0.out_layers.3.weight": (8, 8, 3, 3),
    "out.2.weight": (4, 8, 3, 3),
}
VAE = {
    "encoder.down.0.block.0.conv1.weight": (6, 6, 3, 3),
    "encoder.down.0.downsample.conv.weight": (6, 6, 3, 3),
    "encoder.down.1.block.0.nin_shortcut.weight": (10, 6, 1, 1),
    "encoder.mid.attn_1.q.weight": (10, 10, 1, 1),
    "encoder.mid.attn_1.norm.weight": (10,),
    "decoder.mid.attn_1.proj_out.weight": (10, 10, 1, 1),
    "decoder.up.1.block.1.conv2.weight": (10, 10, 3, 3),
    "decoder.up.1.upsample.conv.weight": (10, 10, 3, 3),
    "post_quant_conv.weight": (4, 4, 1, 1),
}
TEXT = {
    "text_model.embeddings.token_embedding.weight": (50, 7),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (7, 7),
}


def components():
    generator = torch.Generator().manual_seed(1)
    shapes = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
    return {
        component: {name: torch.randn(shape, generator=generator) for name, shape in table.items()}
        for component, table in shapes.items()
    }


def read_back(open_component, names=("unet", "vae", "text_encoder")):
    loaded = {}
    for component in names:
        weights = open_component(component)
        layout = identify(weights.shapes())
        assert outside_keys(weights, layout) == ()
        state = native_state(weights, component, layout)
        assert state.unexpected == ()
        loaded[component] = load_tensors(state)
    return loaded


def assert_same(loaded, written):
    assert {component: set(tensors) for component, tensors in loaded.items()} == {
        component: set(tensors) for component, tensors in written.items()
    }
    for component, tensors in written.items():
        for name, tensor in tensors.items():
            assert loaded[component][name].dtype == tensor.dtype
            assert torch.equal(loaded[component][name], tensor), name


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_diffusers_folder_comes_back_bit_by_bit(tmp_path, dtype):
    written = components()
    configs = {"unet/config.json": {"sample_size": 8}, "model_index.json": {"_class_name": "StableDiffusionPipeline"}}
    write_diffusers(tmp_path, written, configs, dtype)
    assert json.loads((tmp_path / "unet" / "config.json").read_text()) == {"sample_size": 8}
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    loaded = read_back(lambda component: open_folder_component(tmp_path / component))
    assert_same(loaded, {c: {n: t.to(dtype) for n, t in tensors.items()} for c, tensors in written.items()})
    with safe_open(tmp_path / FILES["vae"], "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("encoder.mid_block.attentions.0.to_q.weight").get_shape() == [10, 10]
        assert "decoder.up_blocks.0.upsamplers.0.conv.weight" in file.keys()  # noqa: SIM118
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []


def test_single_file_comes_back_bit_by_bit(tmp_path):
    written = components()
    write_single_file(tmp_path / "new folder" / "a.safetensors", written, "sd1")
    weights = open_weights(tmp_path / "new folder" / "a.safetensors")
    assert weights.kind == "safetensors"
    assert identify(weights.shapes()).family == "sd1"
    assert_same(read_back(lambda component: weights), written)


# Every family, in both layouts

SDXL = ("unet", "vae", "text_encoder", "text_encoder_2")
MODELS = {"sd15_inpainting": "sd1", "sd2_inpainting": "sd2", "sdxl_base": "sdxl", "sdxl_inpainting": "sdxl"}
FAMILIES = [(family, model, SDXL if family == "sdxl" else SDXL[:3]) for model, family in MODELS.items()]
every_family = pytest.mark.parametrize(("family", "model", "names"), FAMILIES)


def planned(component, shapes, layout, family):
    """{key: shape} of what is to be written."""
    plan = export_plan(component, shapes, layout, family)
    return {target.key: shape_after(target.edit, [shapes[name] for name in target.names]) for target in plan}


def without(shapes, *ends):
    return {key: shape for key, shape in shapes.items() if not key.endswith(ends)}


@every_family
def test_the_plan_gives_the_names_and_shapes_of_the_released_files(family, model, names):
    single = {}
    for component in names:
        shapes = native_shapes(component, model)
        kind = f"{component}_no_position_ids" if component == "text_encoder" else component
        assert planned(component, shapes, "diffusers", family) == shapes_of(f"{model}.diffusers.{kind}")
        single |= planned(component, shapes, "ldm", family)
    weights = inventory(SINGLE_FILES[model])
    released = without(weights.shapes(), "position_ids", "logit_scale")
    # Not SD2's last block and projection, which its text encoder does not use.
    left_out = {key for key in claim(weights, "text_encoder").dropped if key in released}
    assert bool(left_out) == (family == "sd2")
    assert single == {key: shape for key, shape in released.items() if "." in key and key not in left_out}


def test_the_plan_of_a_controlnet():
    shapes = native_shapes("controlnet", "")
    assert planned("controlnet", shapes, "ldm", "sd1") == shapes_of("control_v11p_sd15_inpaint.cldm")
    assert planned("controlnet", shapes, "diffusers", "sd1") == shapes_of("control_v11p_sd15_inpaint.diffusers")


@every_family
def test_layouts_convert_into_each_other_and_back_bit_by_bit(tmp_path, family, model, names):
    written = {component: random_tensors(native_shapes(component, model)) for component in names}
    write_single_file(tmp_path / "a", written, family)
    single = open_weights(tmp_path / "a")
    assert identify(single.shapes()).family == family
    loaded = read_back(lambda component: single, names)
    assert_same(loaded, written)
    write_diffusers(tmp_path / "b", loaded, {})
    write_single_file(
        tmp_path / "c", read_back(lambda component: open_folder_component(tmp_path / "b" / component), names), family
    )
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()
    single = open_weights(tmp_path / "c")
    write_diffusers(tmp_path / "d", read_back(lambda component: single, names), {})
    for component in names:
        assert (tmp_path / "d" / FILES[component]).read_bytes() == (tmp_path / "b" / FILES[component]).read_bytes()


def test_a_controlnet_converts_into_the_other_layout_and_back_bit_by_bit(tmp_path):
    written = {"controlnet": random_tensors(native_shapes("controlnet", ""))}
    write_single_file(tmp_path / "a", written, "sd1")
    assert set(open_weights(tmp_path / "a")) == {f"control_model.{name}" for name in written["controlnet"]}
    loaded = read_back(lambda component: open_weights(tmp_path / "a"), ["controlnet"])
    assert_same(loaded, written)
    write_diffusers(tmp_path / "b", loaded, {"config.json": {}})
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", FILES["controlnet"]]
    again = read_back(lambda component: open_folder_component(tmp_path / "b"), ["controlnet"])
    write_single_file(tmp_path / "c", again, "sd1")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


@openclip_mistakes
def test_swapped_rows_or_a_lost_transpose_are_seen(tmp_path, monkeypatch, name, wrong, seen):
    written = {"text_encoder_2": random_tensors(native_shapes("text_encoder_2", ""))}
    with monkeypatch.context() as patch:
        patch.setattr(openclip, name, wrong)
        write_single_file(tmp_path / "a", written, "sdxl")
    weights = open_weights(tmp_path / "a")
    with pytest.raises(AssertionError, match=seen):
        assert_same(read_back(lambda component: weights, ["text_encoder_2"]), written)


def test_the_refiners_text_encoder_is_its_first():
    (first, *_) = export_plan("text_encoder_2", native_shapes("text_encoder_2", ""), "ldm", "sdxl-refiner")
    assert first.key.startswith("conditioner.embedders.0.model.")


def test_a_component_that_a_family_has_not():
    with pytest.raises(CheckpointError, match="the single files of SD1 hold no such component") as caught:
        ldm_state({"text_encoder_2": {}}, "sd1")
    assert (caught.value.code, caught.value.subject) == ("CKPT_KEYS", "text_encoder_2")


def test_q_without_k_is_refused():
    layer = "text_model.encoder.layers.0.self_attn"
    with pytest.raises(CheckpointError, match=r"q_proj\.bias without the others of .*in_proj_bias"):
        export_plan("text_encoder", {f"{layer}.q_proj.bias": (4,)}, "ldm", "sd2")


def test_a_file_may_be_rewritten_from_its_own_mapped_tensors(tmp_path):
    written = components()
    write_single_file(tmp_path / "a", written, "sd1")
    weights = open_weights(tmp_path / "a")
    loaded = read_back(lambda component: weights)
    write_single_file(tmp_path / "a", loaded, "sd1", torch.float16)
    assert_same(loaded, written)
    assert open_weights(tmp_path / "a").dtype("model.diffusion_model.out.2.weight") == torch.float16


def test_a_name_without_counterpart_is_refused(tmp_path):
    written = components()
    written["unet"]["some_blocks.9.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        write_diffusers(tmp_path, written, {})
    assert caught.value.code == "CKPT_KEYS"
    assert "some_blocks.9.weight" in str(caught.value)


def test_values_that_do_not_fit_are_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    written = {"vae": {"encoder.down.0.block.0.conv1.weight": torch.tensor([1e9])}}
    with pytest.raises(CheckpointError) as caught:
        write_single_file(path, written, "sd1", torch.float16)
    assert caught.value.code == "CKPT_OVERFLOW"
    assert path.read_bytes() == b"old"


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with contextlib.suppress(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for write in (
        lambda: write_single_file(tmp_path / "file" / "a", components(), "sd1"),
        lambda: write_diffusers(tmp_path, {}, {"file/config.json": {}}),
    ):
        with pytest.raises(CheckpointError) as caught:
            write()
        assert caught.value.code == "CKPT_NOT_WRITTEN"
        assert caught.value.hint


# Against the libraries themselves


@pytest.fixture(scope="module")
def peers():
    """{family: {component: a tiny model of diffusers or transformers, with random weights}}."""
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    blocks = {"block_out_channels": (8, 12), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    down = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    up = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    wide = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "transformer_layers_per_block": (1, 2)}
    wide |= {"projection_class_embeddings_input_dim": 6 + 6 * 4}
    structures = {
        "sd1": {"cross_attention_dim": 10},
        "sd2": {"cross_attention_dim": 14, "use_linear_projection": True},
        "sdxl": {"cross_attention_dim": 16, "use_linear_projection": True, **wide},
    }

    def text(kind, width):
        sizes = {"vocab_size": 60, "hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
        return kind(CLIPTextConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))

    models = {
        family: {
            "unet": UNet2DConditionModel(in_channels=9, **blocks, **down, **up, **structure),
            "vae": AutoencoderKL(
                block_out_channels=(4, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
            ),
            "text_encoder": text(CLIPTextModel, structure["cross_attention_dim"]),
            "controlnet": ControlNetModel(in_channels=4, **blocks, **down, **structure),
        }
        for family, structure in structures.items()
    }
    models["sdxl"]["text_encoder"] = text(CLIPTextModel, 10)
    models["sdxl"]["text_encoder_2"] = text(CLIPTextModelWithProjection, 6)
    return models


def saved_by_peers(models, folder):
    """Read under native names what the libraries wrote."""
    for component, model in models.items():
        model.save_pretrained(folder / component)
    return read_back(lambda component: open_folder_component(folder / component), models)


@pytest.mark.peer
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_and_transformers_read_what_is_written(tmp_path, peers, family):
    loaded = saved_by_peers(peers[family], tmp_path / "theirs")
    for component, model in peers[family].items():
        write_diffusers(tmp_path / component, {component: loaded[component]}, {})
        folder = (tmp_path / component / FILES[component]).parent
        config = (tmp_path / "theirs" / component / "config.json").read_text()
        (folder / "config.json").write_text(config)
        again, report = type(model).from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert_equal(again.state_dict(), model.state_dict())
        if not component.startswith("text"):  # transformers 5.6 and later call their modules otherwise than their files
            assert set(diffusers_state(component, loaded[component])) == set(model.state_dict())
            model.load_state_dict(diffusers_state(component, loaded[component]), strict=True)


@pytest.mark.peer
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_own_converters_read_the_single_file(tmp_path, peers, family):
    from diffusers.loaders import single_file_utils as theirs

    models = peers[family]
    loaded = saved_by_peers(models, tmp_path)
    single = ldm_state(loaded, family)
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(single), dict(models["unet"].config)),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(single), dict(models["vae"].config)),
    }
    if family != "sdxl":  # whose ControlNets it does not know
        config = dict(models["controlnet"].config)
        converted["controlnet"] = theirs.convert_controlnet_checkpoint(dict(single), config)
    if family == "sd2":
        converted["text_encoder"] = theirs.convert_open_clip_checkpoint(models["text_encoder"], single)
    if family == "sdxl":
        prefix = "conditioner.embedders.1.model."
        converted["text_encoder_2"] = theirs.convert_open_clip_checkpoint(models["text_encoder_2"], single, prefix)
    for component, state in converted.items():
        assert_equal(state, diffusers_state(component, loaded[component]))


def assert_equal(state, other):
    assert set(state) == set(other)
    for name, tensor in other.items():
        assert torch.equal(state[name], tensor), name
