"""Saving: whole or not at all, refused before any work is done, and with settings that can be read back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdinpaint import picture_io
from sdinpaint.errors import ImageError, SdInpaintWarning
from sdinpaint.picture_io import check_output_path, read_settings, save_png

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


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ImageError, match="no folder") as caught:
        check_output_path(tmp_path / "absent" / "a.png")
    assert caught.value.code == "IMAGE_OUTPUT_PATH"


def test_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ImageError, match="a folder of that name"):
        check_output_path(tmp_path / "a.png")


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def read_only(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(picture_io.tempfile, "TemporaryFile", read_only)
    with pytest.raises(ImageError, match="Read-only") as caught:
        check_output_path(tmp_path / "a.png")
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
            "Steps: 30, Sampler: ddim, CFG scale: 7.5, Seed: 42, Size: 72x96, Denoising strength: 1.0"
        )


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
def test_picture_without_settings(image, tmp_path, suffix):
    image.save(tmp_path / f"a.{suffix}")
    with pytest.raises(ImageError) as caught:
        read_settings(tmp_path / f"a.{suffix}")
    assert caught.value.code == "IMAGE_NO_SETTINGS"


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 50_000, "3"])
def test_foreign_settings_are_refused(image, tmp_path, text):
    info = picture_io.PngInfo()
    info.add_itxt("sdinpaint", text)
    image.save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ImageError) as caught:
        read_settings(tmp_path / "a.png")
    assert caught.value.code == "IMAGE_NO_SETTINGS"


# whole or not at all


class Faulty:
    """An image whose encoder writes some bytes and then fails."""

    mode, info = "RGB", {}

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save(self, stream, **options):
        stream.write(b"half a picture")
        raise self.error


@pytest.mark.parametrize("exists", [True, False])
def test_disk_full_leaves_the_old_file_and_nothing_else(image, tmp_path, exists):
    target = tmp_path / "a.png"
    if exists:
        target.write_bytes(b"the old picture")
    with pytest.raises(ImageError, match="No space left") as caught:
        save_png(Faulty(OSError(errno.ENOSPC, "No space left on device")), target, {})
    assert caught.value.code == "IMAGE_NOT_WRITTEN"
    assert names(tmp_path) == (["a.png"] if exists else [])
    assert not exists or target.read_bytes() == b"the old picture"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError()])
def test_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        save_png(Faulty(error), tmp_path / "a.png", {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_at_the_end_leaves_the_old_file(image, tmp_path, monkeypatch, step):
    (tmp_path / "a.png").write_bytes(b"the old picture")

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(ImageError, match="Input/output"):
        save_png(image, tmp_path / "a.png", {})
    assert (tmp_path / "a.png").read_bytes() == b"the old picture"
    assert names(tmp_path) == ["a.png"]


def test_file_is_complete_and_on_disk_before_it_takes_the_name(image, tmp_path, monkeypatch):
    target, seen = tmp_path / "a.png", []
    replace, fsync = os.replace, os.fsync

    def record_fsync(number):
        seen.append(("fsync", os.fstat(number).st_size))
        fsync(number)

    def record_replace(source, destination):
        seen.append(("replace", Path(source).stat().st_size))
        assert Path(source).parent == target.parent
        assert not target.exists()
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    save_png(image, target, {})
    assert seen == [("fsync", target.stat().st_size), ("replace", target.stat().st_size)]


def test_new_file_has_the_usual_permissions(image, tmp_path):
    save_png(image, tmp_path / "a.png", {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


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
from sdinpaint.picture_io import save_png
image = Image.effect_noise((256, 256), 90).convert("RGB")
for i in range(10**6):
    save_png(image, f"{sys.argv[1]}/{i % 50}.png", {"i": i})
    if i == 0:
        print("ready", flush=True)
"""


def test_killed_writer_leaves_whole_pictures(tmp_path):
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
