"""Weights that are none, that do not fit, or that want to run something: each is refused by name, with a remedy."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import pytest
import torch
from builders import (
    TEXT_FILE,
    UNET_FILE,
    VAE_FILE,
    Runs,
    random_pipeline,
    rewrite,
    rewrite_json,
    single_file,
    small,
    write_header,
)
from closeness import same_image
from refusals import INF, NAN, inpaint, load, refused
from safetensors.torch import load_file, save_file

import sdinpaint
from sdinpaint.errors import CheckpointError, SdInpaintWarning

# Checkpoint files that are no weights, or not all of them


def cut_safetensors(path, state):
    save_file(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_header(path, state):
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:1000])


def cut_zip(path, state):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-100])


def cut_legacy(path, state):
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped_bit(path, state):
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def web_page(path, state):
    path.write_text("<!DOCTYPE html><html><head><title>401 Unauthorized</title></head></html>")


def lfs_pointer(path, state):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n")


def empty(path, state):
    path.write_bytes(b"")


def three_bytes(path, state):
    path.write_bytes(b"abc")


def dangling_link(path, state):
    path.symlink_to(path.with_name("gone"))


NO_WEIGHTS = [
    (cut_safetensors, "CKPT_TRUNCATED", "incomplete"),
    (cut_header, "CKPT_TRUNCATED", "fetch it again"),
    (cut_zip, "CKPT_TRUNCATED", "fetch it again"),
    (cut_legacy, "CKPT_TRUNCATED", "fetch it again"),
    (web_page, "CKPT_HTML", "401 Unauthorized"),
    (lfs_pointer, "CKPT_LFS_POINTER", "git lfs pull"),
    (empty, "CKPT_EMPTY", "empty"),
    (three_bytes, "CKPT_UNKNOWN_FORMAT", "safetensors"),
    (dangling_link, "CKPT_NOT_REGULAR", "link"),
]


@pytest.mark.parametrize(("spoil", "code", "word"), NO_WEIGHTS)
def test_a_file_that_is_no_weights(tmp_path, pipe, spoil, code, word):
    path = tmp_path / "model.safetensors"
    spoil(path, single_file(pipe))
    refused(CheckpointError, code, lambda: load(path), path, word)
    refused(CheckpointError, code, lambda: sdinpaint.inspect(path), path, word)


@pytest.mark.parametrize(("spoil", "code", "word"), NO_WEIGHTS[:-1])
@pytest.mark.parametrize("file", [UNET_FILE, VAE_FILE, TEXT_FILE])
def test_a_component_that_is_no_weights(folder, file, spoil, code, word):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    spoil(folder / file, tensors)
    refused(CheckpointError, code, lambda: load(folder), folder / file, word)


def test_one_flipped_bit_of_a_pickle(folder):
    flipped_bit(folder / "unet/diffusion_pytorch_model.bin", load_file(folder / UNET_FILE))
    (folder / UNET_FILE).unlink()
    refused(CheckpointError, "CKPT_BAD_CRC", lambda: load(folder), "unet/diffusion_pytorch_model.bin", "CRC-32")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_folder_without_a_component(folder, component):
    shutil.rmtree(folder / component)
    refused(CheckpointError, "CKPT_NO_COMPONENT", lambda: load(folder), folder, component, "base=")
    (folder / component).mkdir()
    refused(CheckpointError, "CKPT_NOT_FOUND", lambda: load(folder), folder / component, "no weights")


# Keys


BLOCK = {
    UNET_FILE: ("UNet", "mid_block.resnets.0.conv1.weight", "middle_block.0.in_layers.2.weight"),
    VAE_FILE: ("VAE", "decoder.mid_block.resnets.0.conv1.weight", "decoder.mid.block_1.conv1.weight"),
    TEXT_FILE: ("Text encoder", "text_model.encoder.layers.0.mlp.fc2.weight", "text_model.encoder.layers.0.mlp.fc2"),
}


def missing(tensors, key):
    return {name: tensor for name, tensor in tensors.items() if name != key}


def unexpected(tensors, key):
    return tensors | {key.replace("weight", "extra"): torch.ones(3)}


def misshapen(tensors, key):
    return tensors | {key: tensors[key][1:]}


@pytest.mark.parametrize("spoil", [missing, unexpected, misshapen])
@pytest.mark.parametrize("file", list(BLOCK))
def test_wrong_keys(folder, file, spoil):
    title, key, native = BLOCK[file]
    rewrite(folder / file, lambda tensors: spoil(tensors, key))
    error = refused(CheckpointError, "CKPT_KEYS", lambda: load(folder), folder / file)
    assert f"{title}: 1 {spoil.__name__}" in error.found
    assert native.removesuffix(".weight") in error.found


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."])
def test_wrong_keys_in_a_single_file(tmp_path, source, pipe, vocabulary, prefix):
    state = single_file(pipe)
    key = next(name for name in reversed(state) if name.startswith(prefix) and name.endswith(".bias"))
    save_file(missing(state, key), tmp_path / "model.safetensors")
    error = refused(
        CheckpointError,
        "CKPT_KEYS",
        lambda: load(tmp_path / "model.safetensors", config=source, tokenizer=vocabulary),
        tmp_path / "model.safetensors",
    )
    assert f"1 missing, e.g. {key.removeprefix(prefix)}" in error.found


def test_all_that_is_wrong_is_counted(folder):
    def spoil(tensors):
        first, _, third, *_ = (name for name in tensors if name.startswith("up_blocks"))
        return misshapen(unexpected(missing(tensors, first), "conv_in.weight"), third) | {
            "up_blocks.9.x": torch.ones(1),
        }

    rewrite(folder / UNET_FILE, spoil)
    error = refused(CheckpointError, "CKPT_KEYS", lambda: load(folder))
    assert [word in error.found for word in ("1 missing", "1 misshapen", "2 unexpected")] == [True] * 3


# Weights of something else


LORA = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320, 1, 1),
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": (320, 4, 1, 1),
}
FOREIGN = [
    ("control_v11p_sd15_inpaint.cldm", "CKPT_NO_COMPONENT", "a ControlNet alone"),
    ("vae_ft_mse.ldm", "CKPT_NO_COMPONENT", "a VAE alone"),
    (LORA, "CKPT_WRONG_FAMILY", "a LoRA"),
    ({"emb_params": (8, 768)}, "CKPT_WRONG_FAMILY", "a textual-inversion embedding"),
    ({"foo": (3,)}, "CKPT_WRONG_FAMILY", "not a Stable Diffusion checkpoint: 1 tensor"),
]


@pytest.mark.parametrize(("shapes", "code", "title"), FOREIGN, ids=[title for *_, title in FOREIGN])
def test_weights_of_something_else(tmp_path, inventory, shapes, code, title):
    shapes = inventory(shapes).shapes() if isinstance(shapes, str) else shapes
    path = write_header(tmp_path / "other.safetensors", shapes)
    refused(CheckpointError, code, lambda: load(path), path, title)


def test_one_component_as_a_whole_model(source):
    error = refused(CheckpointError, "CKPT_NO_COMPONENT", lambda: load(source / UNET_FILE), source / UNET_FILE)
    assert "a UNet alone" in error.found
    refused(CheckpointError, "CKPT_NO_COMPONENT", lambda: load(source / "unet"), source / "unet", "base=")


def test_components_of_two_models(folder, tiny, vocabulary, tmp_path):
    wider = replace(small(tiny), text=replace(small(tiny).text, width=42, mlp_width=66))
    sdinpaint.save_diffusers(tmp_path / "wider", random_pipeline(wider, vocabulary))
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(tmp_path / "wider/text_encoder", folder / "text_encoder")
    refused(CheckpointError, "CKPT_MISMATCH", lambda: load(folder), folder, "28 wide", "42 wide")


def test_channels(folder, pipe):
    rewrite_json(folder / "unet/config.json", in_channels=4)
    refused(CheckpointError, "CKPT_BAD_CONFIG", lambda: load(folder), folder, "in_channels is 4", "expected: 9")
    rewrite_json(folder / "unet/config.json", in_channels=8)
    rewrite(folder / UNET_FILE, lambda tensors: tensors | {"conv_in.weight": tensors["conv_in.weight"][:, :8]})
    refused(CheckpointError, "CKPT_CHANNELS", lambda: load(folder), folder, "8 to 4 channels", "9 to 4 channels")


@pytest.mark.parametrize("file", [UNET_FILE, VAE_FILE, TEXT_FILE])
@pytest.mark.parametrize("value", [NAN, -INF])
def test_weights_that_are_not_finite(folder, file, value):
    key = BLOCK[file][1]

    def spoil(tensors):
        tensors[key].view(-1)[7] = value
        return tensors

    rewrite(folder / file, spoil)
    refused(CheckpointError, "CKPT_NONFINITE", lambda: load(folder), folder / file, key, "1 of")


BLANK = {
    UNET_FILE: ("conv_in.weight", "mid_block.resnets.0.norm1.weight", "down_blocks.0.attentions.0.proj_out.weight"),
    VAE_FILE: ("decoder.conv_out.weight", "quant_conv.weight"),
    TEXT_FILE: ("text_model.embeddings.position_embedding.weight", "text_model.final_layer_norm.weight"),
}


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"offload": True}, {"mmap": False}])
@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in BLANK.items() for key in keys])
def test_weights_that_are_zero_throughout(folder, file, key, options):
    rewrite(folder / file, lambda tensors: tensors | {key: torch.zeros_like(tensors[key])})
    refused(CheckpointError, "CKPT_BLANK", lambda: load(folder, **options), folder / file, key, "zero")


def test_zeros_that_training_may_leave(folder):
    def blank(tensors):
        biases = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.endswith("bias")}
        rows = tensors["conv_in.weight"].clone()
        rows[:, 4:] = 0  # the new channels of a model that is yet to be trained for inpainting
        rows[0] = 0
        return tensors | biases | {"conv_in.weight": rows}

    rewrite(folder / UNET_FILE, blank)
    inpaint(load(folder))


def test_integer_weights(folder):
    rewrite(folder / UNET_FILE, lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()})
    refused(CheckpointError, "CKPT_INTEGER_WEIGHTS", lambda: load(folder), folder / UNET_FILE, "int8")


# Files that want to run something


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_run_code_are_not_run(tmp_path, folder, pipe, legacy):
    sentinel = tmp_path / "was-run"
    evil = {"state_dict": single_file(pipe), "callbacks": Runs(sentinel)}
    targets = [tmp_path / "evil.ckpt", tmp_path / "evil.safetensors", folder / UNET_FILE.replace("safetensors", "bin")]
    (folder / UNET_FILE).unlink()
    for target, given in zip(targets, (*targets[:2], folder), strict=True):
        torch.save(evil, target, _use_new_zipfile_serialization=not legacy)
        for read in (load, sdinpaint.inspect):
            refused(CheckpointError, "CKPT_UNSAFE_PICKLE", lambda: read(given), target, "exec", "not")  # noqa: B023
    assert not sentinel.exists()


def test_no_module_is_imported_because_a_configuration_names_it(folder, usual, tmp_path, monkeypatch):
    (tmp_path / "sentinel_module.py").write_text("raise AssertionError('this was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite_json(
        folder / "model_index.json",
        _class_name="system",
        vae=["sentinel_module", "Model"],
        unet=["os", "system"],
    )
    rewrite_json(folder / "text_encoder/config.json", architectures=["sentinel_module"])
    assert same_image(inpaint(load(folder)).image, usual)
    for file, named in [
        ("unet/config.json", {"_class_name": "sentinel_module.Model"}),
        ("unet/config.json", {"_class_name": ["sentinel_module", "Model"]}),
        ("text_encoder/config.json", {"model_type": "sentinel_module"}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "sentinel_module.Tokenizer"}),
        ("scheduler/scheduler_config.json", {"_class_name": ["sentinel_module", "Scheduler"]}),
    ]:
        good = (folder / file).read_text()
        rewrite_json(folder / file, **named)
        refused(CheckpointError, "CKPT_NOT_BUILT", lambda: load(folder), "sentinel_module")
        (folder / file).write_text(good)
    rewrite_json(folder / "unet/config.json", auto_map={"A": "sentinel_module.A"})
    with pytest.warns(SdInpaintWarning, match="auto_map"):
        assert same_image(inpaint(load(folder)).image, usual)
    assert "sentinel_module" not in sys.modules
