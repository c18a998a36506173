"""Names and shapes tell what a file is, and the name tables are those of the released files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from released import CONVERTED, NAMES, openclip_mistakes, read, shapes_of
from sdinpaint_weights import openclip
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.keymap import (
    QKV,
    TABLES_FOR,
    Edit,
    Level,
    inverse,
    renamed,
    unet_table,
    unet_table_for,
    vae_table_for,
)
from sdinpaint_weights.layout import identify, require_family
from sdinpaint_weights.openclip import openclip_table_for

LDM = ("unet", "vae", "text_encoder")
SDXL = (*LDM, "text_encoder_2")
UNET = "model.diffusion_model."


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
        ("sd2_inpainting.ldm_ema_scalars", "ldm", "sd2", LDM, 9, False),
        ("sd2_v_768.ldm", "ldm", "sd2", LDM, 4, False),
        ("sd2_inpainting.diffusers.unet", "diffusers unet", "sd2", ("unet",), 9, False),
        ("sd2_inpainting.diffusers.text_encoder", "diffusers text", "sd2", ("text_encoder",), None, False),
        ("sdxl_base.sgm", "ldm", "sdxl", SDXL, 4, False),
        ("sdxl_inpainting.sgm", "ldm", "sdxl", SDXL, 9, False),
        ("sdxl_inpainting.diffusers.unet", "diffusers unet", "sdxl", ("unet",), 9, False),
        # CLIP-L is the same in SD1 and SDXL.
        ("sdxl_base.diffusers.text_encoder", "diffusers text", "sd1", ("text_encoder",), None, False),
        ("sdxl_base.diffusers.text_encoder_2", "diffusers text_encoder_2", "sdxl", ("text_encoder_2",), None, False),
        ("control_v11p_sd15_inpaint.cldm", "ldm controlnet", "sd1", ("controlnet",), None, False),
        ("control_v11p_sd15_inpaint.diffusers", "diffusers controlnet", "sd1", ("controlnet",), None, False),
        ("control_sd15_full_v10.ldm", "ldm", "sd1", (*LDM, "controlnet"), 4, False),
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


def test_the_width_of_the_text_states_tells_a_released_family():
    for width, family in ((768, "sd1"), (1024, "sd2"), (1280, "sdxl-refiner"), (2048, "sdxl")):
        for prefix, component in (("", "unet"), ("control_model.", "controlnet")):
            shapes = {
                f"{prefix}input_blocks.0.0.weight": (320, 4, 3, 3),
                f"{prefix}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, width),
            }
            found = identify(shapes)
            assert (found.family, found.components) == (family, (component,))
            assert any(f"text embeddings {width} wide" in sentence for sentence in found.why)


def refiner():
    """SDXL's refiner, as far as it differs: one text encoder, the wide one, whose states the UNet reads."""
    renamed = {
        key.replace("embedders.1.", "embedders.0."): shape
        for key, shape in shapes_of("sdxl_base.sgm").items()
        if not key.startswith("conditioner.embedders.0.")
    }
    return {key: (shape[0], 1280) if key.endswith("attn2.to_k.weight") else shape for key, shape in renamed.items()}


def test_the_refiner_is_refused_by_its_name():
    found = identify(refiner())
    assert (found.family, found.components) == ("sdxl-refiner", ("unet", "vae", "text_encoder_2"))
    with pytest.raises(CheckpointError, match="the SDXL refiner"):
        require_family(found, "a.safetensors", ("sd1", "sd2", "sdxl"))
    unet = {key.removeprefix(UNET): shape for key, shape in refiner().items() if key.startswith(UNET)}
    assert identify(unet).title == "a UNet alone, of the SDXL refiner"


@pytest.mark.parametrize("channels", [3, 4, 16])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_autoencoders_with_other_latents_are_named(channels, prefix):
    shapes = {
        f"{prefix}decoder.mid.attn_1.q.weight": (8, 8, 1, 1),
        f"{prefix}decoder.conv_in.weight": (8, channels, 3, 3),
    }
    found = identify(shapes)
    title = {3: "a VAE of 3 latent channels", 4: "a VAE alone", 16: "a VAE of 16 latent channels, as in SD3 and Flux"}
    assert (found.title, found.family) == (title[channels], "sd" if channels == 4 else "unknown")


def test_a_diffusers_folder_in_one_file():
    shapes = {
        f"{component}.{key}": shape
        for component, kind in (("unet", "unet"), ("vae", "vae_old_names"), *((name, name) for name in SDXL[2:]))
        for key, shape in shapes_of(f"sdxl_base.diffusers.{kind}").items()
    }
    found = identify(shapes)
    assert (found.layout, found.family, found.components, found.in_channels) == ("diffusers", "sdxl", SDXL, 4)


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "a LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora.down.weight", "a LoRA"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight", "a LoRA"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "a LoRA"),
        ("lycoris_unet_x.hada_w1_a", "a LoHa"),
        ("lora_unet_x.lokr_w1", "a LoKr"),
        ("emb_params", "a textual-inversion embedding"),
        ("string_to_param.*", "a textual-inversion embedding"),
        ("<cat-toy>", "a textual-inversion embedding"),
        ("clip_g", "a textual-inversion embedding"),
        ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "an SD3 checkpoint"),
        ("transformer_blocks.0.attn.add_k_proj.weight", "an SD3 checkpoint"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a Flux checkpoint"),
        ("single_transformer_blocks.0.attn.to_q.weight", "a Flux checkpoint"),
        ("down_blocks.0.motion_modules.0.norm.weight", "an AnimateDiff motion module"),
        ("model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight", "a Stable Video Diffusion checkpoint"),
        ("clip_txt_pooled_mapper.weight", "a Stable Cascade checkpoint"),
        ("first_stage_model.quantize.embedding.weight", "a model with a VQ autoencoder"),
        ("encoder.layers.0.weight", "a tiny autoencoder"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
        ("concept_embeds", "a safety checker"),
        ("image_proj.proj.weight", "an IP-Adapter"),
        ("body.0.block1.weight", "a T2I-Adapter"),
        ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
        ("params_ema.conv_first.weight", "an upscaler such as ESRGAN"),
        ("model.1.sub.0.RDB1.conv1.0.weight", "an upscaler such as ESRGAN"),
        ("body.0.rdb1.conv1.weight", "an upscaler such as ESRGAN"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet alone"),
        ("control_add_embedding.linear_1.weight", "a ControlNet-Union"),
        ("lora_controlnet", "a Control-LoRA"),
        ("lllite_unet_input_blocks_4_1_proj_in.down.0.weight", "a ControlNet-LLLite"),
        ("controlnet_blocks.0.weight", "a ControlNet of SD3 or Flux"),
        ("brushnet_down_blocks.0.weight", "a BrushNet"),
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


@pytest.mark.parametrize("key", ["task_embedding", "control_add_embedding.linear_1.weight", "lora_controlnet"])
def test_a_controlnet_that_is_not_plain_is_not_taken_for_one(key):
    shapes = shapes_of("control_v11p_sd15_inpaint.diffusers")
    assert identify(shapes).components == ("controlnet",)
    if key == "task_embedding":  # in both releases of ControlNet-Union, beside other keys that are its own
        shapes["spatial_ch_projs.weight"] = (320, 320)
    found = identify({**shapes, key: (4, 4)})
    assert (found.components, found.title.split()[1][:7]) == ((), "Control")


def test_words_of_other_kinds_are_in_no_released_file():
    for name in NAMES:
        assert identify(shapes_of(name)).components


def test_require_family():
    require_family(identify(shapes_of("sd15_base.ldm")), "a.ckpt", ("sd1",))
    with pytest.raises(CheckpointError, match="an SDXL checkpoint"):
        require_family(identify(shapes_of("sdxl_base.sgm")), "a.ckpt", ("sd1",))


def test_nothing_at_all():
    assert identify({}).family == "unknown"


PIECES = st.sampled_from(
    [
        *("\n", "unet.", "model.diffusion_model.", "model_ema.", "input_blocks.0.0.weight", "attn2.to_k.weight"),
        *("label_emb.0.0.weight", "proj_in.weight", "token_embedding.weight", "text_model.", "decoder.conv_in.weight"),
    ]
)
ANY_NAME = st.lists(PIECES | st.text(max_size=3), max_size=4).map("".join)


@given(st.dictionaries(ANY_NAME, st.lists(st.integers(0, 2000), max_size=5).map(tuple), max_size=6))
def test_it_never_fails(shapes):
    assert identify(shapes).title


# The name tables


def split(converted):
    """(name, what diffusers' converter was seen to do with it: ".T", "[0:1024,:]" or nothing)."""
    name, bracket, rest = converted.partition("[")
    return (name.removesuffix(".T"), ".T") if name.endswith(".T") else (name, bracket + rest)


@pytest.mark.parametrize(
    ("kind", "component", "prefix"),
    [
        ("sd15.unet", "unet", "model.diffusion_model."),
        ("sdxl.unet", "unet", "model.diffusion_model."),
        ("sd15.vae", "vae", "first_stage_model."),
        ("sd15.controlnet", "controlnet", "control_model."),
    ],
)
def test_tables_are_those_of_diffusers_own_converter(kind, component, prefix):
    pairs = {name: split(ldm)[0].removeprefix(prefix) for name, ldm in read(CONVERTED)[kind].items()}
    table = TABLES_FOR[component](pairs)
    assert {name: renamed(name, table) for name in pairs} == pairs
    # The same table follows from the LDM names alone, and it leads back.
    assert TABLES_FOR[component](pairs.values()) == table
    back = inverse(table)
    assert {renamed(name, back): name for name in pairs.values()} == pairs


def brackets(edit, rows, dimensions):
    """Say as text what diffusers' converter does to a stacked tensor of 3 * `rows` rows, or to a transposed one."""
    if edit in QKV:
        start = QKV.index(edit) * rows
        return f"[{start}:{start + rows}" + (",:]" if dimensions == 2 else "]")
    return {Edit.TRANSPOSED: ".T", Edit.AS_IS: ""}[edit]


@pytest.mark.parametrize(
    ("kind", "file", "prefix"),
    [
        ("sd2.text_encoder", "sd2_inpainting.diffusers.text_encoder", "cond_stage_model.model."),
        ("sdxl.text_encoder_2", "sdxl_base.diffusers.text_encoder_2", "conditioner.embedders.1.model."),
    ],
)
def test_openclip_names_are_those_of_diffusers_own_converter(kind, file, prefix):
    pairs, shapes = read(CONVERTED)[kind], shapes_of(file)
    table = openclip_table_for(pairs)
    for native, converted in pairs.items():
        name, edit = table[native]
        rows, dimensions = shapes[native][0], len(shapes[native])
        assert (prefix + name, brackets(edit, rows, dimensions)) == split(converted), native
    # The same table follows from the OpenCLIP names alone, but for SD2's last block, which diffusers leaves out.
    assert openclip_table_for(split(name)[0].removeprefix(prefix) for name in pairs.values()) == table
    assert set(table) - set(pairs) <= {"text_projection.weight"}


@openclip_mistakes
def test_swapped_rows_or_a_lost_transpose_are_seen(sabotage, name, wrong, seen):
    case = "sdxl.text_encoder_2", "sdxl_base.diffusers.text_encoder_2", "conditioner.embedders.1.model."
    sabotage(openclip, name, wrong)
    with pytest.raises(AssertionError, match=seen):
        test_openclip_names_are_those_of_diffusers_own_converter(*case)


def test_edits_have_their_inverses():
    for edit in (Edit.AS_IS, Edit.TRANSPOSED, Edit.CONVOLUTION, Edit.LINEAR):
        assert edit.inverse.inverse is edit
    assert {edit.inverse for edit in QKV} == {Edit.STACKED}


def test_old_names_of_the_vae_attention():
    new = {name: split(ldm)[0].removeprefix("first_stage_model.") for name, ldm in read(CONVERTED)["sd15.vae"].items()}
    old = read("sd15_base.diffusers.vae_old_names")
    table = vae_table_for(old)
    assert sorted(renamed(name, table) for name in old) == sorted(new.values())


def test_a_wrong_structure_gives_another_table():
    # The counter-test of the two above: a level without attention shifts the upsampler's place.
    pairs = read(CONVERTED)["sd15.unet"]
    right = (Level(2, True), Level(2, True), Level(2, True), Level(2, False))
    assert unet_table(right) == unet_table_for(pairs)
    wrong = unet_table((Level(2, True), Level(2, True), Level(2, False), Level(2, False)))
    assert {name: UNET + str(renamed(name, wrong)) for name in pairs} != pairs
    assert {name: UNET + str(renamed(name, unet_table(right))) for name in pairs} == pairs


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
