"""Names and shapes tell what a file is, and the name tables are those of the released files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.keymap import Level, inverse, renamed, unet_table, unet_table_for, vae_table_for
from sdinpaint_weights.layout import identify, require_family

INVENTORIES = Path(__file__).parent / "data" / "inventories"


def read(name):
    with gzip.open(INVENTORIES / f"{name}.json.gz", "rt") as file:
        return json.load(file)


def shapes_of(name):
    return {key: tuple(shape) for key, (shape, _) in read(name).items()}


def official(component, prefix):
    """{diffusers name: LDM name without prefix} as diffusers' own converter maps them."""
    pairs = read("diffusers_from_ldm")[component].items()
    return {diffusers: ldm.partition("[")[0].removeprefix(prefix) for diffusers, ldm in pairs}


LDM = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize(
    ("name", "layout", "family", "components", "in_channels", "has_ema"),
    [
        ("sd15_base.ldm", "ldm", "sd1", LDM, 4, False),
        ("sd15_base.ldm_ema_scalars", "ldm", "sd1", LDM, 4, False),
        ("sd15_base.ldm_with_ema", "ldm", "sd1", LDM, 4, True),
        ("sd15_inpainting.ldm", "ldm", "sd1", LDM, 9, False),
        ("sd15_inpainting.ldm_ema_scalars", "ldm", "sd1", LDM, 9, False),
        ("sd15_inpainting.ldm_with_ema", "ldm", "sd1", LDM, 9, True),
        ("sd15_inpainting.diffusers.unet", "diffusers unet", "sd1", ("unet",), 9, False),
        ("sd15_base.diffusers.unet", "diffusers unet", "sd1", ("unet",), 4, False),
        ("sd15_base.diffusers.vae", "diffusers vae", "sd", ("vae",), None, False),
        ("sd15_base.diffusers.vae_old_names", "diffusers vae", "sd", ("vae",), None, False),
        ("sd15_base.diffusers.text_encoder", "diffusers text", "sd1", ("text_encoder",), None, False),
        ("sd15_base.diffusers.text_encoder_flat", "diffusers text", "sd1", ("text_encoder",), None, False),
        ("vae_ft_mse.ldm", "ldm vae", "sd", ("vae",), None, False),
        ("vae_ldm_training_ckpt_with_loss_and_ema", "ldm vae", "sd", ("vae",), None, False),
        ("sd2_inpainting.ldm", "ldm", "sd2", LDM, 9, False),
        ("sdxl_base.sgm", "ldm", "sdxl", (*LDM, "text_encoder_2"), 4, False),
        ("control_v11p_sd15_inpaint.cldm", "ldm controlnet", "sd1", ("controlnet",), None, False),
    ],
)
def test_released_files(name, layout, family, components, in_channels, has_ema):
    found = identify(shapes_of(name))
    assert (found.layout, found.family, found.in_channels, found.has_ema) == (layout, family, in_channels, has_ema)
    assert found.components == components
    assert not found.ema_only


def test_every_reason_names_a_key_and_its_shape():
    why = identify(shapes_of("sd15_inpainting.ldm")).why
    assert "model.diffusion_model.input_blocks.0.0.weight (320, 9, 3, 3): 9 input channels, inpainting" in why
    assert "cond_stage_model.transformer.* is the text encoder of SD1" in why
    assert any("proj_in.weight (320, 320, 1, 1): a convolution, as in SD1" in sentence for sentence in why)


def test_a_file_without_plain_weights_is_ema_only():
    shapes = shapes_of("sd15_inpainting.ldm_with_ema")
    found = identify({key: shape for key, shape in shapes.items() if not key.startswith("model.")})
    assert (found.ema_only, found.family, found.in_channels) == (True, "sd1", 9)


@pytest.mark.parametrize("missing", ["input_blocks.0.0.weight", "input_blocks.1.1.proj_in.weight"])
def test_a_missing_key_does_not_change_the_family(missing):
    shapes = shapes_of("sd15_inpainting.ldm")
    del shapes[f"model.diffusion_model.{missing}"]
    assert identify(shapes).family == "sd1"


def test_small_checkpoints_of_any_width_are_told_by_structure():
    text = {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (99, 24)}
    unet = {
        "model.diffusion_model.input_blocks.0.0.weight": (12, 9, 3, 3),
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": (20, 20, 1, 1),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (20, 24),
    }
    assert identify({**unet, **text}).family == "sd1"
    assert identify(unet).family == "sd1"
    # The two pieces of evidence contradict each other: a linear projection, but SD1's text encoder.
    linear = {**unet, "model.diffusion_model.input_blocks.4.1.proj_in.weight": (20, 20)}
    assert identify(linear).family == "sd2"
    assert identify({**linear, **text}).family == "unknown"


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "a LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora.down.weight", "a LoRA"),
        ("lycoris_unet_x.hada_w1_a", "a LoRA"),
        ("emb_params", "a textual-inversion embedding"),
        ("string_to_param.*", "a textual-inversion embedding"),
        ("<cat-toy>", "a textual-inversion embedding"),
        ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "an SD3 checkpoint"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a Flux checkpoint"),
        ("single_transformer_blocks.0.attn.to_q.weight", "a Flux checkpoint"),
        ("down_blocks.0.motion_modules.0.norm.weight", "an AnimateDiff motion module"),
        ("image_proj.proj.weight", "an IP-Adapter"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet alone"),
        ("foo", "not a Stable Diffusion checkpoint"),
    ],
)
def test_other_kinds_are_named(key, title):
    layout = identify({key: (4, 4)})
    assert layout.title.startswith(title)
    with pytest.raises(CheckpointError) as caught:
        require_family(layout, "a.safetensors", ("sd2",))
    assert caught.value.code == "CKPT_WRONG_FAMILY"
    assert title in str(caught.value)


def test_require_family():
    require_family(identify(shapes_of("sd15_base.ldm")), "a.ckpt", ("sd1",))
    with pytest.raises(CheckpointError, match="an SDXL checkpoint"):
        require_family(identify(shapes_of("sdxl_base.sgm")), "a.ckpt", ("sd1",))


def test_nothing_at_all():
    assert identify({}).family == "unknown"


# The name tables


@pytest.mark.parametrize(
    ("component", "prefix", "table_for"),
    [("unet", "model.diffusion_model.", unet_table_for), ("vae", "first_stage_model.", vae_table_for)],
)
def test_tables_are_those_of_diffusers_own_converter(component, prefix, table_for):
    pairs = official(component, prefix)
    assert {name: renamed(name, table_for(pairs)) for name in pairs} == pairs
    # The same table follows from the LDM names alone, and it leads back.
    assert table_for(pairs.values()) == table_for(pairs)
    back = inverse(table_for(pairs.values()))
    assert {renamed(name, back): name for name in pairs.values()} == pairs


def test_old_names_of_the_vae_attention():
    new = official("vae", "first_stage_model.")
    old = read("sd15_base.diffusers.vae_old_names")
    table = vae_table_for(old)
    assert sorted(renamed(name, table) for name in old) == sorted(new.values())


def test_a_wrong_structure_gives_another_table():
    # The counter-test of the two above: a level without attention shifts the upsampler's place.
    pairs = official("unet", "model.diffusion_model.")
    right = (Level(2, True), Level(2, True), Level(2, True), Level(2, False))
    assert unet_table(right) == unet_table_for(pairs)
    wrong = unet_table((Level(2, True), Level(2, True), Level(2, False), Level(2, False)))
    assert {name: renamed(name, wrong) for name in pairs} != pairs


def test_unknown_modules_have_no_other_name():
    table = unet_table((Level(1, True),))
    assert renamed("down_blocks.0.resnets.1.norm1.weight", table) is None
    assert renamed("down_blocks.0.resnets.0.norm9.weight", table) is None
    assert renamed("", table) is None


@pytest.mark.peer
@pytest.mark.parametrize(
    ("blocks", "attending"),
    [(1, (False, True)), (2, (False, True, True)), (1, (True, False, True, False)), (3, (True,))],
)
def test_tables_of_any_structure_against_diffusers(blocks, attending):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    model = UNet2DConditionModel(
        block_out_channels=tuple(8 * (level + 1) for level in range(len(attending))),
        layers_per_block=blocks,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attending),
        up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attending)),
    )
    names = list(model.state_dict())
    table = unet_table_for(names)
    ldm = {renamed(name, table): name for name in names}
    assert unet_table_for(ldm) == table
    tagged = {f"model.diffusion_model.{name}": name for name in ldm}
    back = convert_ldm_unet_checkpoint(dict(tagged), dict(model.config))
    assert {diffusers: ldm[name] for diffusers, name in back.items()} == {name: name for name in names}
