"""One model, in whatever files it comes: the same weights, the same image; and what `inspect` says of each."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import (
    POSITIONS,
    TEXT_FILE,
    UNET_FILE,
    VAE_FILE,
    averages,
    for_text_to_image,
    random_pipeline,
    rewrite,
    rewrite_json,
    save_lightning,
    single_file,
    small,
    states,
    write_header,
)
from safetensors.torch import load_file, save_file
from sdinpaint_weights.export import write_single_file
from sdinpaint_weights.files import SourceFile
from sdinpaint_weights.weights import Entry

import sdinpaint
from sdinpaint import SdInpaintWarning
from sdinpaint.checkpoints import opening
from sdinpaint.errors import CheckpointError, SettingError, TokenizerError
from sdinpaint.families import SD15_INPAINT

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8)
MASK = np.zeros((64, 72), dtype=bool)
MASK[16:50, 20:60] = True
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FILES = {"unet": UNET_FILE, "vae": VAE_FILE, "text_encoder": TEXT_FILE}


def load(source, **options):
    return sdinpaint.load(source, device="cpu", progress=False, **options)


def paint(pipe):
    return np.asarray(pipe.inpaint(IMAGE, MASK, "a red fox", steps=2, seed=5, progress=False).image)


def alike(one, other):
    """Up to the rounding of sums, which depends on how weights that stay in their file are aligned in memory."""
    return int(np.abs(one.astype(int) - other).max()) <= 1


def same_weights(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def same_models(one, other):
    return all(same_weights(states(one)[component], states(other)[component]) for component in FILES)


def contiguous(tensors):
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def family(tiny):
    return small(tiny)


@pytest.fixture(scope="module")
def pipe(family, vocabulary):
    return random_pipeline(family, vocabulary)


@pytest.fixture(scope="module")
def other(family, vocabulary):
    """Other weights of the same family."""
    return random_pipeline(family, vocabulary, seed=1)


@pytest.fixture(scope="module")
def image(pipe):
    return paint(pipe)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    """The model as a diffusers folder; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    sdinpaint.save_diffusers(folder, pipe)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved` to change."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def alone(saved, vocabulary):
    """Options with which a single file of a small model loads: what no shape tells, and the vocabulary."""
    return {"config": saved, "tokenizer": vocabulary}


def test_the_folder_holds_the_whole_model(saved, pipe, image):
    loaded = load(saved)
    assert loaded.family == pipe.family
    assert same_models(loaded, pipe)
    assert alike(paint(loaded), image)


# Single files: writers (path, tensors, monkeypatch)


def safetensors(path, state):
    save_file(contiguous(state), path)


def lightning(path, state):
    save_lightning(path, state)


def lightning_legacy(path, state):
    save_lightning(path, state, legacy=True)


def plain_pickle(path, state):
    torch.save(state, path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (safetensors, "model.safetensors"),
        (safetensors, "model.ckpt"),
        (lightning, "model.ckpt"),
        (lightning, "model.safetensors"),
        (lightning_legacy, "model.ckpt"),
        (lightning_legacy, "model"),
        (plain_pickle, "model.pth"),
    ],
)
def test_single_files_of_any_name(tmp_path, alone, pipe, other, image, write, name):
    write(tmp_path / name, single_file(pipe) | averages(other.unet))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)  # nothing in it is unknown
        loaded = load(tmp_path / name, **alone)
    assert loaded.family == pipe.family
    assert same_models(loaded, pipe)
    assert alike(paint(loaded), image)


def test_single_file_as_exported(tmp_path, alone, pipe, image):
    write_single_file(tmp_path / "model.safetensors", states(pipe), "sd1")
    assert alike(paint(load(tmp_path / "model.safetensors", **alone)), image)


def test_single_file_without_text_model_in_its_names(tmp_path, alone, pipe, image):
    flat = {name.replace("transformer.text_model.", "transformer."): value for name, value in single_file(pipe).items()}
    save_file(contiguous(flat), tmp_path / "model.safetensors")
    assert alike(paint(load(tmp_path / "model.safetensors", **alone)), image)


# Diffusers folders: changes to one


def replace_files(folder, ending, save):
    for component, file in FILES.items():
        old = folder / file
        stem = "pytorch_model" if component == "text_encoder" and ".bin" in ending else old.stem
        tensors = load_file(old)
        old.unlink()
        save(tensors, old.with_name(stem + ending))


def as_bin(folder):
    replace_files(folder, ".bin", torch.save)


def as_legacy_bin(folder):
    replace_files(folder, ".bin", lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False))


def as_pickles_named_safetensors(folder):
    replace_files(folder, ".safetensors", torch.save)


def as_safetensors_named_bin(folder):
    replace_files(folder, ".bin", save_file)


def as_the_only_variant(folder):
    replace_files(folder, ".fp16.safetensors", save_file)


def in_shards(ending, save):
    """A change that spreads each component over two files, and lists them in an index."""

    def write(tensors, path):
        names = sorted(tensors)
        shards = {f"{path.name.split('.')[0]}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
        for shard, held in shards.items():
            save({name: tensors[name] for name in held}, path.with_name(shard))
        index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
        path.write_text(json.dumps(index | {"metadata": {"total_size": 1}}))

    return lambda folder: replace_files(folder, f".{ending}.index.json", write)


def with_attention_names_of_2022(folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def earlier(name):
        return re.sub(r"(?<=attentions\.0\.)(to_[qkv]|to_out\.0)", lambda match: old[match[1]], name)

    assert earlier("mid_block.attentions.0.to_out.0.bias") == "mid_block.attentions.0.proj_attn.bias"
    rewrite(folder / VAE_FILE, lambda tensors: {earlier(name): tensor for name, tensor in tensors.items()})


def without_text_model_in_names(folder):
    rewrite(folder / TEXT_FILE, lambda tensors: {key.removeprefix("text_model."): tensors[key] for key in tensors})


def with_position_ids(folder):
    rewrite(folder / TEXT_FILE, lambda tensors: tensors | {"text_model.embeddings.position_ids": POSITIONS})


def without_text_model_and_with_position_ids(folder):
    with_position_ids(folder)
    without_text_model_in_names(folder)


def with_other_parts_around(folder):
    for name in ("safety_checker", "feature_extractor", ".git"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("no table")


@pytest.mark.parametrize(
    "change",
    [
        as_bin,
        as_legacy_bin,
        as_pickles_named_safetensors,
        as_safetensors_named_bin,
        pytest.param(in_shards("safetensors", save_file), id="shards"),
        pytest.param(in_shards("bin", torch.save), id="pickled shards"),
        with_attention_names_of_2022,
        without_text_model_in_names,
        with_position_ids,
        without_text_model_and_with_position_ids,
        with_other_parts_around,
    ],
)
def test_folders(folder, pipe, image, change):
    change(folder)
    loaded = load(folder)
    assert same_models(loaded, pipe)
    assert alike(paint(loaded), image)


def test_the_only_variant_is_taken_and_told(folder, pipe, image):
    as_the_only_variant(folder)
    with pytest.warns(SdInpaintWarning, match="the variant 'fp16' is used") as caught:
        loaded = load(folder)
    assert len(caught) == len(FILES)
    assert same_models(loaded, pipe)
    assert alike(paint(loaded), image)
    assert same_models(load(folder, variant="fp16"), pipe)


def test_variant_is_taken_only_when_asked_for(folder, pipe):
    for file in FILES.values():
        variant = shutil.copy(folder / file, (folder / file).with_suffix(".fp16.safetensors"))
        rewrite(variant, lambda tensors: {name: tensor / 2 for name, tensor in tensors.items()})
    halves = {name: value / 2 for name, value in pipe.unet.state_dict().items()}
    assert same_models(load(folder), pipe)
    assert same_weights(load(folder, variant="fp16").unet.state_dict(), halves)
    with pytest.raises(CheckpointError) as caught:
        load(folder, variant="ema")
    assert caught.value.code == "CKPT_VARIANT"


def test_four_channels(family, vocabulary, tmp_path):
    pipe = random_pipeline(for_text_to_image(family), vocabulary)
    sdinpaint.save_diffusers(tmp_path / "model", pipe)
    loaded = load(tmp_path / "model")
    assert loaded.family == pipe.family
    assert not loaded.takes_mask
    assert alike(paint(loaded), paint(pipe))


def test_demo_is_a_name(saved, pipe, substitute):
    substitute(opening, DEMO=saved)
    assert same_models(load("demo"), pipe)


def test_what_is_not_there(tmp_path):
    for source in (tmp_path / "none.safetensors", "folder/none.safetensors", "none", Path("owner/name")):
        with pytest.raises(CheckpointError) as caught:
            load(source)
        assert caught.value.code == "CKPT_NOT_FOUND"
        assert str(source) in str(caught.value)


# Choices: averages, dtypes, another autoencoder, configuration, vocabulary


def test_averages_only_when_asked_for(tmp_path, alone, pipe, other):
    save_file(contiguous(single_file(pipe) | averages(other.unet)), tmp_path / "both.safetensors")
    assert same_models(load(tmp_path / "both.safetensors", **alone), pipe)
    averaged = load(tmp_path / "both.safetensors", ema=True, **alone)
    assert same_weights(averaged.unet.state_dict(), other.unet.state_dict())
    assert same_weights(averaged.vae.state_dict(), pipe.vae.state_dict())


@pytest.mark.parametrize("ema", [False, True])
def test_averages_alone(tmp_path, alone, pipe, other, ema):
    rest = {name: value for name, value in single_file(pipe).items() if not name.startswith("model.")}
    save_file(contiguous(rest | averages(other.unet)), tmp_path / "averages.safetensors")
    with pytest.warns(SdInpaintWarning, match=r"averaged \(EMA\) weights of the UNet only") as caught:
        loaded = load(tmp_path / "averages.safetensors", ema=ema, **alone)
    assert len(caught) == 1
    assert same_weights(loaded.unet.state_dict(), other.unet.state_dict())


def test_no_averages(tmp_path, alone, saved, pipe):
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    save_file(contiguous(single_file(pipe) | counters), tmp_path / "plain.safetensors")
    for source, options in ((tmp_path / "plain.safetensors", alone), (saved, {})):
        with pytest.raises(CheckpointError) as caught:
            load(source, ema=True, **options)
        assert caught.value.code == "CKPT_NO_EMA"
        assert "ema=False" in caught.value.hint


@pytest.mark.parametrize("asked", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_dtypes(tmp_path, pipe, stored, asked):
    sdinpaint.save_diffusers(tmp_path / "model", pipe, DTYPES[stored])
    loaded = load(tmp_path / "model", dtype=asked)
    assert loaded.dtype == DTYPES[asked]
    for component, tensors in states(pipe).items():
        expected = {name: value.to(DTYPES[stored]).to(DTYPES[asked]) for name, value in tensors.items()}
        assert same_weights(states(loaded)[component], expected)


def test_dtype_by_default_is_float32_on_a_cpu(tmp_path, pipe):
    sdinpaint.save_diffusers(tmp_path / "model", pipe, torch.float16)
    assert load(tmp_path / "model").dtype == torch.float32
    assert load(tmp_path / "model", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_values_that_the_dtype_cannot_hold(folder):
    rewrite(folder / VAE_FILE, lambda tensors: tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + 70000})
    with pytest.raises(CheckpointError) as caught:
        load(folder, dtype="float16")
    assert caught.value.code == "CKPT_OVERFLOW"
    assert "quant_conv.bias" in str(caught.value)
    load(folder, dtype="bfloat16")


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [("dtype", "float64", "SETTING_DTYPE"), ("dtype", 16, "SETTING_DTYPE"), ("device", "gpu", "SETTING_DEVICE")],
)
def test_unknown_dtype_and_device(saved, option, value, code):
    with pytest.raises(SettingError) as caught:
        sdinpaint.load(saved, progress=False, **{option: value})
    assert (caught.value.code, caught.value.subject) == (code, option)
    assert caught.value.expected


def test_another_autoencoder(saved, tmp_path, pipe, other, alone):
    native = other.vae.state_dict()
    sdinpaint.save_diffusers(tmp_path / "model", other)
    save_file(contiguous(native), tmp_path / "vae.safetensors")
    torch.save(
        {"state_dict": {f"first_stage_model.{name}": value for name, value in native.items()}}, tmp_path / "a.pt"
    )
    save_file(contiguous(single_file(other)), tmp_path / "whole.safetensors")
    given = ("model", "model/vae", f"model/{VAE_FILE}", "vae.safetensors", "a.pt", "whole.safetensors")
    for vae in given:
        loaded = load(saved, vae=tmp_path / vae)
        assert same_weights(loaded.vae.state_dict(), native), vae
        assert same_weights(loaded.unet.state_dict(), pipe.unet.state_dict()), vae
        assert loaded.family == pipe.family, vae
    save_file(contiguous(single_file(pipe)), tmp_path / "single.safetensors")
    assert same_weights(load(tmp_path / "single.safetensors", vae=tmp_path / "a.pt", **alone).vae.state_dict(), native)


def test_another_autoencoder_brings_its_own_configuration(saved, tmp_path, other):
    sdinpaint.save_diffusers(tmp_path / "model", other)
    rewrite_json(tmp_path / "model/vae/config.json", scaling_factor=0.5)
    assert load(saved, vae=tmp_path / "model").family.vae.scaling_factor == 0.5
    assert load(saved, vae=tmp_path / "model/vae").family.vae.scaling_factor == 0.5


def test_a_model_is_no_autoencoder(saved):
    with pytest.raises(CheckpointError) as caught:
        load(saved, vae=saved / "unet")
    assert caught.value.code == "CKPT_NO_COMPONENT"
    assert "it holds no vae" in caught.value.found


def test_a_small_single_file_needs_its_configuration(tmp_path, vocabulary, pipe):
    save_file(contiguous(single_file(pipe)), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "model.safetensors", tokenizer=vocabulary)
    assert caught.value.code == "CKPT_BAD_CONFIG"
    assert "config=FOLDER" in caught.value.hint


def test_a_single_file_with_another_vocabulary_needs_it(tmp_path, saved, pipe):
    save_file(contiguous(single_file(pipe)), tmp_path / "model.safetensors")
    with pytest.raises(TokenizerError) as caught:
        load(tmp_path / "model.safetensors", config=saved)
    assert caught.value.code == "TOKENIZER_NOT_FOUND"
    loaded = load(tmp_path / "model.safetensors", config=saved, tokenizer=saved / "tokenizer")
    assert loaded.tokenizer.vocab == pipe.tokenizer.vocab


def test_configuration_decides_what_shapes_do_not_tell(folder, pipe, family):
    rewrite_json(folder / "unet/config.json", attention_head_dim=2, sample_size=5)
    rewrite_json(folder / "text_encoder/config.json", hidden_act="gelu", num_attention_heads=2)
    rewrite_json(folder / "vae/config.json", scaling_factor=0.7, norm_num_groups=1)
    rewrite_json(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction", beta_end=0.02)
    found = load(folder).family
    assert (found.unet.num_heads, found.size) == (2, 40)
    assert (found.text.activation, found.text.num_heads) == ("gelu", 2)
    assert (found.vae.scaling_factor, found.vae.norm_groups) == (0.7, 1)
    assert (found.schedule.prediction, found.schedule.beta_end) == ("v", 0.02)
    assert (found.unet.model_channels, found.unet.norm_groups) == (family.unet.model_channels, family.unet.norm_groups)


def test_heads_by_level(folder):
    rewrite_json(folder / "unet/config.json", attention_head_dim=[2, 4, 6])
    unet = load(folder).family.unet
    assert (unet.num_heads, unet.head_dim) == (None, 6)


def test_a_configuration_of_another_folder_goes_before_the_own_one(folder, saved):
    rewrite_json(folder / "unet/config.json", norm_num_groups=1)
    assert load(folder).family.unet.norm_groups == 1
    assert load(folder, config=saved).family.unet.norm_groups == 4


def test_configuration_of_no_use(saved, tmp_path):
    for config, code in (
        (saved / "unet", "CKPT_BAD_CONFIG"),
        (tmp_path, "CKPT_BAD_CONFIG"),
        (saved / "model_index.json", "CKPT_NOT_FOUND"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load(saved, config=config)
        assert caught.value.code == code
        assert str(config) in str(caught.value)


def test_junk_is_told_once(tmp_path, alone, pipe, image):
    junk = {
        "merge.recipe": torch.zeros(3),
        "first_stage_model_backup.x": torch.zeros(2),
        "cond_stage.y": torch.zeros(2),
    }
    save_file(contiguous(single_file(pipe) | junk), tmp_path / "merged.safetensors")
    with pytest.warns(SdInpaintWarning) as caught:
        loaded = load(tmp_path / "merged.safetensors", **alone)
    assert len(caught) == 1
    assert "3 tensors" in str(caught[0].message)
    assert "merge.recipe" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert alike(paint(loaded), image)


# What inspect says


def counts(pipe):
    return {name: sum(value.numel() for value in tensors.values()) for name, tensors in states(pipe).items()}


@pytest.fixture
def no_reading(forbid):
    """Makes every read of a tensor's bytes fail."""
    forbid(Entry, "tensor")
    forbid(SourceFile, "mapped", "loaded", "crc32")


def test_inspect_a_folder(saved, pipe, no_reading):
    report = sdinpaint.inspect(saved)
    assert (report.path, report.family, report.layout) == (str(saved), "sd15-inpainting", "diffusers")
    assert (report.in_channels, report.prediction, report.has_ema) == (9, "eps", False)
    assert report.parameters == counts(pipe)
    assert report.dtype == "float32"
    assert report.dtypes == {name: {"float32": len(tensors)} for name, tensors in states(pipe).items()}
    assert (report.junk, report.problem) == ((), "")
    assert any("9 input channels, inpainting" in sentence for sentence in report.why)
    assert json.loads(json.dumps(report.to_json()))["parameters"] == counts(pipe)
    for said in ("sd15-inpainting", "9 input channels", "no EMA", f"{sum(counts(pipe).values()):,}", "accounted for"):
        assert said in str(report)
    with pytest.raises(pytest.fail.Exception, match="was called"):
        load(saved)


def test_inspect_variants_and_mixed_dtypes(folder, pipe):
    as_the_only_variant(folder)
    vae = folder / "vae/diffusion_pytorch_model.fp16.safetensors"
    rewrite(vae, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    report = sdinpaint.inspect(folder, variant="fp16")
    assert report.dtype == "mixed"
    assert report.dtypes["vae"] == {"float16": len(pipe.vae.state_dict())}
    assert report.parameters == counts(pipe)
    assert any("'fp16' is used" in sentence for sentence in sdinpaint.inspect(folder).why)


@pytest.mark.parametrize("write", [safetensors, lightning, lightning_legacy])
def test_inspect_a_single_file_that_needs_its_configuration(tmp_path, pipe, other, write):
    state = single_file(pipe) | averages(other.unet) | {"merge.recipe": torch.zeros(3)}
    write(tmp_path / "model.ckpt", state)
    report = sdinpaint.inspect(tmp_path / "model.ckpt")
    assert (report.family, report.layout, report.in_channels) == ("sd1", "ldm", 9)
    assert report.has_ema
    assert report.parameters == counts(pipe) | {"text_encoder": counts(pipe)["text_encoder"] + POSITIONS.numel()}
    assert report.junk == ("merge.recipe",)
    assert "config=FOLDER" in report.problem
    assert "config=FOLDER" in str(report)
    json.dumps(report.to_json())


def test_inspect_released_files(tmp_path, inventory, no_reading):
    whole = write_header(tmp_path / "whole.safetensors", inventory("sd15_inpainting.ldm_with_ema").shapes())
    report = sdinpaint.inspect(whole)
    assert (report.family, report.layout, report.in_channels) == ("sd15-inpainting", "ldm", 9)
    assert report.parameters == {"unet": 859_535_364, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert (report.dtype, report.has_ema, report.junk, report.problem) == ("float16", True, (), "")


@pytest.mark.parametrize(
    ("name", "family", "counts", "prediction"),
    [
        ("sd2_inpainting.ldm", "sd2-inpainting", (865_925_124, 83_653_863, 340_387_840), "eps"),
        ("sd2_v_768.ldm", "sd2", (865_910_724, 83_653_863, 340_387_840), "eps"),
        ("sdxl_base.sgm", "sdxl", (2_567_463_684, 83_653_863, 123_060_480, 694_659_840), "eps"),
        ("sdxl_inpainting.sgm", "sdxl-inpainting", (2_567_478_084, 83_653_863, 123_060_480, 694_659_840), "eps"),
    ],
)
def test_inspect_released_files_of_other_families(tmp_path, inventory, no_reading, name, family, counts, prediction):
    report = sdinpaint.inspect(write_header(tmp_path / "whole.safetensors", inventory(name).shapes()))
    assert (report.family, report.prediction, report.problem, report.junk) == (family, prediction, "", ())
    assert tuple(report.parameters.values()) == counts


@pytest.mark.parametrize(
    ("name", "said"),
    [("control_v11p_sd15_inpaint.cldm", "a ControlNet alone"), ("vae_ft_mse.ldm", "a VAE alone")],
)
def test_inspect_what_does_not_load(tmp_path, inventory, no_reading, name, said):
    shapes = inventory(name).shapes()
    report = sdinpaint.inspect(write_header(tmp_path / "other.safetensors", shapes))
    assert report.title.startswith(said)
    assert report.title in report.problem
    assert report.why
    json.dumps(report.to_json())


def test_inspect_a_file_with_a_gap(tmp_path, inventory):
    shapes = inventory("sd15_inpainting.ldm").shapes()
    del shapes["model.diffusion_model.out.2.bias"]
    report = sdinpaint.inspect(write_header(tmp_path / "gap.safetensors", shapes))
    assert "UNet: 1 missing, e.g. out.2.bias" in report.problem
    assert "does not load" in str(report)
    assert report.parameters["unet"] == 859_535_360


# Memory: the weights, and little beside them

CASES = {
    "float32 as stored": ("float32", "float32"),
    "float16 as stored": ("float16", "float16"),
    "float32 as bfloat16": ("float32", "bfloat16"),
    "float16 by a naive loader": ("float16", "float16"),
}
MEASURE = """
import json, os, re, sys
from pathlib import Path
import torch
import sdinpaint
from sdinpaint_weights.folder import open_folder_component

folders, warm_up, cases = map(json.loads, sys.argv[1:])

def kilobytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def measure(name, stored, asked):
    sdinpaint.load(warm_up, device="cpu", dtype=asked, progress=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = kilobytes("VmRSS")
    if name.endswith("naive loader"):
        parts = [open_folder_component(Path(folders[stored], part)) for part in ("unet", "vae", "text_encoder")]
        whole_files = [tensor.clone() for part in parts for tensor in part.values()]
    pipe = sdinpaint.load(folders[stored], device="cpu", dtype=asked, progress=False)
    weights = [weight for model in (pipe.unet, pipe.vae, pipe.text) for weight in model.parameters()]
    assert all(float(weight.min()) <= float(weight.max()) for weight in weights)  # touches every page
    return (kilobytes("VmHWM") - before) / (sum(weight.nbytes for weight in weights) / 1024)

torch.set_num_threads(1)
sdinpaint.load(warm_up, device="cpu", progress=False)  # before the forks, so that none has to import anything
for name, (stored, asked) in cases.items():
    if os.fork() == 0:  # each case begins with the same memory
        print(json.dumps([name, measure(name, stored, asked)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


@pytest.fixture(scope="module")
def peaks(tiny, vocabulary, saved, tmp_path_factory):
    """Peak growth of the resident memory while a model of 79 million parameters loads, over its size; by case."""
    unet = replace(SD15_INPAINT.unet, model_channels=96, context_dim=tiny.text.width)
    pipe = random_pipeline(replace(SD15_INPAINT, unet=unet, vae=tiny.vae, text=tiny.text), vocabulary)
    folders = {dtype: str(tmp_path_factory.mktemp(dtype)) for dtype in ("float32", "float16")}
    for dtype, folder in folders.items():
        sdinpaint.save_diffusers(folder, pipe, DTYPES[dtype])
    del pipe
    command = [sys.executable, "-c", MEASURE, *map(json.dumps, (folders, str(saved), CASES))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    for folder in folders.values():
        shutil.rmtree(folder)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(line) for line in run.stdout.splitlines())


def test_peak_memory_is_that_of_the_weights(peaks):
    naive = peaks.pop("float16 by a naive loader")
    assert all(0.95 <= peak <= 1.15 for peak in peaks.values()), peaks
    assert naive > 1.8  # seen to be told apart
