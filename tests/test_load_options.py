"""Ways of loading as values: checked at once, kept by pipelines and manifests, and taken up by a replay."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from closeness import same_image
from PIL import Image

import sdinpaint
from sdinpaint.errors import CheckpointError, SettingError
from sdinpaint.load_options import LoadOptions
from sdinpaint.replaying import replay

RNG = np.random.default_rng(3)
IMAGE = RNG.integers(0, 256, (64, 72, 3), dtype=np.uint8)
SHORT = {"steps": 2, "seed": 4, "progress": False}


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    mask = np.zeros((64, 72), np.uint8)
    mask[10:50, 20:44] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("SETTING_SOURCE", {"source": 5}),
        ("SETTING_VAE", {"vae": 1.5}),
        ("SETTING_VARIANT", {"variant": 16}),
        ("SETTING_OFFLOAD", {"offload": 1}),
        ("SETTING_EMA", {"ema": "yes"}),
        ("SETTING_TILE", {"tile": -1}),
        ("SETTING_PREDICTION", {"prediction": "epsilon"}),
        ("SETTING_DTYPE", {"dtype": "float3"}),
    ],
)
def test_bad_options_are_refused_without_a_file(code, options):
    for make in (LoadOptions, sdinpaint.load):
        with pytest.raises(SettingError) as caught:
            make(**{"source": "demo", **options})
        assert caught.value.code == code


def test_names_are_brought_into_one_form():
    options = LoadOptions(source="demo", dtype=torch.bfloat16, device=torch.device("cpu"))
    assert options == LoadOptions(source="demo", dtype="bf16", device="cpu")
    assert LoadOptions(source="demo", dtype="auto", device="auto") == LoadOptions(source="demo")
    assert pickle.loads(pickle.dumps(options)) == options
    assert options.given == {"source": "demo", "dtype": "bfloat16", "device": "cpu"}


def test_a_pipeline_keeps_how_it_was_loaded():
    pipe = sdinpaint.load("demo", device="cpu", offload=True, tile=256, progress=False)
    assert pipe.loaded == LoadOptions(source="demo", device="cpu", offload=True, tile=256)
    again = sdinpaint.load(dataclasses.replace(pipe.loaded, offload=False), progress=False)
    assert again.loaded == LoadOptions(source="demo", device="cpu", tile=256)
    with pytest.raises(SettingError, match="beside LoadOptions"):
        sdinpaint.load(pipe.loaded, ema=True)
    assert again.offloading is None


def test_a_manifest_holds_what_decides_the_weights():
    options = LoadOptions(source="demo", vae="other", ema=True, device="cpu", offload=True, dtype="float32", tile=0)
    stored = options.to_manifest()
    assert stored == {"vae": "other", "ema": True, "tile": 0}
    manifest = {"model": "demo", "dtype": "bfloat16", "load": stored}
    expected = LoadOptions(source="demo", dtype="bfloat16", vae="other", ema=True, tile=0)
    assert LoadOptions.from_manifest(manifest) == expected
    assert LoadOptions.from_manifest({"model": "demo", "dtype": "float32"}) == LoadOptions(
        source="demo", dtype="float32"
    )
    assert LoadOptions.from_manifest(manifest, vae=None, device="cpu").vae is None
    with pytest.raises(SettingError) as caught:
        LoadOptions.from_manifest({**manifest, "load": {"device": "cpu"}})
    assert caught.value.code == "MANIFEST_BROKEN"


def test_a_replay_loads_the_same_components_again(photo):
    """With another VAE, which the command line had to be told again."""
    other = sdinpaint.load("demo", device="cpu", progress=False)
    with torch.no_grad():
        for weight in other.vae.parameters():
            weight.mul_(1.03)
    sdinpaint.save_diffusers(photo / "other", other)
    pipe = sdinpaint.load("demo", vae=photo / "other" / "vae", device="cpu", progress=False)
    result = pipe.inpaint(photo / "photo.png", photo / "mask.png", "a red ball", **SHORT)
    assert result.settings["manifest"]["load"] == {"vae": str(photo / "other" / "vae")}
    (path,) = result.save(photo / "out.png")
    done = replay(path, load={"device": "cpu"}, progress=False)
    assert done.largest <= 1
    assert same_image(done.result.image, result.image)
    with pytest.raises(CheckpointError, match="vae: made with"):
        replay(path, load={"device": "cpu", "vae": None}, progress=False)


def test_older_images_replay(photo):
    pipe = sdinpaint.load("demo", device="cpu", progress=False)
    result = pipe.inpaint(photo / "photo.png", photo / "mask.png", "a red ball", **SHORT)
    assert "load" not in result.settings["manifest"]
    (path,) = result.save(photo / "out.png")
    assert replay(path, progress=False).largest <= 1
