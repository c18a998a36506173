"""Every family against the names and shapes of its released files, and against what diffusers says of it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from builders import write_header
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import check_complete, native_state, outside_keys

from sdinpaint.checkpoints.building import MODELS, build
from sdinpaint.checkpoints.configs import text_config, unet_config, vae_config
from sdinpaint.checkpoints.diffusers_configs import diffusers_configs
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.checkpoints.schedule_config import schedule_config
from sdinpaint.families import FAMILIES, SD2, SD2_INPAINT, SD2_V, SD15, SD15_INPAINT, SDXL, SDXL_INPAINT
from sdinpaint.load_options import LoadOptions

FILES = {
    "sd15_base.ldm": SD15,
    "sd15_inpainting.ldm": SD15_INPAINT,
    "sd2_inpainting.ldm": SD2_INPAINT,
    "sd2_v_768.ldm": SD2_V,
    "sdxl_base.sgm": SDXL,
    "sdxl_inpainting.sgm": SDXL_INPAINT,
}
HERE = Path("here")


def claim(weights, component):
    return native_state(weights, component, identify(weights.shapes()))


def on_meta(family, component):
    with torch.device("meta"):
        return MODELS[component](family.components[component])


def check_strictly(state, model):
    check_complete(state, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    tensors = {name: torch.empty(shape, device="meta") for name, shape in state.shapes().items()}
    model.load_state_dict(tensors, strict=True, assign=True)


@pytest.mark.parametrize("name", list(FILES))
def test_released_single_files_fit(inventory, name):
    weights, family = inventory(name), FILES[name]
    for component in family.components:
        check_strictly(claim(weights, component), on_meta(family, component))
    layout = identify(weights.shapes())
    assert (layout.family, layout.components, outside_keys(weights, layout)) == (
        family.kind,
        tuple(family.components),
        (),
    )


FOLDERS = [
    ("sd2_inpainting", SD2_INPAINT),
    ("sdxl_base", SDXL),
    ("sdxl_inpainting", SDXL_INPAINT),
]


@pytest.mark.parametrize(("kind", "family"), FOLDERS)
def test_released_folders_fit(inventory, kind, family):
    for component in family.components:
        check_strictly(claim(inventory(f"{kind}.diffusers.{component}"), component), on_meta(family, component))


@pytest.mark.parametrize("name", list(FILES))
def test_the_family_is_known_from_the_file_alone(inventory, tmp_path, name):
    path = write_header(tmp_path / "model.safetensors", inventory(name).shapes())
    found = open_checkpoint(LoadOptions(source=path, prediction=FILES[name].schedule.prediction))
    assert found.family == FILES[name]
    assert found.notes == ()
    build(found)


@pytest.mark.parametrize("name", list(FILES))
def test_sizes_are_read_off_the_shapes(inventory, name):
    """From a family in which all of them are others."""
    family, sd1 = FILES[name], SD15
    weights = inventory(name)
    unet = replace(sd1.unet, num_heads=family.unet.num_heads, head_dim=family.unet.head_dim, model_channels=64)
    assert unet_config(claim(weights, "unet").shapes(), {}, unet, HERE) == family.unet
    vae = replace(sd1.vae, scaling_factor=family.vae.scaling_factor, channels=32)
    assert vae_config(claim(weights, "vae").shapes(), {}, vae, HERE) == family.vae
    for component, text in zip(("text_encoder", "text_encoder_2"), family.texts, strict=False):
        projection = None if text.projection_dim is None else 1
        other = replace(text, width=64, num_layers=1, num_heads=1, mlp_width=1, projection_dim=projection)
        assert text_config(claim(weights, component).shapes(), {}, other, HERE) == text


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_what_is_written_is_read_back(family):
    configs = diffusers_configs(family)
    heads = {"num_heads": 1, "head_dim": None}
    assert schedule_config(configs["scheduler/scheduler_config.json"], SD15.schedule, HERE) == family.schedule
    shapes = {name: tuple(value.shape) for name, value in on_meta(family, "unet").state_dict().items()}
    read = unet_config(shapes, configs["unet/config.json"], replace(family.unet, **heads), HERE)
    assert read == family.unet
    assert configs["unet/config.json"]["sample_size"] == family.size // 8


# As published: diffusers/stable-diffusion-xl-1.0-inpainting-0.1 and stabilityai/stable-diffusion-2-inpainting
RELEASED = {
    SDXL_INPAINT: {
        "unet/config.json": {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "in_channels": 9,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
        },
        "vae/config.json": {"scaling_factor": 0.13025},
        "text_encoder_2/config.json": {
            "architectures": ["CLIPTextModelWithProjection"],
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 20,
            "num_hidden_layers": 32,
            "projection_dim": 1280,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": "epsilon",
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
        "model_index.json": {
            "_class_name": "StableDiffusionXLInpaintPipeline",
            "force_zeros_for_empty_prompt": True,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        },
    },
    SD2_INPAINT: {
        "unet/config.json": {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "in_channels": 9,
            "use_linear_projection": True,
        },
        "text_encoder/config.json": {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
        },
        "model_index.json": {"_class_name": "StableDiffusionInpaintPipeline"},
    },
}


@pytest.mark.parametrize("family", list(RELEASED), ids=lambda family: family.name)
def test_what_is_written_is_what_was_published(family):
    written = diffusers_configs(family)
    for path, table in RELEASED[family].items():
        assert {name: written[path][name] for name in table} == table, path


def test_families_differ_where_they_should():
    """Compare with the words of the sources, so that a slip in one of the replacements is seen."""
    assert [name for name, family in FAMILIES.items() if family.schedule.prediction == "v"] == ["sd2-v"]
    assert {name: family.size for name, family in FAMILIES.items() if family.size != 512} == {
        "sd2-v": 768,
        "sdxl-inpainting": 1024,
        "sdxl": 1024,
    }
    for four, nine in ((SD15, SD15_INPAINT), (SD2, SD2_INPAINT), (SDXL, SDXL_INPAINT)):
        differing = [field.name for field in fields(four) if getattr(four, field.name) != getattr(nine, field.name)]
        assert differing == ["name", "unet"]
        assert replace(four.unet, in_channels=9) == nine.unet
    assert all(family.schedule.steps_offset == 1 for family in FAMILIES.values())
