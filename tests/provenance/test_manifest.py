"""Manifests: fingerprints of weights, records of what went in, and what is refused when an image is made again."""

from __future__ import annotations

import base64
import copy
import gc
import hashlib
import io
import json
import struct
import weakref
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from torch import nn

import sdinpaint
from sdinpaint import Mask
from sdinpaint.errors import CheckpointError, MaskError, SdInpaintError, SettingError
from sdinpaint.images.files import read_settings, save_png
from sdinpaint.images.input_image import InputImage
from sdinpaint.masks.text import mask_from_text, mask_to_text
from sdinpaint.pipeline.requests import stored_names
from sdinpaint.provenance import fingerprints
from sdinpaint.provenance.fingerprints import fingerprint, weights_of
from sdinpaint.provenance.manifest import (
    arguments,
    check_input,
    check_manifest,
    differences,
    environment,
    image_record,
    manifest_of,
    mask_record,
    require_same_weights,
)

IMAGE = InputImage(rgb=np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
MASK = np.zeros((40, 56), dtype=np.float32)
MASK[8:20, 10:30] = 1


def load():
    return sdinpaint.load("demo", device="cpu", progress=False)


@pytest.fixture(scope="module")
def pipe():
    return load()


@pytest.fixture(scope="module")
def stored(pipe):
    """The settings of a run as they come out of an image file."""
    recorded = environment(pipe) | {
        "kind": "inpaint",
        "image": image_record(IMAGE, "photo.png"),
        "mask": mask_record(MASK),
        "size": [56, 40],
    }
    given = {"prompt": "a red fox", "negative_prompt": None, "seed": 7, "steps": 5, "sampler": "ddim"}
    return json.loads(json.dumps(given | {"manifest": recorded}))


# fingerprints


class Holder(nn.Module):
    """A model with these tensors."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(6, 4, 3, 3, generator=generator), "b": torch.randn(4, 4, generator=generator)}


def flipped(bit):
    """The tensors with one bit of the last weight changed."""
    changed = tensors()
    changed["b"].view(torch.uint8)[-1, bit // 8] ^= 1 << bit % 8
    return changed


CHANGES = {
    "lowest bit": flipped(0),
    "sign": flipped(31),
    "renamed": {"a": tensors()["a"], "c": tensors()["b"]},
    "exchanged": {"a": tensors()["b"], "b": tensors()["a"]},
    "transposed": tensors() | {"b": tensors()["b"].T},
    "reshaped": tensors() | {"b": tensors()["b"].reshape(2, 8)},
    "flattened": tensors() | {"a": tensors()["a"].reshape(6, 36)},
    "same bytes, another dtype": tensors() | {"b": tensors()["b"].view(torch.int32)},
    "another precision": tensors() | {"b": tensors()["b"].double()},
    "one more": tensors() | {"c": torch.zeros(0)},
    "one less": {"a": tensors()["a"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_changes_with(change):
    assert fingerprint(Holder(**CHANGES[change])) != fingerprint(Holder(**tensors()))


def test_fingerprints_of_all_changes_differ():
    assert len({fingerprint(Holder(**changed)) for changed in CHANGES.values()}) == len(CHANGES)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def strided(tensor):
    """Return the values as every other one of a larger memory."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@pytest.mark.parametrize(
    "same",
    [
        {name: value.clone() for name, value in tensors().items()},
        dict(reversed(tensors().items())),
        tensors() | {"a": tensors()["a"].contiguous(memory_format=torch.channels_last)},
        tensors() | {"b": tensors()["b"].T.contiguous().T},
        {name: strided(value) for name, value in tensors().items()},
    ],
    ids=["copied", "in another order", "channels-last", "by columns", "strided"],
)
def test_fingerprint_does_not_depend_on_memory(same):
    assert fingerprint(Holder(**same)) == fingerprint(Holder(**tensors()))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)])
def test_every_dtype_and_shape_has_a_fingerprint(dtype, shape):
    ones, zeros = (Holder(a=torch.full(shape, value).to(dtype)) for value in (1.0, 0.0))
    assert (fingerprint(ones) == fingerprint(zeros)) is (shape == (0,))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_fingerprint_does_not_depend_on_threads(pipe, threads, substitute):
    expected = fingerprint(pipe.vae)
    substitute(fingerprints, _THREADS=threads)
    assert fingerprint(pipe.vae) == expected


def test_fingerprint_is_what_images_already_hold():
    """Written out once more, since images that were saved are compared with it in later versions too."""
    model = Holder(b=torch.ones(2, dtype=torch.bfloat16), a=torch.arange(6, dtype=torch.float32).reshape(2, 3))
    first, second = struct.pack("<6f", *range(6)), b"\x80\x3f" * 2
    rows = [["a", "torch.float32", [2, 3], sha256(first)], ["b", "torch.bfloat16", [2], sha256(second)]]
    assert fingerprint(model) == sha256(json.dumps(rows).encode())


def test_parameters_count_as_buffers_do():
    layer = nn.Linear(3, 2)
    assert fingerprint(layer) == fingerprint(Holder(**layer.state_dict()))


# the weights of a pipeline


def test_weights_of_a_model_are_those_of_its_second_load(pipe):
    found = weights_of(pipe)
    assert list(found) == ["unet", "vae", "text_encoder", "tokenizer"]
    assert len(set(found.values())) == 4
    assert weights_of(load()) == found


def test_another_layout_of_the_convolutions_is_the_same_model(pipe):
    other = copy.deepcopy(pipe.vae).to(memory_format=torch.channels_last)
    assert any(not weight.is_contiguous() for weight in other.parameters())
    assert fingerprint(other) == weights_of(pipe)["vae"]


def test_another_vocabulary_and_another_padding_are_noticed(pipe):
    tokenizer = pipe.tokenizer
    other = type(tokenizer)(tokenizer.vocab, tokenizer.merges[:-1], pad_id=tokenizer.pad_id)
    prints = {fingerprints._vocabulary_sha256(one) for one in (tokenizer, other, tokenizer.with_padding(0))}
    assert len(prints) == 3


@pytest.fixture
def own(pipe):
    """A pipeline whose autoencoder may be changed."""
    other = copy.copy(pipe)
    other.vae = copy.deepcopy(pipe.vae)
    return other


@pytest.fixture
def read(spy):
    """The models whose weights were read."""
    return spy(fingerprints, "fingerprint")


def test_weights_are_read_once(read, pipe, own):
    weights_of(pipe)
    read.clear()
    found = weights_of(own)
    assert [module for module, _ in read] == [own.vae]
    with torch.inference_mode():
        assert weights_of(own) == found
    own.vae.decode(torch.zeros(1, own.family.vae.latent_channels, 8, 8))
    assert environment(own)["weights"] == found
    assert [module for module, _ in read] == [own.vae]


def change_in_place(vae):
    next(vae.parameters()).add_(1)


def change_in_inference_mode(vae):
    with torch.inference_mode():
        next(vae.parameters()).add_(1)


def load_other_weights(vae):
    vae.load_state_dict({name: value + 1 for name, value in vae.state_dict().items()})


def assign_other_weights(vae):
    vae.load_state_dict({name: value + 1 for name, value in vae.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_in_inference_mode, load_other_weights, assign_other_weights, nn.Module.half],
)
def test_changed_weights_are_read_again(own, change):
    before = weights_of(own)
    change(own.vae)
    after = weights_of(own)
    assert [name for name in before if before[name] != after[name]] == ["vae"]
    assert after["vae"] == fingerprint(own.vae)


def test_a_replaced_model_is_read_again(own):
    before = weights_of(own)
    own.vae = copy.deepcopy(own.vae)
    assert weights_of(own) == before
    next(own.vae.parameters()).zero_()
    assert weights_of(own)["vae"] != before["vae"]


def test_nothing_is_kept_alive(own):
    weights_of(own)
    gone = weakref.ref(own.vae)
    del own.vae
    gc.collect()
    assert gone() is None


# records


def test_a_record_is_plain_json(stored, pipe):
    assert stored["manifest"]["image"] == image_record(IMAGE, "photo.png")
    assert stored["manifest"]["image"]["size"] == [40, 56]
    assert stored["manifest"]["mask"] == mask_record(MASK)
    assert stored["manifest"]["mask"]["share"] == round(240 / 2240, 6)
    assert stored["manifest"]["weights"] == weights_of(pipe)
    assert (stored["manifest"]["device"], stored["manifest"]["dtype"]) == ("cpu", "float32")


def test_every_pixel_counts():
    rgb, alpha = IMAGE.rgb, np.full((40, 56), 255, dtype=np.uint8)
    other = rgb.copy()
    other[39, 55, 2] ^= 1
    images = [IMAGE, InputImage(rgb=other), InputImage(rgb=rgb, alpha=alpha), InputImage(rgb=rgb, alpha=alpha - 1)]
    images.append(InputImage(rgb=rgb.reshape(56, 40, 3)))
    assert len({image_record(image)["sha256"] for image in images}) == 5
    assert image_record(InputImage(rgb=np.asfortranarray(rgb))) == image_record(IMAGE)


def test_the_recorded_inputs_are_taken(stored):
    check_input(stored["manifest"]["image"], IMAGE, "image")
    check_input(stored["manifest"]["mask"], MASK, "mask")
    check_input(stored["manifest"]["mask"], mask_from_text(stored["manifest"]["mask"]["png"]), "mask")


@pytest.mark.parametrize(
    ("argument", "other", "words"),
    [
        ("image", InputImage(rgb=IMAGE.rgb[:, ::-1]), ["40 rows, 56 columns", "photo.png"]),
        ("image", InputImage(rgb=IMAGE.rgb[:32]), ["32 rows, 56 columns"]),
        ("image", InputImage(rgb=IMAGE.rgb, alpha=IMAGE.rgb[..., 0]), ["photo.png"]),
        ("mask", 1 - MASK, ["path is not known"]),
        ("mask", np.where(MASK > 0, np.float32(0.99), 0).astype(np.float32), ["path is not known"]),
    ],
)
def test_other_inputs_are_refused(stored, argument, other, words):
    with pytest.raises(SettingError) as caught:
        check_input(stored["manifest"][argument], other, argument)
    assert caught.value.code == "MANIFEST_INPUT"
    assert caught.value.subject == argument
    assert all(word in str(caught.value) for word in [*words, stored["manifest"][argument]["sha256"][:12]])


# masks as text


def decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.mark.parametrize(("white", "mode"), [(1, "1"), (255, "L"), (65535, "I;16")])
def test_every_level_comes_back(white, mode):
    values = np.arange(white + 1, dtype=np.float32).reshape(-1, min(white + 1, 256)) / np.float32(white)
    levels = Mask(values).array
    text = mask_to_text(levels)
    assert decoded(text).mode == mode
    read = mask_from_text(text)
    assert read.dtype == np.float32
    assert read.tobytes() == levels.tobytes()


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.floats(0, 1, width=32))
    | arrays.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12))).map(lambda hole: hole.astype("f4"))
)
@settings(max_examples=100, deadline=None)
def test_masks_come_back_exactly_or_not_at_all(mask):
    text = mask_to_text(mask)
    assert text is None or mask_from_text(text).tobytes() == mask.tobytes()


def test_what_no_png_holds_is_left_out():
    third = np.full((8, 8), 1 / 3 + 1e-6, dtype=np.float32)
    assert mask_to_text(third) is None
    assert "png" not in mask_record(third)
    assert mask_to_text(-np.zeros((8, 8), dtype=np.float32)) is None


def test_large_masks_are_left_out():
    noise = np.random.default_rng(0).integers(0, 2, (512, 512)).astype(np.float32)
    assert mask_to_text(noise) is None
    disc = np.hypot(*np.mgrid[-1:1:1024j, -1:1:1024j]) < 0.8
    assert len(mask_to_text(disc.astype(np.float32))) < 5000


def png(image):
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize("text", ["", "no base64!", "äöü", base64.b64encode(b"no PNG").decode(), None, 5, []])
def test_text_that_is_no_image(text):
    with pytest.raises(MaskError) as caught:
        mask_from_text(text)
    assert caught.value.code == "MASK_TEXT"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_text_that_is_no_grey_image(mode):
    with pytest.raises(MaskError, match=f"mode {mode}"):
        mask_from_text(png(Image.new(mode, (8, 8))))


@given(st.integers(0, 10_000), st.integers(1, 255), st.booleans())
@settings(max_examples=100, deadline=None)
def test_damaged_text(position, change, cut):
    data = bytearray(base64.b64decode(mask_to_text(MASK)))
    position %= len(data)
    data[position] ^= change
    text = base64.b64encode(data[:position] if cut else data).decode()
    with suppress(SdInpaintError):
        assert mask_from_text(text).dtype == np.float32


# making it again


def test_nothing_differs_from_oneself(stored, pipe):
    assert differences(stored["manifest"], pipe) == []
    require_same_weights(stored["manifest"], pipe)


def test_what_differs_is_said_in_words_weights_first(stored, pipe):
    made = stored["manifest"] | {"torch": "1.13.1", "device": "NVIDIA T4", "dtype": "float16", "family": "sd2"}
    made["weights"] = made["weights"] | {"vae": "3f2a" * 16, "controlnet": "91bc" * 16}
    here = weights_of(pipe)
    assert differences(made, pipe) == [
        f"vae: made with 3f2a3f2a3f2a..., loaded {here['vae'][:12]}...",
        "controlnet: made with 91bc91bc91bc..., loaded none",
        f"family: made with sd2, here {pipe.family.name}",
        "dtype: made with float16, here float32",
        "device: made with NVIDIA T4, here cpu",
        f"torch: made with 1.13.1, here {torch.__version__}",
    ]


def test_other_weights_are_refused(stored, own):
    next(own.vae.parameters()).mul_(-1)
    with pytest.raises(CheckpointError, match="vae: made with") as caught:
        require_same_weights(stored["manifest"], own)
    assert caught.value.code == "MANIFEST_WEIGHTS"
    assert caught.value.subject == "demo"
    assert "unet" not in caught.value.found
    assert "'demo'" in caught.value.hint


def test_other_versions_alone_are_not_refused(stored, pipe):
    require_same_weights(stored["manifest"] | {"torch": "1.13.1", "sdinpaint": "0.0.1", "device": "NVIDIA T4"}, pipe)


def test_arguments_are_those_of_the_run(stored, pipe):
    assert arguments(stored, stored_names("inpaint")) == stored


@pytest.mark.parametrize("name", ["sharpness", "on_step", "noise", "image", "progress"])
def test_what_is_no_setting_is_refused(stored, pipe, name):
    with pytest.raises(SettingError) as caught:
        arguments(stored | {name: 1}, stored_names("inpaint"))
    assert caught.value.code == "MANIFEST_SETTING"
    assert caught.value.subject == f"settings.{name}"


def test_settings_go_through_a_file(stored, tmp_path):
    save_png(Image.fromarray(IMAGE.rgb), tmp_path / "a.png", stored)
    read = read_settings(tmp_path / "a.png")
    assert read == stored
    assert manifest_of(read) == stored["manifest"]


def test_shortened_settings_are_refused(stored, tmp_path):
    save_png(Image.fromarray(IMAGE.rgb), tmp_path / "a.png", stored | {"prompt": "fox " * 20_000})
    with pytest.raises(SettingError) as caught:
        manifest_of(read_settings(tmp_path / "a.png"))
    assert caught.value.code == "MANIFEST_SHORTENED"


@pytest.mark.parametrize("form", [0, 2, 10**30])
def test_another_form_is_refused(stored, form):
    with pytest.raises(SettingError) as caught:
        check_manifest({"form": form, "all else": "is new"})
    assert caught.value.code == "MANIFEST_FORM"


def places(value, path=()):
    """The path of everything in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def replaced(value, path, new):
    """A JSON value with another one in one place; gone from there where `new` is KeyError."""
    if not path:
        return None if new is KeyError else new
    other = copy.copy(value)
    if new is KeyError and len(path) == 1:
        del other[path[0]]
    else:
        other[path[0]] = replaced(value[path[0]], path[1:], new)
    return other


NEEDED = ["form", "kind", "model", "weights", "image", "mask", "dtype", "torch", "sdinpaint", "device", "draws"]
PARTS = [("manifest", key) for key in NEEDED] + [("manifest", "image", key) for key in ("path", "size", "sha256")]
PARTS += [("manifest", "mask", "sha256"), ("manifest", "weights", "unet"), ("prompt",), ("seed",), ("manifest",)]


@pytest.mark.parametrize("path", PARTS, ids=".".join)
@pytest.mark.parametrize("new", [KeyError, True, 1.5, [[]]], ids=repr)
def test_a_broken_key_is_named(stored, path, new):
    if new is KeyError and path[-1] == "unet":
        return
    with pytest.raises(SettingError) as caught:
        manifest_of(replaced(stored, path, new))
    assert caught.value.code == "MANIFEST_BROKEN"
    assert caught.value.subject.endswith(".".join(path))
    assert caught.value.expected


def test_the_place_in_a_list_is_named(stored):
    with pytest.raises(SettingError) as caught:
        manifest_of(replaced(stored, ("manifest", "image", "size", 1), "56"))
    assert caught.value.subject == "manifest.image.size[1]"


def test_kinds_need_their_inputs(stored):
    without = {key: value for key, value in stored["manifest"].items() if key != "mask"}
    assert check_manifest(without | {"kind": "vary"})["kind"] == "vary"
    with pytest.raises(SettingError, match="one of inpaint, vary, outpaint"):
        check_manifest(without | {"kind": "upscale"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_json_anywhere_is_refused_or_taken(stored, pipe, data):
    path = data.draw(st.sampled_from(list(places(stored))))
    broken = replaced(stored, path, data.draw(JSON | st.just(KeyError)))
    recorded = broken.get("manifest") if isinstance(broken, dict) else broken
    records = recorded if isinstance(recorded, dict) else {}
    with suppress(SdInpaintError):
        arguments(broken, stored_names("inpaint"))
    with suppress(SdInpaintError):
        differences(recorded, pipe)
    with suppress(SdInpaintError):
        require_same_weights(recorded, pipe)
    with suppress(SdInpaintError):
        check_input(records.get("image"), IMAGE, "image")
    with suppress(SdInpaintError):
        check_input(records.get("mask"), MASK, "mask")


def test_the_size_of_an_image_is_its_own(pipe):
    """A record of one image is not that of its transpose, whose bytes may be the same."""
    flat = InputImage(rgb=np.zeros((16, 24, 3), dtype=np.uint8))
    with pytest.raises(SettingError):
        check_input(image_record(flat), replace(flat, rgb=flat.rgb.transpose(1, 0, 2)), "image")
