"""Bad inputs, end to end: each is refused by an error that says what to change, and the next run is as good as ever."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import warnings
import zlib
from dataclasses import replace

import numpy as np
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
from PIL import Image
from safetensors.torch import load_file, save_file

import sdinpaint
from sdinpaint import SdInpaintError, SdInpaintWarning
from sdinpaint.errors import CheckpointError, ImageError, MaskError, NumericError, SettingError, TokenizerError
from sdinpaint.text.tokenizer import train_tokenizer

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8)
MASK = np.zeros((64, 72), dtype=bool)
MASK[16:50, 20:60] = True
NAN, INF = math.nan, math.inf


def load(source, **options):
    return sdinpaint.load(source, device="cpu", progress=False, **options)


def inpaint(pipe, image=IMAGE, mask=MASK, prompt="a red fox", **options):
    return pipe.inpaint(image, mask, prompt, **{"steps": 1, "seed": 5, "progress": False} | options)


@pytest.fixture(scope="module")
def source(tiny, vocabulary, tmp_path_factory):
    """A good model as a diffusers folder; not to be changed."""
    folder = tmp_path_factory.mktemp("good") / "model"
    sdinpaint.save_diffusers(folder, random_pipeline(small(tiny), vocabulary))
    return folder


@pytest.fixture(scope="module")
def pipe(source):
    return load(source)


@pytest.fixture(scope="module")
def usual(pipe):
    return np.asarray(inpaint(pipe).image)


@pytest.fixture(autouse=True)
def no_harm_done(pipe, usual):
    """After every test of this file, the usual picture comes out bit for bit."""
    yield
    assert np.array_equal(inpaint(pipe).image, usual)


@pytest.fixture
def folder(source, tmp_path):
    """A copy of the good model to spoil."""
    return shutil.copytree(source, tmp_path / "model")


def refused(kind, code, call, *words):
    """The error of a call, after checking what every error must have."""
    with pytest.raises(SdInpaintError) as caught:
        call()
    error = caught.value
    assert isinstance(error, kind)
    assert isinstance(error, OSError | ValueError)
    assert error.code == code
    assert error.found
    assert error.expected or error.hint
    for word in (error.subject, *words):
        assert str(word) in str(error)
    return error


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
    refused(CheckpointError, "CKPT_NOT_FOUND", lambda: load(folder), folder, component)
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
            "up_blocks.9.x": torch.ones(1)
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
    ("sdxl_base.sgm", "CKPT_WRONG_FAMILY", "an SDXL checkpoint"),
    ("sd2_inpainting.ldm", "CKPT_WRONG_FAMILY", "a Stable Diffusion 2 checkpoint"),
    ("control_v11p_sd15_inpaint.cldm", "CKPT_NO_COMPONENT", "a ControlNet alone"),
    ("vae_ft_mse.ldm", "CKPT_WRONG_FAMILY", "a VAE alone"),
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
    refused(CheckpointError, "CKPT_NOT_FOUND", lambda: load(source / "unet"), "model's own folder")


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
        folder / "model_index.json", _class_name="system", vae=["sentinel_module", "Model"], unet=["os", "system"]
    )
    rewrite_json(folder / "unet/config.json", _class_name="sentinel_module.Model", auto_map={"A": "sentinel_module.A"})
    rewrite_json(folder / "text_encoder/config.json", architectures=["sentinel_module"], model_type="sentinel_module")
    rewrite_json(folder / "tokenizer/tokenizer_config.json", tokenizer_class="sentinel_module.Tokenizer")
    assert np.array_equal(inpaint(load(folder)).image, usual)
    assert "sentinel_module" not in sys.modules


# Configurations and vocabularies


@pytest.mark.parametrize(
    "text", ["", "{", "<html>", "[1]", "3", "null", '{"a": NaN', "[" * 100_000, "\udcff", "9" * 5000]
)
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_configuration_that_is_no_table(folder, file, text):
    (folder / file).write_text(text, "utf-8", "surrogateescape")
    refused(CheckpointError, "CKPT_BAD_CONFIG", lambda: load(folder), folder / file)


def test_configuration_of_many_megabytes(folder):
    (folder / "vae/config.json").write_text(json.dumps({"a": "b" * 2_000_000}))
    refused(CheckpointError, "CKPT_BAD_CONFIG", lambda: load(folder), folder / "vae/config.json", "bytes")


@pytest.mark.parametrize(
    ("component", "name", "values"),
    [
        ("unet", "norm_num_groups", [7, 0, -4, 2.5, "4", True, 2_000_000, [4]]),
        ("unet", "attention_head_dim", [5, -3, 0.5, "3", {}, [], [3, 3, 3], [0, 0, 0], [-3, -6, -9], [None]]),
        ("unet", "sample_size", [0, -1, [64, 64], 10**30]),
        ("unet", "in_channels", [4, 0, "9"]),
        ("vae", "norm_num_groups", [3, 0, 10**6]),
        ("vae", "scaling_factor", [0, -1, NAN, INF, "0.18", [0.18], True]),
        ("text_encoder", "num_attention_heads", [5, 0, -7, 28.0]),
        ("text_encoder", "hidden_act", ["relu", 3, [], {}]),
        ("scheduler", "prediction_type", ["sample", None, 3, [], {}]),
        ("scheduler", "beta_schedule", ["linear", "squaredcos_cap_v2", None, []]),
        ("scheduler", "trained_betas", [[0.1] * 1000]),
        ("scheduler", "num_train_timesteps", [0, -1, 10**12, "1000"]),
        ("scheduler", "beta_start", [0, -0.1, NAN, "0"]),
        ("scheduler", "beta_end", [1.5, 1e5, 0, [0.1]]),
        ("scheduler", "steps_offset", [-1, 0.5]),
    ],
)
def test_absurd_values_in_a_configuration(folder, component, name, values):
    path = folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    good = path.read_text()
    for value in values:
        path.write_text(good)
        rewrite_json(path, **{name: value})
        refused(CheckpointError, "CKPT_BAD_CONFIG", lambda: load(folder), folder)


def test_sizes_in_a_configuration_are_not_believed(folder, usual):
    rewrite_json(folder / "unet/config.json", block_out_channels=[2_000_000] * 99, layers_per_block=10**9)
    rewrite_json(folder / "vae/config.json", block_out_channels="none", latent_channels=10**9)
    rewrite_json(folder / "text_encoder/config.json", hidden_size=10**12, num_hidden_layers=10**9, vocab_size=-1)
    assert np.array_equal(inpaint(load(folder)).image, usual)


@pytest.mark.parametrize("rows", [514, 600])
def test_vocabulary_of_another_size(folder, source, rows):
    words = [f"{a}{b} {a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    other = train_tokenizer(words, rows)
    assert other.vocab_size == rows
    refused(TokenizerError, "TOKENIZER_MISMATCH", lambda: load(source, tokenizer=other), "tokenizer", f"{rows} tokens")
    other.save(folder / "tokenizer")
    refused(TokenizerError, "TOKENIZER_MISMATCH", lambda: load(folder), folder / "tokenizer", f"{rows} tokens")


def test_broken_vocabulary(folder, source):
    (folder / "tokenizer/vocab.json").write_text("{")
    refused(TokenizerError, "TOKENIZER_BROKEN", lambda: load(folder), folder / "tokenizer")
    none = folder / "nothing"
    refused(TokenizerError, "TOKENIZER_BROKEN", lambda: load(source, tokenizer=none), none)


# Pictures and masks


def png_header(path, width, height):
    """A PNG of next to nothing that says it is this large."""
    header = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    chunks = (header, b"IDAT" + zlib.compress(bytes(100)), b"IEND")
    framed = [(len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) for chunk in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


def truncated_png(path):
    Image.fromarray(IMAGE).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:2000])


def truncated_jpeg(path):
    Image.fromarray(IMAGE).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1000])


FILES = [
    (lambda path: None, "IMAGE_NOT_FOUND"),
    (lambda path: path.mkdir(), "IMAGE_NOT_A_FILE"),
    (lambda path: path.touch(), "IMAGE_UNREADABLE"),
    (lambda path: path.write_text("<svg/>"), "IMAGE_UNREADABLE"),
    (lambda path: path.write_bytes(b"%PDF-1.7"), "IMAGE_UNREADABLE"),
    (truncated_png, "IMAGE_TRUNCATED"),
    (truncated_jpeg, "IMAGE_TRUNCATED"),
    (lambda path: png_header(path, 0, 64), "IMAGE_UNREADABLE"),
    (lambda path: png_header(path, 64, 64), "IMAGE_TRUNCATED"),
    (lambda path: png_header(path, 13_000, 13_000), "IMAGE_TOO_LARGE"),
    (lambda path: png_header(path, 20_000, 20_000), "IMAGE_TOO_LARGE"),
    (lambda path: Image.new("RGB", (7, 64)).save(path), "IMAGE_TOO_SMALL"),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("write", "code"), FILES)
def test_picture_files(pipe, tmp_path, write, code):
    path = tmp_path / "picture.png"
    write(path)
    subject = "image" if code == "IMAGE_TOO_SMALL" else f"image {str(path)!r}"
    assert refused(ImageError, code, lambda: inpaint(pipe, image=path)).subject == subject


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("write", "code"), FILES[:-1])
def test_mask_files(pipe, tmp_path, write, code):
    path = tmp_path / "mask.png"
    write(path)
    assert refused(ImageError, code, lambda: inpaint(pipe, mask=path)).subject == f"mask {str(path)!r}"


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (None, "IMAGE_TYPE"),
        (7, "IMAGE_TYPE"),
        (b"bytes", "IMAGE_TYPE"),
        (np.zeros((64, 72, 3)), "IMAGE_TYPE"),
        (np.zeros((64, 72), np.uint8), "IMAGE_BAD_SHAPE"),
        (np.zeros((0, 72, 3), np.uint8), "IMAGE_TOO_SMALL"),
        (np.zeros((7, 72, 3), np.uint8), "IMAGE_TOO_SMALL"),
        (torch.full((3, 64, 72), NAN), "IMAGE_BAD_VALUES"),
        (torch.full((3, 64, 72), 1.5), "IMAGE_BAD_VALUES"),
        (torch.zeros(4, 64, 72), "IMAGE_BAD_SHAPE"),
        (torch.zeros(64, 72, 3, dtype=torch.uint8), "IMAGE_TYPE"),
    ],
)
def test_what_is_no_picture(pipe, image, code):
    assert refused(ImageError, code, lambda: inpaint(pipe, image=image)).subject == "image"


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (None, "MASK_TYPE"),
        (np.zeros((64, 73), bool), "MASK_SIZE"),
        (np.zeros((72, 64), bool), "MASK_SIZE"),
        (np.zeros((0, 0), bool), "MASK_BAD_SHAPE"),
        (np.zeros((2, 64, 72), bool), "MASK_BAD_SHAPE"),
        (MASK * NAN, "MASK_BAD_VALUES"),
        (MASK * 2.0, "MASK_BAD_VALUES"),
        (MASK.astype(np.uint8), "MASK_BAD_VALUES"),
        (np.where(MASK[..., None], np.uint8([255, 0, 0]), np.uint8(0)), "MASK_COLOURED"),
    ],
)
def test_what_is_no_mask(pipe, mask, code):
    assert refused(MaskError, code, lambda: inpaint(pipe, mask=mask)).subject == "mask"


def test_nothing_to_repaint(pipe):
    for options in ({"mask": np.zeros_like(MASK)}, {"mask": 0.2 * MASK}, {"strength": 0}, {"strength": 0.0}):
        with pytest.warns(SdInpaintWarning, match="comes back unchanged") as caught:
            result = inpaint(pipe, **options)
        assert np.array_equal(result.image, IMAGE)
        assert [warning.filename for warning in caught] == [__file__]


# Settings


SETTINGS = [
    ("steps", [0, -1, 2.5, None, 1001, "7", True, NAN, INF, 10**400, [5]], "SETTING_STEPS"),
    ("strength", [-0.1, 2, NAN, INF, None, "0.5", True, 10**400], "SETTING_STRENGTH"),
    ("guidance_scale", [NAN, INF, -INF, "7.5", None, False, 10**400], "SETTING_GUIDANCE"),
    ("seed", [-2, 2**63, 1.5, True, "5", NAN, b"5", -1.5], "SETTING_SEED"),
    ("eta", [NAN, INF, -0.1, "0"], "SETTING_ETA"),
    ("sampler", ["dimm", "DDIM", "", None, 3, []], "SETTING_SAMPLER"),
    ("spacing", ["leadin", "Karras", "", 3], "SETTING_SPACING"),
    ("cover", ["all", None, 1], "SETTING_COVER"),
    ("noise", [torch.zeros(4, 8, 9), torch.zeros(1, 3, 8, 9), torch.zeros(2, 4, 8, 9), 7, [1.0]], "SETTING_NOISE"),
    ("noise", [torch.zeros(1, 4, 8, 8), torch.full((1, 4, 8, 9), NAN), np.zeros((1, 4, 8, 9))], "SETTING_NOISE"),
    ("prompt", [5, 0, b"a fox", b"", False, ["a", 5], "a \ud800 fox", {"a": 1}], "SETTING_PROMPT"),
    ("negative_prompt", [5, 0, b"a fox", ["a \udfff"]], "SETTING_PROMPT"),
]


@pytest.mark.parametrize(("name", "values", "code"), SETTINGS)
def test_settings_out_of_bounds(pipe, monkeypatch, name, values, code):
    monkeypatch.setattr(pipe, "_repaint", lambda *_: pytest.fail("something was computed"))
    for value in values:
        error = refused(SettingError, code, lambda: inpaint(pipe, **{name: value}))  # noqa: B023
        assert error.subject == name


def test_the_last_of_a_list_is_checked_before_anything_is_computed(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "_repaint", lambda *_: pytest.fail("something was computed"))
    images = [IMAGE, IMAGE[:32, :40]]
    masks = [MASK, MASK[:32, :40]]
    warnings.simplefilter("ignore", SdInpaintWarning)  # one of them is very small
    refused(SettingError, "SETTING_PROMPT", lambda: inpaint(pipe, images, masks, ["a", b"b"]))
    refused(SettingError, "SETTING_SEED", lambda: inpaint(pipe, images, masks, seed=[1, -2]))
    refused(MaskError, "MASK_SIZE", lambda: inpaint(pipe, images, MASK))
    refused(ImageError, "IMAGE_TYPE", lambda: inpaint(pipe, [IMAGE, None], MASK))


def test_names_that_are_almost_right(pipe):
    for name, value, meant in (("sampler", "eulr", "euler"), ("spacing", "leadin", "leading")):
        error = refused(SettingError, f"SETTING_{name.upper()}", lambda: inpaint(pipe, **{name: value}))  # noqa: B023
        assert error.hint == f"did you mean {meant!r}?"
        assert meant in error.expected


def test_fresh_noise_for_a_sampler_that_takes_none(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "_repaint", lambda *_: pytest.fail("something was computed"))
    refused(SettingError, "SETTING_ETA", lambda: inpaint(pipe, sampler="dpmpp_2m", eta=0.5), "eta", "dpmpp_2m")


def test_counts(pipe):
    words = "2 prompts", "3 images"
    refused(SettingError, "SETTING_COUNTS", lambda: inpaint(pipe, [IMAGE] * 3, MASK, ["a", "b"]), *words)
    for name in ("image", "mask", "prompt", "negative_prompt", "seed"):
        error = refused(SettingError, "SETTING_COUNTS", lambda: inpaint(pipe, **{name: []}))  # noqa: B023
        assert f"0 {name.replace('_', ' ')}s" in error.found
    refused(SettingError, "SETTING_COUNTS", lambda: inpaint(pipe, [IMAGE] * 2, [MASK] * 3))
    refused(SettingError, "SETTING_COUNTS", lambda: inpaint(pipe, seed=[1, 2], prompt=["a"] * 3))


def test_more_steps_than_were_trained(folder):
    rewrite_json(folder / "scheduler/scheduler_config.json", num_train_timesteps=20)
    refused(SettingError, "SETTING_STEPS", lambda: inpaint(load(folder), steps=21), "steps", "1 to 20")


def test_very_high_guidance_warns(pipe):
    with pytest.warns(SdInpaintWarning, match="guidance_scale 31") as caught:
        inpaint(pipe, guidance_scale=31)
    assert caught[0].filename == __file__


# Prompts


def test_no_prompt_is_the_empty_one(pipe):
    nothing = inpaint(pipe, prompt="")
    assert np.array_equal(inpaint(pipe, prompt=None).image, nothing.image)
    assert np.array_equal(inpaint(pipe, prompt=[None]).image, nothing.image)
    assert np.array_equal(inpaint(pipe, prompt="", negative_prompt=None).image, nothing.image)
    assert not np.array_equal(inpaint(pipe).image, nothing.image)
    assert inpaint(pipe, prompt=None).settings["prompt"] == ""


def test_a_prompt_that_is_too_long(pipe):
    words = " ".join(f"w{i}" for i in range(200))
    with pytest.warns(SdInpaintWarning, match="75 used; cut: '") as caught:
        long = inpaint(pipe, prompt=words)
    shown = str(caught[0].message).partition("cut: '")[2][:12]
    start = words.index(shown)
    assert start > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)
        assert np.array_equal(inpaint(pipe, prompt=words[:start]).image, long.image)


@pytest.mark.parametrize(
    "prompt", ["\0\a\x1b[31m", "\u202e fox", "狐狸 🦊", "e\u0301", "<|endoftext|> fox", "((fox:1.2"]
)
def test_unusual_prompts(pipe, prompt):
    assert inpaint(pipe, prompt=prompt).settings["prompt"] == prompt


# While it runs


@pytest.mark.parametrize("step", [0, 2])
def test_a_unet_that_fails_gives_no_picture(pipe, monkeypatch, step):
    forward, calls = pipe.unet.forward, []

    def failing(*arguments):
        calls.append(1)
        output = forward(*arguments)
        return output * NAN if len(calls) == step + 1 else output

    with monkeypatch.context() as patch:
        patch.setattr(pipe.unet, "forward", failing)
        with pytest.raises(NumericError) as caught:
            inpaint(pipe, steps=4)
    assert caught.value.code == "NUMERIC_NOT_FINITE"
    assert f"at step {step + 1} of 4" in caught.value.found
    assert "float32" in caught.value.hint


@pytest.mark.parametrize(("half", "code"), [("encode", "NUMERIC_ENCODE"), ("decode", "NUMERIC_DECODE")])
def test_an_autoencoder_that_fails_gives_no_picture(pipe, monkeypatch, half, code):
    norm = (pipe.vae.encoder if half == "encode" else pipe.vae.decoder).norm_out
    forward = norm.forward
    with monkeypatch.context() as patch:
        patch.setattr(norm, "forward", lambda x: forward(x) / 0)
        with pytest.raises(NumericError) as caught:
            inpaint(pipe)
    assert caught.value.code == code
    assert caught.value.subject == "vae"
    assert "vae=" in caught.value.hint


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_an_autoencoder_that_overflows_runs_again_in_float32(folder, half):
    def louder(tensors):
        name = f"{half}r.conv_in.weight"  # norms bring the size down again, so that float32 has no trouble
        return tensors | {name: tensors[name] * (30_000 / float(tensors[name].abs().max()))}

    rewrite(folder / VAE_FILE, louder)
    pipe = load(folder, dtype="float16")
    with pytest.warns(SdInpaintWarning, match=rf"overflowed in torch\.float16; the picture is {half}d in float32"):
        found = inpaint(pipe).image
    assert {weight.dtype for weight in pipe.vae.parameters()} == {torch.float16}
    expected = np.asarray(inpaint(load(folder)).image).astype(int)
    assert np.abs(expected - found).mean() < 12  # of 255; a black picture is 128 away
    assert np.asarray(found)[MASK].std() > 20


class Stop(Exception):
    pass


def test_a_callback_that_raises(pipe, usual):
    def stop(step, x, x0):
        raise Stop

    with pytest.raises(Stop):
        inpaint(pipe, steps=3, on_step=stop)
    assert np.array_equal(inpaint(pipe).image, usual)


def test_one_pipeline_in_many_threads(pipe):
    jobs = [
        {"steps": 1 + i % 4, "sampler": name, "seed": i}
        for i, name in enumerate(("ddim", "euler", "euler_ancestral", "dpmpp_2m") * 2)
    ]
    alone = [np.asarray(inpaint(pipe, **job).image) for job in jobs]
    together = [None] * len(jobs)
    ready = threading.Barrier(len(jobs))

    def work(index):
        ready.wait()
        together[index] = np.asarray(inpaint(pipe, **jobs[index]).image)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_file_that_was_cut_after_loading_is_told_by_the_next_load(folder, usual):
    pipe = load(folder, dtype="bfloat16")  # nothing stays mapped
    content = (folder / UNET_FILE).read_bytes()
    (folder / UNET_FILE).write_bytes(content[:-5])
    inpaint(pipe)
    refused(CheckpointError, "CKPT_TRUNCATED", lambda: load(folder), folder / UNET_FILE)
    (folder / UNET_FILE).write_bytes(content)
    assert np.array_equal(inpaint(load(folder)).image, usual)
