"""Images are recorded with their adapters, by file and weight, and are made with them again."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from builders import as_sdxl, random_pipeline, small
from closeness import same_image
from PIL import Image
from refusals import refused
from safetensors.torch import load_file, save_file

import sdinpaint
from sdinpaint.adapters import adapted
from sdinpaint.errors import CheckpointError, SdInpaintWarning, SettingError
from sdinpaint.images.files import read_settings
from sdinpaint.load_options import LoadOptions, LoraOption
from sdinpaint.loading import save_diffusers
from sdinpaint.provenance.manifest import check_manifest, differences, environment, require_same_adapters
from sdinpaint.replaying import replay

RNG = np.random.default_rng(5)
IMAGE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
SHORT = {"prompt": "a red cat", "steps": 1, "seed": 4, "progress": False}
KEYS = ["kind", "name", "source", "sha256", "weight", "text_weight", "blocks"]


@pytest.fixture(scope="module")
def places(tiny, vocabulary, tmp_path_factory):
    """Models in folders by name, and a LoRA and an embedding for each."""
    home = tmp_path_factory.mktemp("models")
    for name, family in {"sd1": small(tiny), "sdxl": as_sdxl(small(tiny))}.items():
        pipe = random_pipeline(family, vocabulary, seed=6)
        save_diffusers(home / name, pipe)
        width = pipe.unet.config.model_channels * pipe.unet.config.channel_mult[-1]
        text = pipe.family.texts[0].width
        modules = {"lora_unet_mid_block_attentions_0_proj_in": width}
        modules["lora_te1_text_model_encoder_layers_0_mlp_fc1"] = text
        tensors = {}
        for number, (module, inputs) in enumerate(modules.items()):
            outputs = width if number == 0 else pipe.family.texts[0].mlp_width
            generator = torch.Generator().manual_seed(number)
            tensors[f"{module}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
            tensors[f"{module}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator)
        save_file(tensors, home / f"{name}-style.safetensors")
        rows = [torch.randn(2, one.width, generator=torch.Generator().manual_seed(9)) for one in pipe.family.texts]
        keys = ["emb_params"] if len(rows) == 1 else ["clip_l", "clip_g"]
        save_file(dict(zip(keys, rows, strict=True)), home / f"{name}-cat.safetensors")
    return home


def load(places, name="sd1", **options):
    return sdinpaint.load(places / name, device="cpu", progress=False, **options)


def both(places, name="sd1", **changed):
    style, cat = (str(places / f"{name}-{what}.safetensors") for what in ("style", "cat"))
    return {"loras": [LoraOption(style, **{"weight": 0.5, "name": "style"} | changed)], "embeddings": [(cat, "cat")]}


@pytest.fixture(scope="module")
def made(places):
    """A pipeline with both, and the image that it made."""
    pipe = load(places, **both(places, text_weight=0.25, blocks={"mid_block": 1.5}))
    return pipe, pipe.vary(IMAGE, strength=1.0, **SHORT)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# loading


def test_every_form_of_an_option(places):
    style, cat = places / "sd1-style.safetensors", places / "sd1-cat.safetensors"
    forms = {
        style: (1.0, None),
        str(style): (1.0, None),
        (style,): (1.0, None),
        (style, 0.7): (0.7, None),
        (style, 0.7, 0.2): (0.7, 0.2),
        (style, 2, None, "sd1-style", None): (2.0, None),
        LoraOption(style, text_weight=0): (1.0, 0.0),
    }
    for form, weights in forms.items():
        for given in ([form], (form,)):
            (lora,) = LoadOptions(source="demo", loras=given).loras
            assert (lora.source, lora.weight, lora.text_weight) == (form if isinstance(form, str) else style, *weights)
    assert LoadOptions(source="demo", loras=style).loras == LoadOptions(source="demo", loras=[style]).loras
    for form in (cat, [cat], [(cat, None)], iter([cat])):
        assert LoadOptions(source="demo", embeddings=form).embeddings == ((cat, None),)
    options = LoadOptions(source="demo", loras=[style], embeddings=[(cat, "my cat")])
    assert options.places == ["demo", style, cat]
    assert options == LoadOptions(source="demo", loras=(LoraOption(style),), embeddings=((cat, "my cat"),))
    assert options.to_manifest() == {}


@pytest.mark.parametrize(
    ("code", "options"),
    [
        *(("SETTING_LORAS", {"loras": one}) for one in (5, {"a": 1}, b"a", [5], [()], [(5, 0.5)], ["a", None])),
        *(("SETTING_EMBEDDINGS", {"embeddings": one}) for one in (5, {"a": 1}, [5], [("a", 5)], [("a", "b", "c")])),
        *(("SETTING_WEIGHT", {"loras": [("a", one)]}) for one in (None, "1", True, float("nan"), float("inf"))),
        ("SETTING_WEIGHT", {"loras": [("a", 1, float("nan"))]}),
    ],
)
def test_bad_options_are_refused_without_a_file(code, options):
    for make in (LoadOptions, sdinpaint.load):
        refused(SettingError, code, lambda make=make: make(source="demo", **options))


def test_loading_with_them_is_adding_them(places, made):
    pipe, result = made
    other = load(places)
    other.add_lora(places / "sd1-style.safetensors", 0.5, text_weight=0.25, blocks={"mid_block": 1.5}, name="style")
    other.add_embedding(str(places / "sd1-cat.safetensors"), "cat")
    for one, same in zip(pipe.unet.parameters(), other.unet.parameters(), strict=True):
        assert torch.equal(one, same)
    assert np.array_equal(other.vary(IMAGE, strength=1.0, **SHORT).image, result.image)
    assert pipe.loaded.loras[0].blocks == {"mid_block": 1.5}


def test_a_quiet_load_shows_no_bar_of_them_either(places, substitute):
    shown, bar = [], adapted.progress_bar

    def spy(*arguments, show=True, **options):
        shown.append(show)
        return bar(*arguments, show=show, **options)

    substitute(adapted, progress_bar=spy)
    load(places, loras=[places / "sd1-style.safetensors"]).clear_loras()
    assert shown == [False, True]


# the manifest


def test_what_is_recorded(places, made):
    pipe, result = made
    manifest = result.settings["manifest"]
    style, cat = manifest["adapters"]
    digests = [pipe.loras["style"].sha256, pipe.embeddings["cat"].sha256]
    source = str(places / "sd1-style.safetensors")
    assert style == dict(zip(KEYS, ["lora", "style", source, digests[0], 0.5, 0.25, {"mid_block": 1.5}], strict=True))
    source = str(places / "sd1-cat.safetensors")
    assert cat == dict(zip(KEYS, ["embedding", "cat", source, digests[1], None, None, None], strict=True))
    assert json.loads(json.dumps(manifest)) == manifest
    plain = environment(load(places))
    assert "adapters" not in plain
    assert manifest["weights"] == plain["weights"]
    assert "load" not in manifest


def test_weights_are_the_checkpoint_s_own_at_any_time(places):
    pipe = load(places)
    before = environment(pipe)
    with pipe.adapted(places / "sd1-style.safetensors") as lora:
        assert environment(pipe)["weights"] == before["weights"]
        pipe.set_lora(lora.name, weight=0.25)
        assert environment(pipe)["weights"] == before["weights"]
        with torch.no_grad():
            pipe.vae.decoder.conv_in.bias.add_(1)
        assert environment(pipe)["weights"]["vae"] != before["weights"]["vae"]
        assert environment(pipe)["weights"]["unet"] == before["weights"]["unet"]


def test_recorded_ones_come_back_as_options(made):
    pipe, result = made
    manifest = result.settings["manifest"]
    options = LoadOptions.from_manifest(manifest, device="cpu")
    assert [lora._replace(strict=True) for lora in options.loras] == list(pipe.loaded.loras)
    assert options.embeddings == pipe.loaded.embeddings
    without = LoadOptions.from_manifest(manifest, loras=(), embeddings=())
    assert (without.loras, without.embeddings) == ((), ())


def test_a_replay_adds_them_again(places, photo):
    pipe = load(places, "sdxl", **both(places, "sdxl"))
    result = pipe.vary(photo, strength=1.0, **SHORT)
    (path,) = result.save(photo.with_name("out.png"))
    again = replay(path, load={"device": "cpu"}, progress=False)
    assert same_image(again.result.image, result.image)
    assert again.result.settings["manifest"]["adapters"] == read_settings(path)["manifest"]["adapters"]
    pipe.clear_loras()
    pipe.remove_embedding("cat")
    assert not same_image(pipe.vary(photo, strength=1.0, **SHORT).image, result.image)


def test_keys_that_were_left_out_are_left_out_again(places, photo):
    path = photo.with_name("more.safetensors")
    save_file(load_file(places / "sd1-style.safetensors") | {"lora_unet_no_module.alpha": torch.ones(())}, path)
    pipe = load(places)
    with pytest.warns(SdInpaintWarning, match="left out"):
        pipe.add_lora(path, strict=False)
    (out,) = pipe.vary(photo, strength=1.0, **SHORT).save(photo.with_name("out.png"))
    with pytest.warns(SdInpaintWarning, match="left out"):
        assert replay(out, load={"device": "cpu"}, progress=False).largest <= 1


CHANGES = {
    "another weight": (lambda pipe, places: pipe.set_lora("style", weight=0.4), "lora style: made with"),
    "another text weight": (
        lambda pipe, places: pipe.set_lora("style", text_weight=None),
        "text weight 0.25, mid_block",
    ),
    "other blocks": (lambda pipe, places: pipe.set_lora("style", blocks=None), "mid_block 1.5, here"),
    "no LoRA": (lambda pipe, places: pipe.remove_lora("style"), "mid_block 1.5, here none"),
    "no embedding": (lambda pipe, places: pipe.remove_embedding("cat"), "embedding cat: made with"),
    "one more": (
        lambda pipe, places: pipe.add_embedding(places / "sd1-cat.safetensors", "dog"),
        "embedding dog: made with none, here",
    ),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=list(CHANGES))
def test_other_adapters_are_refused_and_named(change, words, places, made):
    manifest = made[1].settings["manifest"]
    pipe = load(places, **both(places, text_weight=0.25, blocks={"mid_block": 1.5}))
    require_same_adapters(manifest, pipe)
    assert differences(manifest, pipe) == []
    change(pipe, places)
    error = refused(SettingError, "MANIFEST_ADAPTERS", lambda: require_same_adapters(manifest, pipe))
    assert words in error.found
    assert differences(manifest, pipe) == error.found.split("; ")
    again = {**made[1].settings, "prompt": SHORT["prompt"]}
    refused(SettingError, "MANIFEST_ADAPTERS", lambda: pipe.vary(IMAGE, **again, progress=False))


def test_another_file_at_its_place_is_refused(places, photo, tmp_path):
    style, cat = tmp_path / "style.safetensors", tmp_path / "cat.safetensors"
    tensors = load_file(places / "sd1-style.safetensors")
    save_file(tensors, style)
    cat.write_bytes((places / "sd1-cat.safetensors").read_bytes())
    pipe = load(places, loras=[style], embeddings=[cat])
    (path,) = pipe.vary(photo, strength=1.0, **SHORT).save(tmp_path / "out.png")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, style.with_suffix(".new"))
    style.with_suffix(".new").replace(style)
    error = refused(SettingError, "MANIFEST_ADAPTERS", lambda: replay(path, load={"device": "cpu"}, progress=False))
    assert "lora style: made with" in error.found
    assert "embedding" not in error.found
    style.unlink()
    refused(CheckpointError, "CKPT_NOT_FOUND", lambda: replay(path, load={"device": "cpu"}, progress=False))
    plain = {"device": "cpu", "loras": [], "embeddings": []}
    refused(SettingError, "MANIFEST_ADAPTERS", lambda: replay(path, load=plain, progress=False))


def test_an_image_of_before_is_made_without(places, photo, made):
    (path,) = load(places).vary(photo, strength=1.0, **SHORT).save(photo.with_name("old.png"))
    assert "adapters" not in read_settings(path)["manifest"]
    assert replay(path, load={"device": "cpu"}, progress=False).largest <= 1
    error = refused(SettingError, "MANIFEST_ADAPTERS", lambda: replay(path, made[0], progress=False))
    assert "lora style: made with none" in error.found


def test_broken_entries_are_named(made):
    manifest = made[1].settings["manifest"]
    assert check_manifest(manifest) == manifest
    broken = {
        "manifest.adapters": [None, {}, "lora", 5],
        "manifest.adapters[0]": [[None], [[]]],
        "manifest.adapters[1].kind": [[manifest["adapters"][0], {**manifest["adapters"][1], "kind": "hypernet"}]],
    }
    for key in KEYS:
        less = copy.deepcopy(manifest["adapters"])
        del less[0][key]
        broken[f"manifest.adapters[0].{key}"] = [less]
    wrong = {"name": 5, "source": None, "sha256": 1, "weight": None, "text_weight": "1", "blocks": [1]}
    for key, value in wrong.items():
        broken[f"manifest.adapters[0].{key}"] += [[{**manifest["adapters"][0], key: value}]]
    broken["manifest.adapters[0].weight"] += [[{**manifest["adapters"][0], "weight": True}]]
    broken["manifest.adapters[0].blocks.mid_block"] = [[{**manifest["adapters"][0], "blocks": {"mid_block": "1"}}]]
    for subject, values in broken.items():
        for value in values:
            error = refused(
                SettingError, "MANIFEST_BROKEN", lambda value=value: check_manifest({**manifest, "adapters": value})
            )
            assert error.subject == subject
