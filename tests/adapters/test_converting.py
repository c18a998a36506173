"""A conversion with LoRAs writes the weights that a model has to which they were added, and says so."""

from __future__ import annotations

import json

import pytest
import torch
from builders import as_sd2, as_sdxl, random_pipeline, rewrite, single_file, small
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdinpaint_weights.adapter_names import targets_of

import sdinpaint
from sdinpaint.checkpoints.converting import convert
from sdinpaint.errors import AdapterError, CheckpointError, SdInpaintWarning, SettingError
from sdinpaint.loading import save_diffusers

UNET_MODULES = ("mid_block.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1")
UNET_MODULES += ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",)
TEXT_MODULES = tuple(
    f"text_model.encoder.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc1")
)
TEXTS = ("lora_te1_", "lora_te2_")


def lora_for(pipe):
    """A LoRA of some layers of the UNet and of each text encoder, one of them with a bias."""
    generator = torch.Generator().manual_seed(3)
    names = [name for name, module in pipe.unet.named_modules() if "weight" in module._parameters]
    native = {target.name: target.module for target in targets_of("unet", names)}
    modules = {f"lora_unet_{name.replace('.', '_')}": pipe.unet.get_submodule(native[name]) for name in UNET_MODULES}
    for prefix, encoder in zip(TEXTS, pipe.condition.encoders, strict=False):
        modules |= {prefix + name.replace(".", "_"): encoder.get_submodule(name) for name in TEXT_MODULES}
    tensors = {}
    for key, module in modules.items():
        out, *inside = module.weight.shape
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, *inside, generator=generator)
        ones = (1,) * (len(inside) - 1)
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, 2, *ones, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(1.5)
    first = next(iter(modules))
    tensors[f"{first}.diff_b"] = torch.randn(len(modules[first].bias), generator=generator)
    return tensors


@pytest.fixture(scope="module")
def places(tiny, vocabulary, tmp_path_factory):
    """name -> a folder of a model, its single file, its LoRA."""
    sizes = {"sd1": small(tiny), "sd2": as_sd2(small(tiny)), "sdxl": as_sdxl(small(tiny))}
    found = {}
    for name, family in sizes.items():
        home = tmp_path_factory.mktemp(name)
        pipe = random_pipeline(family, vocabulary, seed=3)
        save_diffusers(home / "folder", pipe)
        save_file({key: one.contiguous() for key, one in single_file(pipe).items()}, home / "file.safetensors")
        save_file(lora_for(pipe), home / "style.safetensors")
        found[name] = home
    return found


def load(path, **options):
    return sdinpaint.load(path, device="cpu", progress=False, **options)


def states(pipe):
    models = {"vae": pipe.vae, **pipe.networks}
    return {f"{name}.{key}": one for name, model in models.items() for key, one in model.state_dict().items()}


def same(one, other):
    one, other = states(one), states(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("layout", ["folder", "file.safetensors"])
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_it_is_the_model_to_which_they_were_added(name, layout, places, tmp_path):
    """From the other layout, bit for bit."""
    home, target = places[name], tmp_path / layout
    source = home / ("file.safetensors" if layout == "folder" else "folder")
    options = {"config": home / "folder"} if source.suffix else {}
    loras = [(home / "style.safetensors", 0.5, -0.25)]
    added = load(source, tokenizer=home / "folder" / "tokenizer", loras=loras, **options)
    convert(source, target, loras=loras, progress=False, **options)
    merged = load(target)
    assert same(merged, added)
    now, encoders = states(merged), len(added.condition.encoders)
    added.clear_loras()
    changed = [key for key, one in states(added).items() if not torch.equal(one, now[key])]
    assert len(changed) == len(UNET_MODULES) + 1 + len(TEXT_MODULES) * encoders


def test_halves_are_rounded_once(places, tmp_path):
    home = places["sd1"]
    save_diffusers(tmp_path / "half", load(home / "folder"), torch.float16)
    loras = [(home / "style.safetensors", 0.01)]
    convert(tmp_path / "half", tmp_path / "merged", loras=loras, progress=False)
    added = load(tmp_path / "half", loras=loras, dtype="float16")
    merged = load(tmp_path / "merged", dtype="float16")
    assert same(merged, added)
    before, exact, key = (
        load(tmp_path / "half"),
        load_file(home / "style.safetensors"),
        "lora_unet_mid_block_attentions_0_proj_in",
    )
    up, down = (exact[f"{key}.lora_{part}.weight"].double().flatten(1) for part in ("up", "down"))
    own, now = (pipe.networks["unet"].middle_block[1].proj_in.weight for pipe in (before, merged))
    total = own.double() + 0.01 * 1.5 / 2 * (up @ down).reshape(own.shape)
    assert bool(((now.double() - total).abs() <= total.abs() * 2**-11 * 1.001).all())  # twice, it is up to 2 ** -10
    convert(tmp_path / "half", tmp_path / "single", dtype="float32", loras=loras, progress=False)
    assert same(load(tmp_path / "single"), load(tmp_path / "half", loras=loras))


def test_several_add_up(places, tmp_path):
    home = places["sd1"]
    style = home / "style.safetensors"
    other = tmp_path / "other.safetensors"
    other.write_bytes(style.read_bytes())
    convert(home / "folder", tmp_path / "both", loras=[(style, 1), (other, -0.5)], progress=False)
    assert same(load(tmp_path / "both"), load(home / "folder", loras=[(style, 1), (other, -0.5)]))


def test_the_written_file_says_so(places, tmp_path):
    home, target = places["sd1"], tmp_path / "merged.safetensors"
    convert(home / "folder", target, loras=[(home / "style.safetensors", 0.5)], progress=False)
    (told,) = json.loads(safe_open(target, "pt").metadata()["merged_loras"])
    lora = load(home / "folder").add_lora(home / "style.safetensors", 0.5)
    assert told == lora.to_manifest()
    convert(home / "folder", tmp_path / "plain.safetensors", progress=False)
    assert "merged_loras" not in safe_open(tmp_path / "plain.safetensors", "pt").metadata()


def test_what_cannot_be_merged_is_refused(places, tmp_path):
    home, style = places["sd1"], places["sd1"] / "style.safetensors"
    target = tmp_path / "new"
    unknown = tmp_path / "unknown.safetensors"
    save_file(load_file(style) | {"lora_unet_no_module.alpha": torch.ones(())}, unknown)
    cases = [
        (AdapterError, "ADAPTER_KEYS", [unknown]),
        (AdapterError, "ADAPTER_FAMILY", [places["sdxl"] / "style.safetensors"]),
        (CheckpointError, "CKPT_NOT_FOUND", [tmp_path / "none.safetensors"]),
        (SettingError, "SETTING_WEIGHT", [(style, float("nan"))]),
        (AdapterError, "ADAPTER_VALUES", [(style, 3e38)]),
    ]
    for kind, code, loras in cases:
        refused(kind, code, lambda loras=loras: convert(home / "folder", target, loras=loras, progress=False))
        assert not target.exists()
    path = tmp_path / "style.safetensors"
    path.write_bytes(style.read_bytes())
    same_name = {"overwrite": True, "progress": False}
    refused(SettingError, "SETTING_TARGET", lambda: convert(home / "folder", path, loras=[path], **same_name))
    assert path.read_bytes() == style.read_bytes()


def test_an_embedding_inside_is_told_and_left_out(places, tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_bytes((places["sd1"] / "style.safetensors").read_bytes())
    rewrite(path, lambda tensors: tensors | {"bundle_emb.cat.emb_params": torch.ones(1, 28)})
    with pytest.warns(SdInpaintWarning, match="embeddings, which a checkpoint has no place for: cat"):
        convert(places["sd1"] / "folder", tmp_path / "new", loras=[path], progress=False)
