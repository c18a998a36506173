"""Every key of every released file is claimed, and what is read is complete, finite and of the dtype asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import check_complete, load_tensors, native_state, outside_keys
from sdinpaint_weights.reader import open_weights
from sdinpaint_weights.weights import Entry, Weights

INVENTORIES = Path(__file__).parent / "data" / "inventories"
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}


def inventory(name):
    """Weights without bytes: names, shapes and dtypes of a released file."""
    with gzip.open(INVENTORIES / f"{name}.json.gz", "rt") as file:
        table = json.load(file)
    entries = {key: Entry(None, 0, getattr(torch, dtype), tuple(shape), ()) for key, (shape, dtype) in table.items()}
    return Weights(Path(f"{name}.safetensors"), "safetensors", entries)


def expected(component, name="sd15_inpainting.ldm"):
    """Native names and shapes, from the official single file."""
    prefix = PREFIXES[component]
    return {
        key.removeprefix(prefix): shape
        for key, shape in inventory(name).shapes().items()
        if key.startswith(prefix) and not key.endswith("position_ids")
    }


def claim(weights, component, **options):
    return native_state(weights, component, identify(weights.shapes()), **options)


def released_files():
    for kind in ("sd15_base", "sd15_inpainting"):
        for ending in ("ldm", "ldm_ema_scalars", "ldm_with_ema"):
            for component in PREFIXES:
                yield f"{kind}.{ending}", component
        for ending in ("unet", "vae", "vae_old_names"):
            yield f"{kind}.diffusers.{ending}", ending.partition("_")[0]
        for ending in ("", "_flat", "_no_position_ids"):
            yield f"{kind}.diffusers.text_encoder{ending}", "text_encoder"
    for name in ("vae_ft_mse.ldm", "vae_ft_mse.ldm_ema_scalars", "vae_ldm_training_ckpt_with_loss_and_ema"):
        yield name, "vae"
    for name in ("sd_vae_ft_mse.diffusers", "sd_vae_ft_mse.diffusers_old_names"):
        yield name, "vae"


@pytest.mark.parametrize(("name", "component"), list(released_files()))
def test_every_key_of_the_released_files_is_claimed(name, component):
    weights = inventory(name)
    state = claim(weights, component)
    model = "sd15_base.ldm" if name.startswith("sd15_base") else "sd15_inpainting.ldm"
    assert state.shapes() == expected(component, model)
    assert state.unexpected == ()
    assert outside_keys(weights, identify(weights.shapes())) == ()
    check_complete(state, expected(component, model))


def test_claims_add_up():
    weights = inventory("sd15_inpainting.ldm_with_ema")
    states = [claim(weights, component) for component in PREFIXES]
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
    assert state.shapes() == expected("unet", f"{kind}.ldm")
    assert state.unexpected == ()
    assert {source.key.partition(".")[0] for source in state.sources.values()} == {"model_ema"}
    assert state.notes == ()


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


@pytest.mark.parametrize("name", ["sd2_inpainting.ldm", "sdxl_base.sgm"])
def test_text_encoders_under_other_names_are_refused(name):
    with pytest.raises(CheckpointError) as caught:
        claim(inventory(name), "text_encoder")
    assert caught.value.code == "CKPT_WRONG_FAMILY"


def changed(name, **entries):
    weights = inventory(name)
    weights.entries = {**weights.entries, **entries}
    return weights


def test_keys_outside_every_component_are_listed():
    junk = Entry(None, 0, torch.float32, (1,), ())
    weights = changed("sd15_base.ldm", **{"merge_recipe": junk, "embedding_manager.embedder": junk})
    assert outside_keys(weights, identify(weights.shapes())) == ("merge_recipe", "embedding_manager.embedder")
    check_complete(claim(weights, "unet"), expected("unet", "sd15_base.ldm"))


def complaint(weights, component, model):
    with pytest.raises(CheckpointError) as caught:
        check_complete(claim(weights, component), expected(component, model))
    assert caught.value.code == "CKPT_KEYS"
    return caught.value.found


def test_missing_misshapen_and_unexpected_keys_are_counted_and_named():
    weights = changed(
        "sd15_base.ldm", **{"model.diffusion_model.extra.weight": Entry(None, 0, torch.float32, (3,), ())}
    )
    del weights.entries["model.diffusion_model.out.0.bias"]
    assert complaint(weights, "unet", "sd15_inpainting.ldm") == (
        "UNet: 1 missing, e.g. out.0.bias; "
        "1 misshapen, e.g. input_blocks.0.0.weight: (320, 4, 3, 3) in the file, (320, 9, 3, 3) expected; "
        "1 unexpected, e.g. extra.weight"
    )


def test_five_names_are_enough():
    weights = inventory("sd15_base.diffusers.vae")
    weights.entries = {key: entry for key, entry in weights.entries.items() if "down_blocks.1" not in key}
    found = complaint(weights, "vae", "sd15_base.ldm")
    assert found.startswith("VAE: ")
    assert "missing, e.g. encoder.down." in found
    assert found.partition("misshapen")[0].count("encoder.") == 5


def test_keys_unknown_to_the_diffusers_tables_are_unexpected():
    extra = Entry(None, 0, torch.float32, (1,), ())
    weights = changed("sd15_base.diffusers.unet", **{"down_blocks.0.resnets.0.norm9.weight": extra})
    assert claim(weights, "unet").unexpected == ("down_blocks.0.resnets.0.norm9.weight",)
    assert "1 unexpected, e.g. down_blocks.0.resnets.0.norm9.weight" in complaint(weights, "unet", "sd15_base.ldm")


def test_old_and_new_names_at_once_are_refused():
    attention = "encoder.mid_block.attentions.0"
    entry = inventory("sd15_base.diffusers.vae").entries[f"{attention}.to_q.weight"]
    with pytest.raises(CheckpointError) as caught:
        claim(changed("sd15_base.diffusers.vae", **{f"{attention}.query.weight": entry}), "vae")
    assert caught.value.code == "CKPT_DUPLICATE_KEY"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_integer_weights_are_refused(dtype):
    key = "model.diffusion_model.out.2.weight"
    weights = changed("sd15_base.ldm", **{key: Entry(None, 0, dtype, (4, 320, 3, 3), ())})
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
