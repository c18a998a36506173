"""Saving: whole or not at all, refused before any work is done, and with settings that can be read back."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from sdinpaint.errors import ImageError, SdInpaintWarning
from sdinpaint.images import files
from sdinpaint.images.files import check_output_path, read_settings, save_png
from sdinpaint.images.parameters import SAMPLER_NAMES
from sdinpaint.sampling import SAMPLERS

SETTINGS = {
    "prompt": "a red fox",
    "negative_prompt": "blur",
    "steps": 30,
    "sampler": "ddim",
    "guidance_scale": 7.5,
    "seed": 42,
    "size": "72x96",
    "strength": 1.0,
}


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 96, 3), dtype=np.uint8))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# before the work


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.jpeg", "a.webp", "ä ö.png", ".hidden.png"])
def test_good_paths(tmp_path, name):
    assert check_output_path(str(tmp_path / name)) == tmp_path / name
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.png.txt", "a.gif", ".png"])
def test_unknown_extension(tmp_path, name):
    with pytest.raises(ImageError, match=r"\.png \.jpg") as caught:
        check_output_path(tmp_path / name)
    assert caught.value.code == "IMAGE_OUTPUT_TYPE"
    assert name in caught.value.subject


@pytest.mark.parametrize("suffix", files.LONGEST.keys())
def test_a_format_refuses_an_image_that_it_does_not_hold(tmp_path, suffix):
    most = files.LONGEST[suffix]
    path = tmp_path / f"out.{suffix.lower()}"
    save_png(Image.new("RGB", (most, 8)), path, {})
    before = path.read_bytes()
    for size in ((most + 1, 8), (8, most + 1)):
        for save in (save_png, files.as_stored) if suffix != "WEBP" else (save_png,):
            with pytest.raises(ImageError, match=rf"{size[0]} x {size[1]} pixels[^$]*at most {most}"):
                save(Image.new("RGB", size), path, {})
    assert path.read_bytes() == before


@pytest.mark.parametrize("error", [RuntimeError("Failed to encode image"), ValueError("encoding error 5")])
def test_errors_of_encoders_are_explained(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    for save in (save_png, files.as_stored):
        with pytest.raises(ImageError, match=str(error)):
            save(Image.new("RGB", (8, 8)), tmp_path / "out.avif", {})


def test_a_folder_that_does_not_exist_is_made_when_the_image_is_written(image, tmp_path):
    target = tmp_path / "absent" / "too" / "a.png"
    check_output_path(target)
    assert names(tmp_path) == []
    save_png(image, target, {})
    assert names(target.parent) == ["a.png"]


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ImageError):
        save_png(Faulty(OSError(errno.ENOSPC, "No space left on device")), tmp_path / "absent" / "too" / "a.png", {})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("file/a.png", "Not a directory"),
        ("file/absent/a.png", "Not a directory"),
        ("x" * 300 + ".png", "too long"),
        ("absent/" + "x" * 300 + "/a.png", "too long"),
        ("absent/" + "x" * 300 + ".png", "too long"),
        ("x/" * 3000 + "a.png", "too long"),
        ("a\0.png", "null"),
        ("\ud800.png", "surrogates"),
        ("loop.png", "symbolic links"),
        ("pipe.png", "a pipe, socket or device"),
    ],
)
def test_paths_that_no_image_can_have(tmp_path, name, found):
    (tmp_path / "file").touch()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    before = names(tmp_path)
    with pytest.raises(ImageError, match=found) as caught:
        check_output_path(f"{tmp_path}/{name}")
    assert caught.value.code == "IMAGE_OUTPUT_PATH"
    assert names(tmp_path) == before


def test_a_link_to_a_device_is_not_followed(image, tmp_path):
    (tmp_path / "a.png").symlink_to("/dev/full")
    for write in (check_output_path, lambda path: files.write_image(image, path, "PNG")):
        with pytest.raises(ImageError, match="a pipe, socket or device"):
            write(tmp_path / "a.png")
    assert not os.path.isfile("/dev/full")


def test_a_file_that_is_read_only_stays(image, tmp_path):
    (tmp_path / "a.png").write_bytes(b"the old image")
    (tmp_path / "a.png").chmod(0o444)
    for write in (check_output_path, lambda path: files.write_image(image, path, "PNG")):
        with pytest.raises(ImageError, match="read-only") as caught:
            write(tmp_path / "a.png")
        assert caught.value.code == "IMAGE_NOT_WRITTEN"
    assert (tmp_path / "a.png").read_bytes() == b"the old image"


def test_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ImageError, match="a folder of that name"):
        check_output_path(tmp_path / "a.png")


def test_folder_that_cannot_be_written(tmp_path, failing):
    failing(tempfile, "TemporaryFile", OSError(errno.EROFS, "Read-only file system"))
    with pytest.raises(ImageError, match="Read-only") as caught:
        check_output_path(tmp_path / "a.png")
    assert caught.value.code == "IMAGE_NOT_WRITTEN"
    assert caught.value.hint


# pixels


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_lossless_formats_keep_every_pixel(image, tmp_path, suffix, mode):
    image.putalpha(255) if mode == "RGBA" else None
    save_png(image, tmp_path / f"a.{suffix}", SETTINGS)
    with Image.open(tmp_path / f"a.{suffix}") as read:
        assert np.array_equal(np.asarray(read.convert(mode)), np.asarray(image))
    assert names(tmp_path) == [f"a.{suffix}"]


def test_transparent_jpeg_is_flattened_with_a_warning(tmp_path):
    transparent = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    with pytest.warns(SdInpaintWarning, match="JPEG has no transparency") as caught:
        save_png(transparent, tmp_path / "a.jpg", {})
    assert caught[0].filename == __file__
    with Image.open(tmp_path / "a.jpg") as read:
        assert np.asarray(read).min() >= 254


def test_opaque_jpeg_does_not_warn(image, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_png(image, tmp_path / "a.jpg", {})


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_profile_is_written(image, tmp_path, suffix):
    image.info["icc_profile"] = b"profile" * 30
    save_png(image, tmp_path / f"a.{suffix}", {})
    with Image.open(tmp_path / f"a.{suffix}") as read:
        assert read.info["icc_profile"] == b"profile" * 30


# settings


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_settings_are_read_back(image, tmp_path, suffix):
    settings = SETTINGS | {"prompt": "ein Fuchs 🦊 'rot'\n\t", "seeds": [1, 2], "none": None, "path": Path("x")}
    save_png(image, tmp_path / f"a.{suffix}", settings)
    assert read_settings(tmp_path / f"a.{suffix}") == settings | {"path": "x"}


def test_parameters_text_is_that_of_a1111(image, tmp_path):
    save_png(image, tmp_path / "a.png", SETTINGS)
    with Image.open(tmp_path / "a.png") as read:
        assert read.info["parameters"] == (
            "a red fox\nNegative prompt: blur\n"
            "Steps: 30, Sampler: DDIM, CFG scale: 7.5, Seed: 42, Size: 72x96, Denoising strength: 1.0"
        )


MANIFEST = {"sdinpaint": "0.1.0", "model": "models/sd-v1-5-inpainting.ckpt", "size": [96, 72]}
FULL = {key: value for key, value in SETTINGS.items() if key != "size"} | {"spacing": "leading", "manifest": MANIFEST}
LAST_LINE = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def as_a1111_reads(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and fields: lines before the last one, and pairs in it, as A1111's reader finds them."""
    *lines, last = text.strip().split("\n")
    pairs = LAST_LINE.findall(last)
    assert len(pairs) >= 3  # or it takes the line for a part of the prompt
    prompts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in map(str.strip, lines):
        negative = negative or line.startswith("Negative prompt:")
        prompts[negative].append(line.removeprefix("Negative prompt:").strip() if negative else line)
    fields = {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}
    return "\n".join(prompts[False]), "\n".join(prompts[True]), fields


def parameters(image: Image.Image, path: Path, settings: dict[str, object]) -> tuple[str, str, dict[str, str]]:
    save_png(image, path, settings)
    with Image.open(path) as read:
        return as_a1111_reads(read.info["parameters"])


def test_parameters_of_a_manifest(image, tmp_path):
    prompt, negative, fields = parameters(image, tmp_path / "a.png", FULL)
    assert (prompt, negative) == ("a red fox", "blur")
    assert fields == {
        "Steps": "30",
        "Sampler": "DDIM",
        "CFG scale": "7.5",
        "Seed": "42",
        "Size": "96x72",
        "Model": "sd-v1-5-inpainting",
        "Denoising strength": "1.0",
        "Version": "sdinpaint 0.1.0",
    }


@pytest.mark.parametrize(
    ("sampler", "spacing", "name", "schedule"),
    [
        ("euler", "leading", "Euler", None),
        ("euler_ancestral", "karras", "Euler a", "Karras"),
        ("dpmpp_2m", "karras", "DPM++ 2M", "Karras"),
        ("dpmpp_2m", "linspace", "DPM++ 2M", "Uniform"),
        ("one, of: mine", "trailing", "one, of: mine", None),
    ],
)
def test_samplers_have_the_names_of_a1111(image, tmp_path, sampler, spacing, name, schedule):
    settings = FULL | {"sampler": sampler, "spacing": spacing}
    _, _, fields = parameters(image, tmp_path / "a.png", settings)
    assert (fields["Sampler"], fields.get("Schedule type")) == (name, schedule)


def test_every_sampler_has_a_name_there():
    assert set(SAMPLER_NAMES) == set(SAMPLERS)


def as_lines(text: str) -> str:
    """A text of several lines as the reader gives it back: without white space at the ends of each."""
    return "\n".join(line.strip() for line in text.split("\n")).strip()


PROMPTS = [
    'a "red", fox: 3, Seed: 5',
    "a fox\nSampler: none, at, all: 3, Seed: 1\nin a wood",
    "a fox, CFG scale: 1,\n\n  Model: x, Size: 1x1  ",
    "back\\slash \\",
    "ein Fuchs 🦊\tim Wald\u2028",
    "",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative_prompt", PROMPTS)
def test_no_prompt_confuses_a_reader(image, tmp_path, prompt, negative_prompt):
    settings = FULL | {"prompt": prompt, "negative_prompt": negative_prompt}
    read = parameters(image, tmp_path / "a.png", settings)
    assert read[:2] == (as_lines(prompt), as_lines(negative_prompt))
    assert read[2] == parameters(image, tmp_path / "b.png", FULL)[2]


def test_lines_that_look_like_fields_join_the_line_before(image, tmp_path):
    settings = FULL | {"prompt": "a fox\n Negative prompt: of none\nSteps: 3\nof stone", "negative_prompt": "blur"}
    prompt, negative, fields = parameters(image, tmp_path / "a.png", settings)
    assert prompt == "a fox Negative prompt: of none Steps: 3\nof stone"
    assert negative == "blur"
    assert fields["Steps"] == "30"


ODD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1)


@given(ODD, ODD)
@settings(max_examples=60, deadline=None)
def test_any_name_comes_back(folder, model, sampler):
    odd = FULL | {"sampler": sampler, "manifest": {"model": "models/" + model}}
    _, _, fields = parameters(Image.new("RGB", (8, 8)), folder / "named.png", odd)
    assert fields["Sampler"] == SAMPLER_NAMES.get(sampler, sampler)
    assert fields.get("Model", ".") == re.sub(r"\.(safetensors|ckpt|pth)$", "", Path("models", model).name)
    assert fields["Seed"] == "42"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_huge_prompt_is_shortened_and_named_by_its_sha256(image, tmp_path, suffix):
    settings = SETTINGS | {"prompt": "ä" * 2_000_000}
    save_png(image, tmp_path / f"a.{suffix}", settings)
    stored = read_settings(tmp_path / f"a.{suffix}")
    assert stored["prompt"] == "ä" * 1000 + "..."
    assert stored["seed"] == 42
    assert stored["shortened_from_sha256"] == hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    assert (tmp_path / f"a.{suffix}").stat().st_size < 120_000


def test_huge_lists_leave_the_sha256(image, tmp_path):
    save_png(image, tmp_path / "a.jpg", {"seeds": list(range(100_000))})
    assert list(read_settings(tmp_path / "a.jpg")) == ["shortened_from_sha256"]


def test_the_copy_of_a_mask_gives_way_first(image, tmp_path):
    mask = {"path": "mask.png", "sha256": "1f" * 32}
    settings = FULL | {"prompt": "fox " * 9000, "manifest": MANIFEST | {"mask": mask | {"png": "A" * 32_000}}}
    save_png(image, tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings | {"manifest": MANIFEST | {"mask": mask}}
    short = settings | {"prompt": "fox " * 6000}
    save_png(image, tmp_path / "a.png", short)
    assert read_settings(tmp_path / "a.png") == short


def circular() -> dict[str, object]:
    settings: dict[str, object] = {}
    settings["self"] = settings
    return settings


@pytest.mark.parametrize(
    "settings",
    [{"prompt": "\ud800 \0 \x1b"}, {"prompt": 5, 7: "x", ("a",): 1}, {"noise": np.zeros(3), "t": object()}, circular()],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_odd_settings_never_prevent_a_save(image, tmp_path, settings, suffix):
    save_png(image, tmp_path / f"a.{suffix}", settings)
    assert isinstance(read_settings(tmp_path / f"a.{suffix}"), dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("settings")


@given(st.dictionaries(st.text(), JSON, max_size=5))
@settings(max_examples=30, deadline=None)
def test_any_json_comes_back(folder, stored):
    save_png(Image.new("RGB", (8, 8)), folder / "a.png", stored)
    assert read_settings(folder / "a.png") == stored


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_image_without_settings(image, tmp_path, suffix):
    image.save(tmp_path / f"a.{suffix}")
    with pytest.raises(ImageError) as caught:
        read_settings(tmp_path / f"a.{suffix}")
    assert caught.value.code == "IMAGE_NO_SETTINGS"


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 50_000, "3"])
def test_foreign_settings_are_refused(image, tmp_path, text):
    info = PngInfo()
    info.add_itxt("sdinpaint", text)
    image.save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ImageError) as caught:
        read_settings(tmp_path / "a.png")
    assert caught.value.code == "IMAGE_NO_SETTINGS"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_text(name: bytes, data: bytes) -> bytes:
    """A PNG of 8 x 8 pixels with one chunk of text, whose checksum is right."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="PNG")
    start = stream.getvalue()
    return start[:33] + chunk(name, data) + start[33:]


def in_exif(text: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = text
    return exif.tobytes().removeprefix(b"Exif\0\0")


STORED = json.dumps(SETTINGS).encode()
TEXTS = {
    b"tEXt": b"sdinpaint\0" + STORED,
    b"zTXt": b"sdinpaint\0\0" + zlib.compress(STORED),
    b"iTXt": b"sdinpaint\0\1\0\0\0" + zlib.compress(STORED),
    b"eXIf": in_exif(STORED.decode()),
}
CHANGES = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4)


@pytest.mark.parametrize("name", TEXTS)
def test_settings_in_every_kind_of_text(folder, name):
    (folder / "text.png").write_bytes(with_text(name, TEXTS[name]))
    assert read_settings(folder / "text.png") == SETTINGS


@given(st.sampled_from(list(TEXTS)), CHANGES, st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_altered_settings_are_read_or_refused(folder, name, changes, share):
    text = bytearray(TEXTS[name])
    for position, value in changes:
        text[position % len(text)] = value
    (folder / "altered.png").write_bytes(with_text(name, bytes(text[: round(share * len(text))])))
    with suppress(ImageError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of broken Exif data
        assert isinstance(read_settings(folder / "altered.png"), dict)


@pytest.fixture(scope="module")
def saved(folder) -> dict[str, bytes]:
    """The bytes of an image with its settings, by its extension."""
    for suffix in ("png", "jpg", "webp"):
        save_png(Image.new("RGB", (8, 8)), folder / f"whole.{suffix}", FULL)
    return {suffix: (folder / f"whole.{suffix}").read_bytes() for suffix in ("png", "jpg", "webp")}


def test_damaged_exif_data_of_a_jpeg_is_refused(folder, saved):
    (folder / "exif.jpg").write_bytes(saved["jpg"].replace(b"Exif\0\0MM", b"Exif\0\0XX"))
    with pytest.raises(ImageError) as caught:
        read_settings(folder / "exif.jpg")
    assert caught.value.code == "IMAGE_NO_SETTINGS"


@given(st.sampled_from(["png", "jpg", "webp"]), CHANGES, st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_damaged_files_are_read_or_refused(folder, saved, suffix, changes, share):
    content = bytearray(saved[suffix])
    for position, value in changes:
        content[position % len(content)] = value
    (folder / f"damaged.{suffix}").write_bytes(content[: round(share * len(content))])
    with suppress(ImageError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert isinstance(read_settings(folder / f"damaged.{suffix}"), dict)


# whole or not at all


class Faulty:
    """An image whose encoder writes some bytes and then fails."""

    mode, size, info = "RGB", (8, 8), {}

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save(self, stream, **options):
        stream.write(b"half an image")
        raise self.error


@pytest.mark.parametrize("exists", [True, False])
def test_disk_full_leaves_the_old_file_and_nothing_else(image, tmp_path, exists):
    target = tmp_path / "a.png"
    if exists:
        target.write_bytes(b"the old image")
    with pytest.raises(ImageError, match="No space left") as caught:
        save_png(Faulty(OSError(errno.ENOSPC, "No space left on device")), target, {})
    assert caught.value.code == "IMAGE_NOT_WRITTEN"
    assert names(tmp_path) == (["a.png"] if exists else [])
    assert not exists or target.read_bytes() == b"the old image"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError()])
def test_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        save_png(Faulty(error), tmp_path / "a.png", {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_at_the_end_leaves_the_old_file(image, tmp_path, step, failing):
    (tmp_path / "a.png").write_bytes(b"the old image")
    failing(os, step, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(ImageError, match="Input/output"):
        save_png(image, tmp_path / "a.png", {})
    assert (tmp_path / "a.png").read_bytes() == b"the old image"
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize(("exists", "naming"), [(False, "link"), (True, "replace")])
def test_file_is_complete_and_on_disk_before_it_takes_the_name(image, tmp_path, monkeypatch, exists, naming):
    target, seen = tmp_path / "a.png", []
    if exists:
        target.write_bytes(b"the old image")

    def record(name, size):
        function = getattr(os, name)

        def call(*given, **options):
            seen.append((name, size(given[0])))
            assert target.exists() == exists or name == "fsync"
            function(*given, **options)

        monkeypatch.setattr(os, name, call)

    record("fsync", lambda number: os.fstat(number).st_size)
    record(naming, lambda source: os.stat(source).st_size)
    save_png(image, target, {})
    assert seen[:2] == [("fsync", target.stat().st_size), (naming, target.stat().st_size)]
    assert [name for name, _ in seen] == ["fsync", naming, "fsync"]  # the last one of the folder


def test_new_file_has_the_usual_permissions(image, tmp_path):
    save_png(image, tmp_path / "a.png", {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_that_is_replaced_keeps_its_permissions(image, tmp_path):
    (tmp_path / "a.png").touch(mode=0o640)
    save_png(image, tmp_path / "a.png", {})
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


def test_link_stays_a_link(image, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "a.png").symlink_to(tmp_path / "real" / "b.png")
    save_png(image, tmp_path / "a.png", {})
    assert (tmp_path / "a.png").is_symlink()
    assert names(tmp_path / "real") == ["b.png"]


def test_long_names_fit(image, tmp_path):
    save_png(image, tmp_path / ("x" * 251 + ".png"), {})
    assert len(names(tmp_path)) == 1


WRITER = """
import sys
from PIL import Image
from sdinpaint.images.files import save_png
image = Image.effect_noise((256, 256), 90).convert("RGB")
for i in range(10**6):
    save_png(image, f"{sys.argv[1]}/{i % 50}.png", {"i": i})
    if i == 0:
        print("ready", flush=True)
"""


def test_killed_writer_leaves_whole_images(tmp_path):
    broken = []
    for delay in (0.02, 0.11, 0.23):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        for path in tmp_path.glob("*.png"):
            try:
                read_settings(path)
            except ImageError:
                broken.append(path)
    assert "0.png" in names(tmp_path)
    assert not broken
