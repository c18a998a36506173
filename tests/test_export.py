"""What is written is what was held, under the published names, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from sdinpaint_weights.atomic import atomic_write
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.export import FILES, diffusers_state, write_diffusers, write_single_file
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


def read_back(open_component):
    loaded = {}
    for component in FILES:
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
    write_single_file(tmp_path / "new folder" / "a.safetensors", written)
    weights = open_weights(tmp_path / "new folder" / "a.safetensors")
    assert weights.kind == "safetensors"
    assert identify(weights.shapes()).family == "sd1"
    assert_same(read_back(lambda component: weights), written)


def test_layouts_convert_into_each_other_and_back(tmp_path):
    written = components()
    write_single_file(tmp_path / "a", written)
    weights = open_weights(tmp_path / "a")
    write_diffusers(tmp_path / "b", read_back(lambda component: weights), {})
    write_single_file(tmp_path / "c", read_back(lambda component: open_folder_component(tmp_path / "b" / component)))
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_file_may_be_rewritten_from_its_own_mapped_tensors(tmp_path):
    written = components()
    write_single_file(tmp_path / "a", written)
    weights = open_weights(tmp_path / "a")
    loaded = read_back(lambda component: weights)
    write_single_file(tmp_path / "a", loaded, torch.float16)
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
        write_single_file(path, written, torch.float16)
    assert caught.value.code == "CKPT_OVERFLOW"
    assert path.read_bytes() == b"old"


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with contextlib.suppress(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for write in (
        lambda: write_single_file(tmp_path / "file" / "a", components()),
        lambda: write_diffusers(tmp_path, {}, {"file/config.json": {}}),
    ):
        with pytest.raises(CheckpointError) as caught:
            write()
        assert caught.value.code == "CKPT_NOT_WRITTEN"
        assert caught.value.hint


@pytest.mark.peer
def test_diffusers_and_transformers_read_what_is_written_and_the_other_way_round(tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    peers = {
        "unet": UNet2DConditionModel(
            in_channels=9,
            block_out_channels=(8, 12),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=10,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        "vae": AutoencoderKL(
            block_out_channels=(8, 12),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=60, hidden_size=10, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2
            )
        ),
    }
    for component, model in peers.items():
        model.save_pretrained(tmp_path / "theirs" / component)
    loaded = read_back(lambda component: open_folder_component(tmp_path / "theirs" / component))
    for component in ("unet", "vae"):
        assert set(diffusers_state(component, loaded[component])) == set(peers[component].state_dict())
    configs = {
        f"{component}/config.json": json.loads((tmp_path / "theirs" / component / "config.json").read_text())
        for component in peers
    }
    write_diffusers(tmp_path / "ours", loaded, configs)
    for component, model in peers.items():
        again, report = type(model).from_pretrained(tmp_path / "ours" / component, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
