"""Models of the hub: which files are fetched, and that they load as from a disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import TEXT_FILE, UNET_FILE, VAE_FILE, random_pipeline, single_file, small
from hub_server import MAIN, read_tree
from safetensors.torch import load, save

import sdinpaint
from sdinpaint.checkpoints.opening import DEMO
from sdinpaint.checkpoints.sources import COMPONENTS
from sdinpaint.errors import CheckpointError
from sdinpaint.hub import fetch, is_hub_id, wanted_files

SETTINGS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    *(f"{component}/config.json" for component in ("text_encoder", "unet", "vae")),
]
NEEDED = sorted([*SETTINGS, TEXT_FILE, UNET_FILE, VAE_FILE])
SHARDS = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
UNNEEDED = (
    "README.md",
    "sd-v1-5-inpainting.ckpt",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/model.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_flax_model.msgpack",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/openvino_model.xml",
    "vae/diffusion_pytorch_model.fp16.bin",
    "vae_decoder/model.onnx",
)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tiny, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    sdinpaint.save_diffusers(folder, random_pipeline(small(tiny), vocabulary))
    return folder


@pytest.fixture(scope="module")
def files(folder):
    return read_tree(folder)


def loaded(source, **options):
    return sdinpaint.load(source, device="cpu", progress=False, **options)


def same_models(ours, theirs):
    pairs = ((getattr(ours, name).state_dict(), getattr(theirs, name).state_dict()) for name in ("unet", "vae", "text"))
    same = all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)
    return same and ours.family == theirs.family and ours.tokenizer.vocab == theirs.tokenizer.vocab


def refusal(source, **options):
    with pytest.raises(CheckpointError) as caught:
        loaded(source, **options)
    assert source in caught.value.subject
    return caught.value


# What is chosen


def test_of_a_whole_repository_only_what_is_loaded_is_wanted():
    assert sorted(wanted_files([*NEEDED, *UNNEEDED], COMPONENTS)) == NEEDED
    assert wanted_files([*NEEDED, *UNNEEDED], ("vae",)) == ["vae/config.json", VAE_FILE]
    second = ["text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/vocab.json"]
    assert sorted(wanted_files([*NEEDED, *UNNEEDED, *second], COMPONENTS)) == sorted([*NEEDED, *second])
    alone = ["unet/config.json", UNET_FILE]
    assert wanted_files(alone, COMPONENTS) == alone


@pytest.mark.parametrize(
    ("there", "variant", "wanted"),
    [
        (["a.safetensors", "a.bin", "a.fp16.safetensors"], None, ["a.safetensors"]),
        (["a.safetensors", "a.bin", "a.fp16.safetensors"], "fp16", ["a.fp16.safetensors"]),
        (["a.bin", "a.fp16.safetensors"], None, ["a.bin"]),
        (["a.fp16.safetensors"], None, ["a.fp16.safetensors"]),
        (
            ["a.safetensors.index.json", "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "a.bin"],
            None,
            ["a.safetensors.index.json", "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"],
        ),
        (
            ["a.bin.index.fp16.json", "a.fp16-00001-of-00001.bin", "a-00001-of-00001.bin", "a.safetensors"],
            "fp16",
            ["a.bin.index.fp16.json", "a.fp16-00001-of-00001.bin"],
        ),
        (
            ["a.bin.index.fp16.json", "a-00001-of-00001.fp16.bin", "a-00001-of-00001.bin"],
            "fp16",
            ["a.bin.index.fp16.json", "a-00001-of-00001.fp16.bin"],
        ),
    ],
)
def test_one_set_of_weights_is_wanted(there, variant, wanted):
    def full(names):
        return ["config.json", *(name.replace("a", "diffusion_pytorch_model", 1) for name in names)]

    assert wanted_files(full(there), ("vae",), variant) == full(wanted)
    inside = [f"controlnet/{name}" for name in full(there)]
    assert wanted_files(inside, ("controlnet",), variant) == [f"controlnet/{name}" for name in full(wanted)]


@pytest.mark.parametrize(
    ("there", "found", "hint"),
    [
        ([], "it holds nothing", "FILE"),
        (["README.md", "lora/a.safetensors"], "no weights that could be used; it holds README.md, lora/", "FILE"),
        (["a.safetensors", "b.safetensors", "c.ckpt"], "2 checkpoints to choose from; it holds a.s", "o/m:a.safeten"),
        (["transformer/model.safetensors", VAE_FILE, TEXT_FILE], "no weights that could be used", "FILE"),
        (["config.json", "diffusion_pytorch_model.msgpack"], "no weights; it holds config.json", "variant="),
        ([name for name in NEEDED if name != VAE_FILE], "no weights; it holds config.json", "variant="),
        (
            [*(set(NEEDED) - {UNET_FILE}), SHARDS[0], "unet/diffusion_pytorch_model.safetensors.index.json"],
            "no we",
            "v",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_is_fetched(there, found, hint):
    with pytest.raises(CheckpointError) as caught:
        wanted_files(there, COMPONENTS, subject="o/m")
    assert caught.value.code == "HUB_FILES"
    assert found in caught.value.found
    assert hint in caught.value.hint


def test_single_files():
    there = ["README.md", "config.json", "a.ckpt", "a.safetensors", "lora/b.ckpt"]
    assert wanted_files(there, COMPONENTS) == ["a.safetensors"]
    assert wanted_files(["model.ckpt", "image.png"], ("vae",)) == ["model.ckpt"]


def test_ids():
    assert all(map(is_hub_id, ("owner/name", "a-b/c_d.e", "owner/name:file.safetensors", "o/n.ckpt:deep/in/it.bin")))
    paths = ("name", "a/b/c", "./name", "../name", "/name", "~/name", "owner/", "folder/file.ckpt", "a/b.safetensors")
    assert not any(map(is_hub_id, (*paths, "C:/x", "a b/c", "")))


# What is loaded


def test_demo_checkpoint_loads_as_from_disk(hub):
    hub.add("owner/demo", read_tree(DEMO) | dict.fromkeys(UNNEEDED, b"not wanted"))
    assert same_models(loaded("owner/demo"), loaded("demo"))
    assert hub.transferred() == NEEDED
    hub.log.clear()
    assert same_models(loaded("owner/demo"), loaded("demo"))
    assert hub.transferred() == []
    hub.log.clear()
    assert same_models(loaded("owner/demo", local_files_only=True), loaded("demo"))
    assert hub.log == []


def test_variant(hub, files):
    halved = {
        name.replace(".safetensors", ".fp16.safetensors"): save(
            {key: value / 2 for key, value in load(content).items()}
        )
        for name, content in files.items()
        if name.endswith(".safetensors")
    }
    hub.add("owner/small", files | halved)
    half = loaded("owner/small", variant="fp16")
    assert hub.transferred() == sorted([*SETTINGS, *halved])
    hub.log.clear()
    plain = loaded("owner/small")
    assert hub.transferred() == [TEXT_FILE, UNET_FILE, VAE_FILE]
    weights, halves = (pipe.unet.state_dict() for pipe in (plain, half))
    assert all(torch.equal(weights[name] / 2, halves[name]) for name in weights)
    assert "'bf16'" in refusal("owner/small", variant="bf16").found


def sharded(files):
    """Return the model with the UNet in two files."""
    tensors = load(files[UNET_FILE])
    halves = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    table = {name: Path(shard).name for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    index = {"unet/diffusion_pytorch_model.safetensors.index.json": json.dumps({"weight_map": table}).encode()}
    others = {name: content for name, content in files.items() if name != UNET_FILE}
    return others | index | {shard: save(half) for shard, half in zip(SHARDS, halves, strict=True)}


def test_shards(hub, files, folder):
    hub.add("owner/sharded", sharded(files))
    assert same_models(loaded("owner/sharded"), loaded(folder))
    assert set(SHARDS) < set(hub.transferred())


def test_single_file_by_itself_or_by_name(hub, folder, vocabulary):
    checkpoint = save({name: value.contiguous() for name, value in single_file(loaded(folder)).items()})
    beside = {"tokenizer": vocabulary, "config": folder}
    hub.add("owner/one", {"README.md": b"", "model.safetensors": checkpoint})
    hub.add("owner/two", {"a.safetensors": b"", "b.safetensors": b"", "deep/[b] c.safetensors": checkpoint})
    assert same_models(loaded("owner/one", **beside), loaded(folder))
    assert same_models(loaded("owner/two:deep/[b] c.safetensors", **beside), loaded(folder))
    assert hub.transferred() == ["deep/[b] c.safetensors", "model.safetensors"]
    assert refusal("owner/two", **beside).code == "HUB_FILES"
    assert "deep/[b] c" in refusal("owner/two:none.safetensors", **beside).found


def test_another_autoencoder(hub, files, folder, tiny, vocabulary, tmp_path):
    other = random_pipeline(small(tiny), vocabulary, seed=1)
    sdinpaint.save_diffusers(tmp_path / "other", other)
    whole = read_tree(tmp_path / "other")
    hub.add("owner/whole", whole)
    hub.add("owner/vae", {name[4:]: content for name, content in whole.items() if name.startswith("vae/")})
    for source in ("owner/whole", "owner/vae"):
        pipe = loaded(folder, vae=source)
        assert all(torch.equal(value, other.vae.state_dict()[key]) for key, value in pipe.vae.state_dict().items())
    assert hub.transferred() == ["config.json", Path(VAE_FILE).name, "vae/config.json", VAE_FILE]


def test_a_network_alone_beside_a_base(hub, files, folder):
    halves = save({name: value / 2 for name, value in load(files[UNET_FILE]).items()})
    alone = {"config.json": files["unet/config.json"], "diffusion_pytorch_model.safetensors": halves}
    hub.add("owner/unet", alone)
    hub.add("owner/small", files)
    pipe, plain = loaded("owner/unet", base="owner/small"), loaded(folder)
    assert all(torch.equal(value / 2, pipe.unet.state_dict()[key]) for key, value in plain.unet.state_dict().items())
    assert all(torch.equal(value, pipe.vae.state_dict()[key]) for key, value in plain.vae.state_dict().items())
    assert hub.transferred() == sorted([*alone, *(set(NEEDED) - {"unet/config.json", UNET_FILE})])


def test_revisions(hub, files):
    old = "0" * 40
    hub.add("owner/small", files, revisions={"main": MAIN, "v1/old": old})
    for revision in ("v1/old", old):
        assert fetch("owner/small", COMPONENTS, revision=revision).name == old
        assert fetch("owner/small", COMPONENTS, revision=revision, local_files_only=True).name == old
    assert fetch("owner/small", COMPONENTS).name == MAIN
    assert hub.transferred() == NEEDED
    error = refusal("owner/small", revision="v2")
    assert error.code == "HUB_REVISION"
    assert "'v2'" in error.found


def test_bars_only_on_a_terminal_and_only_if_wanted(hub, files, capfd, stderr):
    hub.add("owner/small", files)
    fetch("owner/small", COMPONENTS, progress=True)
    assert "".join(capfd.readouterr()) == ""
    shown = stderr(terminal=True)
    fetch("owner/small", COMPONENTS, progress=False)
    assert shown.getvalue() == "".join(capfd.readouterr()) == ""
    fetch("owner/small", COMPONENTS, progress=True)
    assert "Fetching" in shown.getvalue()
