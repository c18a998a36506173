"""Every key of every released file is claimed, and what is read is complete, finite and of the dtype asked for."""

from __future__ import annotations

import pytest
import torch
from released import NAMES, claim, inventory, native_shapes, openclip_mistakes, shapes_of
from safetensors.torch import save_file
from sdinpaint_weights import openclip
from sdinpaint_weights.dtypes import STORED
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import check_complete, load_tensors, native_state, outside_keys
from sdinpaint_weights.reader import open_weights
from sdinpaint_weights.weights import Entry

COMPONENTS = ("unet", "vae", "text_encoder")


def expected(component, model="sd15_inpainting"):
    return native_shapes(component, model)


def components_of(name):
    """Tell what a released file holds from its name."""
    model, _, kind = name.partition(".")
    if model.startswith("control"):
        return (*COMPONENTS, "controlnet") if "full" in model else ("controlnet",)
    if "vae" in name:
        return ("vae",)
    if kind.startswith("diffusers"):
        kind = kind.removeprefix("diffusers.")
        return ("unet",) if kind == "unet" else ("text_encoder_2",) if "encoder_2" in kind else ("text_encoder",)
    return (*COMPONENTS, "text_encoder_2") if kind == "sgm" else COMPONENTS


def model_of(name):
    """The model whose single file has the same component."""
    model = name.partition(".")[0]
    return model if model.startswith(("sd15", "sd2", "sdxl")) else "sd15_base"


def test_all_released_files_are_here():
    assert len(NAMES) == 53


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_the_released_files_is_claimed(name):
    weights = inventory(name)
    layout = identify(weights.shapes())
    assert set(layout.components) == set(components_of(name))
    assert outside_keys(weights, layout) == ()
    for component in layout.components:
        state = claim(weights, component)
        # The same native names and shapes from every layout, so that native(LDM) is native(diffusers).
        assert state.shapes() == expected(component, model_of(name))
        assert state.unexpected == ()
        check_complete(state, expected(component, model_of(name)))


def test_a_diffusers_folder_in_one_file():
    parts = {"unet": "unet", "vae": "vae_old_names", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
    weights = inventory("sdxl_base.diffusers.unet")
    weights.entries = {
        f"{component}.{key}": entry
        for component, kind in parts.items()
        for key, entry in inventory(f"sdxl_base.diffusers.{kind}").entries.items()
    }
    for component in parts:
        assert claim(weights, component).shapes() == expected(component, "sdxl_base")
    assert outside_keys(weights, identify(weights.shapes())) == ()


@pytest.mark.parametrize("prefix", ["control_model.", ""])
@pytest.mark.parametrize("nesting", [0, 1, 2])
def test_controlnets_with_and_without_prefix_and_wrapping(tmp_path, prefix, nesting):
    names = expected("controlnet")
    value = {f"{prefix}{name}": torch.zeros(small(shape)) for name, shape in names.items()}
    for _ in range(nesting):
        value = {"state_dict": value}
    torch.save(value, tmp_path / "control.pth")
    weights = open_weights(tmp_path / "control.pth")
    assert identify(weights.shapes()).layout == "ldm controlnet"
    assert claim(weights, "controlnet").shapes() == {name: small(shape) for name, shape in names.items()}


def small(shape):
    return tuple(min(size, 3) for size in shape)


def test_claims_add_up():
    weights = inventory("sd15_inpainting.ldm_with_ema")
    states = [claim(weights, component) for component in COMPONENTS]
    claimed = {source.key for state in states for source in state.sources.values()}
    dropped = {key for state in states for key in state.dropped}
    rest = set(weights) - claimed - dropped
    assert dropped == {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
    assert all(key.startswith("model_ema.") or "." not in key for key in rest)
    assert len(claimed) == 686 + 248 + 196


@pytest.mark.parametrize("kind", ["sd15_base", "sd15_inpainting"])
def test_averaged_weights_get_their_dots_back(kind):
    weights = inventory(f"{kind}.ldm_with_ema")
    state = claim(weights, "unet", ema=True)
    assert state.shapes() == expected("unet", kind)
    assert state.unexpected == ()
    assert {source.key.partition(".")[0] for source in state.sources.values()} == {"model_ema"}
    assert state.notes == ()


@pytest.mark.parametrize("model", ["sd2_inpainting", "sdxl_inpainting"])
def test_averaged_weights_of_later_families_get_their_dots_back_too(model):
    names = expected("unet", model)
    weights = inventory("sd15_base.ldm")
    weights.entries = {
        f"model_ema.diffusion_model{name.replace('.', '')}": Entry(None, 0, STORED["float32"], shape, ())
        for name, shape in names.items()
    }
    assert identify(weights.shapes()).family == model.partition("_")[0]
    assert claim(weights, "unet").shapes() == names


def test_averaged_weights_alone_are_used_and_said_so():
    weights = inventory("sd15_inpainting.ldm_with_ema")
    weights.entries = {key: entry for key, entry in weights.entries.items() if not key.startswith("model.")}
    state = claim(weights, "unet")
    assert state.shapes() == expected("unet")
    assert "averaged (EMA)" in state.notes[0]
    assert outside_keys(weights, identify(weights.shapes())) == ()


def test_averaged_weights_that_are_not_there():
    with pytest.raises(CheckpointError) as caught:
        claim(inventory("sd15_inpainting.ldm_ema_scalars"), "unet", ema=True)
    assert caught.value.code == "CKPT_NO_EMA"


def test_a_component_that_is_not_there():
    with pytest.raises(CheckpointError) as caught:
        claim(inventory("vae_ft_mse.ldm"), "unet")
    assert caught.value.code == "CKPT_NO_COMPONENT"
    assert "a VAE alone: it holds no UNet" in str(caught.value)


# The edits of OpenCLIP's tensors


def test_sd2_without_its_last_block_is_the_same_model():
    weights = inventory("sd2_inpainting.ldm")
    whole = claim(weights, "text_encoder")
    block = "cond_stage_model.model.transformer.resblocks.23."
    last = {key for key in weights if key.startswith(block) or key.endswith(("text_projection", "logit_scale"))}
    assert set(whole.dropped) == last
    assert len(last) == 12 + 2
    weights.entries = {key: entry for key, entry in weights.entries.items() if key not in last}
    fine_tuned = claim(weights, "text_encoder")
    assert fine_tuned.sources == whole.sources
    assert fine_tuned.dropped == ()


def test_a_whole_text_encoder_in_transformers_names_loses_sd2s_last_block_too():
    text = shapes_of("sd2_inpainting.diffusers.text_encoder_flat")
    last = {key.replace("layers.22.", "layers.23."): shape for key, shape in text.items() if "layers.22." in key}
    weights = inventory("sd2_inpainting.diffusers.text_encoder_flat")
    extra = {key: Entry(None, 0, STORED["float32"], shape, ()) for key, shape in last.items()}
    weights.entries = {
        **weights.entries,
        **extra,
        "text_projection.weight": Entry(None, 0, STORED["float32"], (9, 9), ()),
    }
    state = claim(weights, "text_encoder")
    assert state.shapes() == expected("text_encoder", "sd2_inpainting")
    assert len(state.dropped) == len(last) + 1


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3073, 1024)])
def test_stacked_rows_that_are_no_three_are_unexpected(shape):
    key = "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"
    state = claim(changed("sd2_inpainting.ldm", **{key: Entry(None, 0, STORED["float32"], shape, ())}), "text_encoder")
    with pytest.raises(CheckpointError, match=r"layers\.3\.self_attn\.q_proj\.weight"):
        check_complete(state, expected("text_encoder", "sd2_inpainting"))
    assert state.unexpected == ((key,) if shape != (0,) else ())


OPENCLIP = {
    "positional_embedding": (7, 5),
    "text_projection": (5, 6),
    "logit_scale": (),
    "transformer.resblocks.0.ln_1.weight": (5,),
    "transformer.resblocks.0.attn.in_proj_weight": (15, 5),
    "transformer.resblocks.0.attn.in_proj_bias": (15,),
    "transformer.resblocks.0.mlp.c_proj.weight": (5, 20),
    "token_embedding.weight": (40, 5),
    "ln_final.weight": (5,),
}


def wide_text_encoder(path, stored=torch.float32):
    """A small second text encoder of SDXL in a file, as stored and as its native state."""
    prefix = "conditioner.embedders.1.model."
    tensors = {name: torch.randn(shape).to(stored) for name, shape in OPENCLIP.items()}
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    weights = open_weights(path)
    return tensors, native_state(weights, "text_encoder_2", identify(weights.shapes()))


def assert_split_and_turned(stored, loaded):
    """The definition of the edits, in slices."""
    layer = "text_model.encoder.layers.0"
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(5 * part, 5 * part + 5)
        for kind in ("weight", "bias"):
            stacked = stored[f"transformer.resblocks.0.attn.in_proj_{kind}"]
            assert same_bits(loaded[f"{layer}.self_attn.{name}.{kind}"], stacked[rows]), name
    turned = torch.tensor(
        [[value.item() for value in column] for column in zip(*stored["text_projection"], strict=True)]
    )
    assert same_bits(loaded["text_projection.weight"], turned.to(stored["text_projection"].dtype))
    assert same_bits(loaded["text_model.embeddings.position_embedding.weight"], stored["positional_embedding"])
    assert same_bits(loaded[f"{layer}.mlp.fc2.weight"], stored["transformer.resblocks.0.mlp.c_proj.weight"])


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tolist() == other.tolist()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_rows_are_split_and_the_projection_is_turned(tmp_path, stored, dtype):
    tensors, state = wide_text_encoder(tmp_path / "a", stored)
    assert state.unexpected == ()
    loaded = load_tensors(state, dtype)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == state.shapes()
    assert all(tensor.is_contiguous() for tensor in loaded.values())
    assert_split_and_turned({name: tensor.to(dtype or stored) for name, tensor in tensors.items()}, loaded)


@openclip_mistakes
def test_swapped_rows_or_a_lost_transpose_are_seen(tmp_path, sabotage, name, wrong, seen):
    sabotage(openclip, name, wrong)
    tensors, state = wide_text_encoder(tmp_path / "a")
    with pytest.raises(AssertionError, match="q_proj" if name == "STACKED" else None):
        assert_split_and_turned(tensors, load_tensors(state))


def test_rows_are_views_of_the_file_and_are_read_once(tmp_path, spy):
    _, state = wide_text_encoder(tmp_path / "a")
    rows = [f"text_model.encoder.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    as_stored = load_tensors(state)
    begins = [as_stored[name].data_ptr() for name in rows]
    assert [begin - begins[0] for begin in begins] == [0, 100, 200]
    mapped = state.weights.tensor(state.sources[rows[0]].key)
    assert as_stored[rows[0]].data_ptr() == mapped.data_ptr()
    read = spy(type(state.weights), "tensor")
    load_tensors(state, torch.float16)
    keys = [key for _, key, *_ in read]
    assert len(keys) == len(set(keys)) > 0


@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_nan_in_a_part_of_a_stacked_tensor_is_refused(tmp_path, stored, dtype):
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"
    tensor = torch.ones(15)
    tensor[12] = float("nan")
    save_file({key: tensor.to(stored)}, tmp_path / "a")
    weights = open_weights(tmp_path / "a")
    state = native_state(weights, "text_encoder_2", identify(weights.shapes()))
    with pytest.raises(CheckpointError) as caught:
        load_tensors(state, dtype)
    assert caught.value.code == "CKPT_NONFINITE"
    assert "in_proj_bias: 1 of 15 values" in str(caught.value)
    loaded = load_tensors(state, dtype, allow_nonfinite=True)
    assert [int(tensor.float().isnan().sum()) for tensor in loaded.values()] == [0, 0, 1]


def changed(name, **entries):
    weights = inventory(name)
    weights.entries = {**weights.entries, **entries}
    return weights


def test_keys_outside_every_component_are_listed():
    junk = Entry(None, 0, STORED["float32"], (1,), ())
    weights = changed("sd15_base.ldm", **{"merge_recipe": junk, "embedding_manager.embedder": junk})
    assert outside_keys(weights, identify(weights.shapes())) == ("merge_recipe", "embedding_manager.embedder")
    check_complete(claim(weights, "unet"), expected("unet", "sd15_base"))


def complaint(weights, component, model):
    with pytest.raises(CheckpointError) as caught:
        check_complete(claim(weights, component), expected(component, model))
    assert caught.value.code == "CKPT_KEYS"
    return caught.value.found


def test_missing_misshapen_and_unexpected_keys_are_counted_and_named():
    weights = changed(
        "sd15_base.ldm", **{"model.diffusion_model.extra.weight": Entry(None, 0, STORED["float32"], (3,), ())}
    )
    del weights.entries["model.diffusion_model.out.0.bias"]
    assert complaint(weights, "unet", "sd15_inpainting") == (
        "UNet: 1 missing, e.g. out.0.bias; "
        "1 misshapen, e.g. input_blocks.0.0.weight: (320, 4, 3, 3) in the file, (320, 9, 3, 3) expected; "
        "1 unexpected, e.g. extra.weight"
    )


def test_five_names_are_enough():
    weights = inventory("sd15_base.diffusers.vae")
    weights.entries = {key: entry for key, entry in weights.entries.items() if "down_blocks.1" not in key}
    found = complaint(weights, "vae", "sd15_base")
    assert found.startswith("VAE: ")
    assert "missing, e.g. encoder.down." in found
    assert found.partition("misshapen")[0].count("encoder.") == 5


def test_keys_unknown_to_the_diffusers_tables_are_unexpected():
    extra = Entry(None, 0, STORED["float32"], (1,), ())
    weights = changed("sd15_base.diffusers.unet", **{"down_blocks.0.resnets.0.norm9.weight": extra})
    assert claim(weights, "unet").unexpected == ("down_blocks.0.resnets.0.norm9.weight",)
    assert "1 unexpected, e.g. down_blocks.0.resnets.0.norm9.weight" in complaint(weights, "unet", "sd15_base")


def test_old_and_new_names_at_once_are_refused():
    attention = "encoder.mid_block.attentions.0"
    entry = inventory("sd15_base.diffusers.vae").entries[f"{attention}.to_q.weight"]
    with pytest.raises(CheckpointError) as caught:
        claim(changed("sd15_base.diffusers.vae", **{f"{attention}.query.weight": entry}), "vae")
    assert caught.value.code == "CKPT_DUPLICATE_KEY"


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool"])
def test_integer_weights_are_refused(dtype):
    key = "model.diffusion_model.out.2.weight"
    weights = changed("sd15_base.ldm", **{key: Entry(None, 0, STORED[dtype], (4, 320, 3, 3), ())})
    with pytest.raises(CheckpointError) as caught:
        claim(weights, "unet")
    assert caught.value.code == "CKPT_INTEGER_WEIGHTS"
    assert key in str(caught.value)
    claim(weights, "vae")


# Reading


def saved(path, tensors):
    save_file(tensors, path)
    weights = open_weights(path)
    return native_state(weights, "vae", identify(weights.shapes()))


def test_linear_attention_becomes_convolutions(tmp_path):
    weight, bias = torch.randn(6, 6), torch.randn(6)
    attention = "encoder.mid_block.attentions.0"
    tensors = {f"{attention}.to_q.weight": weight, f"{attention}.query.bias": bias}
    state = saved(tmp_path / "a", tensors)
    assert state.shapes() == {"encoder.mid.attn_1.q.weight": (6, 6, 1, 1), "encoder.mid.attn_1.q.bias": (6,)}
    loaded = load_tensors(state)
    assert torch.equal(loaded["encoder.mid.attn_1.q.weight"], weight[:, :, None, None])
    assert torch.equal(loaded["encoder.mid.attn_1.q.bias"], bias)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_dtypes(tmp_path, stored, dtype):
    tensor = torch.linspace(-2, 2, 30).reshape(2, 5, 3, 1).to(stored)
    names = []
    state = saved(tmp_path / "a", {"encoder.down.0.block.0.conv1.weight": tensor})
    (loaded,) = load_tensors(state, dtype, names.append).values()
    assert loaded.dtype == (dtype or stored)
    assert torch.equal(loaded.double(), tensor.to(dtype or stored).double())
    assert names == ["encoder.down.0.block.0.conv1.weight"]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, stored, value):
    tensor = torch.zeros(40)
    tensor[[3, 17]] = value
    state = saved(tmp_path / "a", {"decoder.up.0.block.0.norm1.weight": tensor.to(stored)})
    for dtype in (None, torch.float32):
        with pytest.raises(CheckpointError) as caught:
            load_tensors(state, dtype)
        assert caught.value.code == "CKPT_NONFINITE"
        assert "decoder.up.0.block.0.norm1.weight: 2 of 40 values" in str(caught.value)
        assert len(load_tensors(state, dtype, allow_nonfinite=True)) == 1


def test_what_float16_cannot_hold_is_told_from_damage(tmp_path):
    tensor = torch.tensor([1.0, 65504.0, 70000.0, -1e9])
    state = saved(tmp_path / "a", {"decoder.up.0.block.0.norm1.weight": tensor})
    with pytest.raises(CheckpointError) as caught:
        load_tensors(state, torch.float16)
    assert caught.value.code == "CKPT_OVERFLOW"
    assert "2 values are too large for float16, up to 1e+09" in str(caught.value)
    assert len(load_tensors(state, torch.bfloat16)) == 1


def test_tensors_without_elements_load(tmp_path):
    assert load_tensors(saved(tmp_path / "a", {"encoder.down.0.x": torch.empty(0)}))["encoder.down.0.x"].numel() == 0
