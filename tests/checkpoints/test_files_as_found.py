"""Checkpoints as people have them: other names, wrappers, variants, parts alone, and files of our own."""

import shutil
import warnings

import pytest
import torch
from builders import UNET_FILE, VAE_FILE, as_sdxl, random_pipeline, single_file, small, states, write_header
from click.testing import CliRunner
from closeness import close
from released import inventory
from safetensors.torch import load_file, save_file
from sdinpaint_weights.folder import open_folder_component
from sdinpaint_weights.reader import open_weights

import sdinpaint
from sdinpaint import SdInpaintWarning
from sdinpaint.checkpoints.converting import convert
from sdinpaint.cli import main
from sdinpaint.errors import CheckpointError
from sdinpaint.hub import wanted_files

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
FILES = {"unet": UNET_FILE, "vae": VAE_FILE}


def load(source, **options):
    return sdinpaint.load(source, device="cpu", progress=False, **options)


def same_models(one, other):
    ours, theirs = states(one), states(other)
    return all(
        ours[name].keys() == theirs[name].keys()
        and all(torch.equal(ours[name][key], theirs[name][key]) for key in ours[name])
        for name in theirs
    )


def write(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def model(request, tiny, vocabulary, tmp_path_factory):
    """A pipeline and its diffusers folder."""
    family = small(tiny) if request.param == "sd1" else as_sdxl(small(tiny))
    pipe = random_pipeline(family, vocabulary)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    sdinpaint.save_diffusers(folder, pipe)
    return pipe, folder


@pytest.fixture
def folder(model, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(model[1], tmp_path / "model")


# names


@pytest.mark.parametrize("components", [("vae",), ("unet",), ("vae", "unet")])
def test_names_of_diffusers_under_official_prefixes(model, tmp_path, components):
    pipe, folder = model
    tensors = single_file(pipe)
    for name in components:
        kept = {key: value for key, value in tensors.items() if not key.startswith(PREFIXES[name])}
        own = load_file(folder / FILES[name])
        tensors = kept | {f"{PREFIXES[name]}{key}": value for key, value in own.items()}
    loaded = load(write(tmp_path / "mixed.safetensors", tensors), config=folder, tokenizer=pipe.tokenizer)
    assert same_models(loaded, pipe)


WRAPPED = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "parallel": lambda key: f"module.{key}",
    "parallel, then compiled": lambda key: f"_orig_mod.module.{key}",
    "compiled, then parallel": lambda key: f"module._orig_mod.{key}",
    "the UNet alone": lambda key: key.replace("model.diffusion_model.", "model.diffusion_model._orig_mod."),
    "the VAE in Lightning": lambda key: key.replace("first_stage_model.", "first_stage_model._forward_module.module."),
    "sharded, and its blocks": lambda key: key.replace(
        "input_blocks.", "_fsdp_wrapped_module.input_blocks._checkpoint_wrapped_module."
    ),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_in_names(model, tmp_path, how):
    pipe, folder = model
    tensors = {WRAPPED[how](key): value for key, value in single_file(pipe).items()}
    options = {"config": folder, "tokenizer": pipe.tokenizer}
    assert same_models(load(write(tmp_path / "wrapped.safetensors", tensors), **options), pipe)
    torch.save({"state_dict": tensors}, tmp_path / "wrapped.ckpt")
    assert same_models(load(tmp_path / "wrapped.ckpt", **options), pipe)


def test_wrappers_in_a_component_of_a_folder(model, folder):
    write(folder / UNET_FILE, {f"_orig_mod.{key}": value for key, value in load_file(folder / UNET_FILE).items()})
    assert same_models(load(folder), model[0])


def test_a_table_around_the_weights(tmp_path):
    torch.save({"module": {"encoder.weight": torch.ones(2)}, "step": 3}, tmp_path / "deep.pt")
    assert [*open_weights(tmp_path / "deep.pt")] == ["encoder.weight"]


def test_a_tensor_with_and_without_its_wrapper_is_refused(tmp_path):
    path = write(tmp_path / "twice.safetensors", {"a.w": torch.ones(1), "_orig_mod.a.w": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"'_orig_mod\.a\.w' and 'a\.w'|'a\.w' and '_orig_mod\.a\.w'") as caught:
        open_weights(path)
    assert caught.value.code == "CKPT_DUPLICATE_KEY"


def test_words_that_look_like_wrappers_stay(tmp_path):
    names = ["modules.w", "submodule.w", "motion_modules.0.w", "a.module", "module"]
    path = write(tmp_path / "names.safetensors", {name: torch.full((1,), float(i)) for i, name in enumerate(names)})
    assert sorted(open_weights(path)) == sorted(names)


def test_wrappers_in_shards(tmp_path):
    write(tmp_path / "model-00001-of-00001.safetensors", {"module.w": torch.ones(2)})
    index = '{"weight_map": {"module.w": "model-00001-of-00001.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert [*open_folder_component(tmp_path)] == ["w"]


# variants and paths


def test_a_variant_of_the_unet_alone(model, folder):
    pipe, _ = model
    doubled = {key: 2 * value for key, value in load_file(folder / UNET_FILE).items()}
    write((folder / UNET_FILE).with_suffix(".non_ema.safetensors"), doubled)
    with pytest.warns(SdInpaintWarning, match="vae: there are no weights of the variant 'non_ema'"):
        loaded = load(folder, variant="non_ema")
    assert close(loaded.unet.state_dict()["out.2.weight"], 2 * pipe.unet.state_dict()["out.2.weight"])
    assert torch.equal(loaded.vae.state_dict()["quant_conv.weight"], pipe.vae.state_dict()["quant_conv.weight"])


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
def test_a_variant_that_no_component_has(model, folder, tmp_path, single):
    source, options = folder, {}
    if single:
        source = write(tmp_path / "m.safetensors", single_file(model[0]))
        options = {"config": folder, "tokenizer": model[0].tokenizer}
    with pytest.raises(CheckpointError, match="no component has weights of the variant 'fp16'") as caught:
        load(source, variant="fp16", **options)
    assert caught.value.code == "CKPT_VARIANT"


def test_the_hub_is_asked_for_the_variant_of_those_that_have_it():
    names = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    wanted = wanted_files(names, ("unet", "vae"), "fp16")
    assert [name for name in wanted if name.endswith(".safetensors")] == [names[3], names[5]]
    with pytest.raises(CheckpointError, match="variant 'bf16'"):
        wanted_files(names, ("unet", "vae"), "bf16")


def test_model_index_json_means_its_folder(model):
    assert same_models(load(model[1] / "model_index.json"), model[0])


def test_a_home_folder_is_expanded(model, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert same_models(load("~/model"), model[0])
    assert same_models(load("~/model/unet", base="~/model", config="~/model", tokenizer=model[0].tokenizer), model[0])
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load("~a-user-that-does-not-exist/model")


# files of our own


@pytest.mark.parametrize("tokenizer", ["as it is", "given"])
def test_a_single_file_of_ours_loads_without_anything_beside_it(model, tmp_path, tokenizer):
    pipe, folder = model
    convert(folder, tmp_path / "m.safetensors", progress=False)
    given = {} if tokenizer == "as it is" else {"tokenizer": pipe.tokenizer}
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)
        loaded = load(tmp_path / "m.safetensors", **given)
    assert same_models(loaded, pipe)
    assert loaded.family == pipe.family
    assert loaded.tokenizer.vocab == pipe.tokenizer.vocab
    convert(tmp_path / "m.safetensors", tmp_path / "again", progress=False)
    assert same_models(load(tmp_path / "again"), pipe)
    for path in (folder / "tokenizer").iterdir():
        assert (tmp_path / "again/tokenizer" / path.name).read_bytes() == path.read_bytes()


def test_a_vae_of_ours_keeps_its_scaling(model, tmp_path):
    pipe, folder = model
    convert(folder / "vae", tmp_path / "vae.safetensors", progress=False)
    assert load(folder, vae=tmp_path / "vae.safetensors").family.vae == pipe.family.vae


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"unet/config.json": 3}', "[" * 100_000])
@pytest.mark.parametrize("field", ["sdinpaint.configs", "sdinpaint.vocabulary"])
def test_damaged_metadata_are_named(model, tmp_path, text, field):
    pipe, folder = model
    path = tmp_path / "m.safetensors"
    save_file({key: value.contiguous() for key, value in single_file(pipe).items()}, path, {field: text})
    with pytest.raises(CheckpointError, match=field) as caught:
        load(path, **({"config": folder} if field == "sdinpaint.vocabulary" else {"tokenizer": pipe.tokenizer}))
    assert caught.value.code == "CKPT_BAD_CONFIG"
    assert len(str(caught.value)) < 600


# parts alone


def inspected(path):
    done = CliRunner().invoke(main, ["inspect", str(path)])
    return done.exit_code, done.output


PARTS = {
    "unet": "--base MODEL",
    UNET_FILE: "--base MODEL",
    "vae": "--vae PATH",
    VAE_FILE: "--vae PATH",
    "vae/config.json": "--vae PATH",
    "text_encoder": "--base PATH",
    "scheduler": "--config FOLDER",
    "scheduler/scheduler_config.json": "--config FOLDER",
    "tokenizer": "--tokenizer PATH",
    "tokenizer/vocab.json": "--tokenizer PATH",
    "tokenizer/merges.txt": "--tokenizer PATH",
    "tokenizer/tokenizer_config.json": "--tokenizer PATH",
    "tokenizer/special_tokens_map.json": "--tokenizer PATH",
    "model_index.json": "every tensor is accounted for",
    "": "every tensor is accounted for",
}


@pytest.mark.parametrize("part", PARTS)
def test_inspect_says_what_a_part_serves_as(model, part):
    code, told = inspected(model[1] / part)
    assert (code, PARTS[part] in told) == (0, True), told


@pytest.mark.parametrize("part", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"])
def test_settings_are_no_web_page(model, part):
    with pytest.raises(CheckpointError) as caught:
        load(model[1] / part)
    assert (caught.value.code, caught.value.hint) == ("CKPT_UNKNOWN_FORMAT", "give the folder that it is in")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("control_v11p_sd15_inpaint.cldm", "--controlnet PATH"),
        ("control_v11p_sd15_inpaint.diffusers", "--controlnet PATH"),
        ("vae_ft_mse.ldm", "--vae PATH"),
        ("sdxl_base.diffusers.text_encoder_2", "--base PATH"),
        ("sd15_inpainting.diffusers.unet", "--base MODEL"),
    ],
)
def test_inspect_says_what_a_released_part_serves_as(tmp_path, name, argument):
    code, told = inspected(write_header(tmp_path / "part.safetensors", inventory(name).shapes()))
    assert (code, argument in told) == (0, True), told


def test_inspect_fails_where_nothing_can_load_it(folder, tmp_path):
    cut = load_file(folder / VAE_FILE)
    del cut["quant_conv.bias"]
    write(folder / VAE_FILE, cut)
    for path in (folder, folder / "vae"):
        code, told = inspected(path)
        assert (code, "quant_conv.bias" in told) == (3, True)
    (folder / "scheduler/scheduler_config.json").write_text('{"beta_schedule": "sigmoid"}')
    assert inspected(folder / "scheduler")[0] == 3
    (folder / "tokenizer/vocab.json").write_text("{}")
    assert inspected(folder / "tokenizer")[0] == 3
    lora = write(tmp_path / "lora.safetensors", {"lora_unet_x.lora_up.weight": torch.ones(2, 2)})
    code, told = inspected(lora)
    assert (code, "a LoRA" in told) == (3, True)
